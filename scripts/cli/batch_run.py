"""One run of `sluice submit --lane`: all lines become one batch, which is sent, reported, and optionally waited for."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scripts.cli import files, terminal
from scripts.cli.batches import report_end, wait_for_end, write_file
from scripts.cli.client import Gateway, Json
from scripts.cli.submission import Rejected, body_of_batch, read_jobs, within_one_request


@dataclass(frozen=True, slots=True)
class BatchRun:
    """The options of a run."""

    run_key: str
    defaults: Mapping[str, object]
    """Fields for jobs that do not set their own."""
    asked: Mapping[str, object]
    """The lane, and what belongs to it."""
    webhook: str | None
    wait: bool
    as_json: bool
    is_prompt: bool

    def run(self, gateway: Gateway, lines: Iterable[bytes], sink: files.Output | None) -> bool:
        """Send, report and wait; return whether no line was rejected and, with `wait`, all rows succeeded.

        With `wait`, results go to `sink`; without a sink, to standard output if it is piped or --json is set; of a
        --prompt, only the text of the answer does. Raise CommandFailed if the gateway refuses the batch.
        """
        good, rejected = within_one_request(read_jobs(lines, self.defaults))
        for line in rejected:
            where = "" if self.is_prompt else f"line {line.line}: "
            terminal.say(f"{where}{line.error_type}: {line.message}")
        if not good:
            terminal.say(f"no batch created: {terminal.counted(len(rejected), 'line')} rejected")
            return False
        headers = {"idempotency-key": self.run_key}
        if self.webhook:
            headers["sluice-webhook"] = self.webhook
        try:
            batch = gateway.submit_batch(body_of_batch(good, self.asked), headers)
        except KeyboardInterrupt:
            terminal.say(
                f"stopped; run the same command with {self._again} to continue without a second batch"
            )
            raise
        if not self.is_prompt:
            rows = terminal.counted(len(good), "job")
            terminal.say(f"{rows} accepted as batch {batch['id']}, {len(rejected):,} rejected")
        if self.wait:
            return self._wait(gateway, batch["id"], sink) and not rejected
        self._print_accepted(batch, rejected)
        return not rejected

    @property
    def _again(self) -> str:
        """The options with which the same command finds the existing batch."""
        deadline = self.defaults.get("deadline")
        return f"--idempotency-key {self.run_key}" + (f" --deadline {deadline}" if deadline else "")

    def _print_accepted(self, batch: Json, rejected: list[Rejected]) -> None:
        if not self.as_json:
            terminal.put(batch["id"])
            return
        lines = [
            {"line": line.line, "error": {"type": line.error_type, "message": line.message}}
            for line in rejected
        ]
        terminal.print_json({"idempotency_key": self.run_key, "batch": batch, "rejected": lines})

    def _wait(self, gateway: Gateway, batch_id: str, sink: files.Output | None) -> bool:
        good = report_end(wait_for_end(gateway, batch_id))
        if sink is None and self.is_prompt and not self.as_json:
            answer = bytearray()
            write_file(gateway, batch_id, "results", files.Output(answer.extend))
            _print_answer(bytes(answer))
        elif sink is not None or self.as_json or terminal.is_piped():
            write_file(gateway, batch_id, "results", sink or files.standard_output())
        else:
            terminal.say(
                f"run `sluice batches results {batch_id}` to fetch the answers, or use --out FILE next time"
            )
        return good


def _print_answer(results: bytes) -> None:
    """Print the text of the only result, or report why there is none."""
    for line in results.splitlines():
        result = json.loads(line)["result"]
        if result["type"] == "succeeded":
            blocks = result["message"]["content"]
            text = "".join(each.get("text", "") for each in blocks if each.get("type") == "text")
            terminal.put_block(text or terminal.as_json(blocks))
        else:
            error = result.get("error", {}).get("error", {})
            reason = f": {error.get('type')}: {error.get('message')}" if error else ""
            terminal.say(f"{result['type']}{reason}")
