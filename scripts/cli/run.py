"""One run of `sluice submit`: send, report, and optionally wait and write the results."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TextIO

from scripts.cli import files, terminal
from scripts.cli.client import Gateway, Json
from scripts.cli.errors import CommandFailed
from scripts.cli.progress import Display, PlainLines, span, wait_for
from scripts.cli.results import fetch, line_of
from scripts.cli.submission import Outcome, read_jobs, send
from sluice.domain.pricing import base_model

# More IDs than this would scroll the messages off the screen.
IDS_FOR_A_PERSON = 10


def prompt_line(prompt: str, model: str, max_tokens: int, system: str | None) -> bytes:
    """Return the job of --prompt as a line of a file."""
    params: dict[str, object] = {
        "model": model,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": prompt}],
    }
    if system:
        params["system"] = system
    return json.dumps({"params": params}).encode()


@dataclass(frozen=True, slots=True)
class Submission:
    """The options of a run."""

    run_key: str
    defaults: Mapping[str, object]
    wait: bool
    as_json: bool
    is_prompt: bool

    def run(self, gateway: Gateway, lines: Iterable[bytes], sink: files.Output | None) -> bool:
        """Send, report and wait; return whether nothing was rejected and, with `wait`, all jobs succeeded.

        Results go to `sink` as jobs end. Without a sink, they go to standard output if it is piped
        or --json is set; of a --prompt, only the text of the answer does.
        """
        try:
            outcome = send(gateway, read_jobs(lines, self.defaults), self.run_key)
        except KeyboardInterrupt:
            terminal.say(
                f"stopped; run the same command with {self._again} to continue without duplicates"
            )
            raise
        self._report(outcome)
        good = not outcome.rejected and not outcome.stopped
        if not self.wait:
            self._print_accepted(outcome)
        elif outcome.accepted:
            good &= self._wait(gateway, [job.job_id for job in outcome.accepted], sink)
        return good

    @property
    def _again(self) -> str:
        """The options with which the same command finds the existing jobs."""
        deadline = self.defaults.get("deadline")
        return f"--idempotency-key {self.run_key}" + (f" --deadline {deadline}" if deadline else "")

    def _report(self, outcome: Outcome) -> None:
        for line in outcome.rejected:
            where = "" if self.is_prompt else f"line {line.line}: "
            terminal.say(f"{where}{line.error_type}: {line.message}")
        accepted = f"{terminal.counted(len(outcome.accepted), 'job')} accepted"
        if outcome.stopped and outcome.accepted:
            terminal.say(
                f"{accepted} before the error; run the same command with {self._again} "
                "to send the rest without duplicates"
            )
        elif not outcome.stopped and not self.is_prompt:
            terminal.say(f"{accepted}, {len(outcome.rejected):,} rejected")
        if outcome.stopped:
            terminal.say(f"error: {outcome.stopped}")

    def _print_accepted(self, outcome: Outcome) -> None:
        if self.as_json:
            accepted = [
                {"line": job.line, "id": job.job_id, "custom_id": job.custom_id}
                for job in outcome.accepted
            ]
            rejected = [
                {"line": line.line, "error": {"type": line.error_type, "message": line.message}}
                for line in outcome.rejected
            ]
            terminal.print_json(
                {"idempotency_key": self.run_key, "accepted": accepted, "rejected": rejected}
            )
            return
        shown = outcome.accepted if terminal.is_piped() else outcome.accepted[:IDS_FOR_A_PERSON]
        for job in shown:
            terminal.put(job.job_id)
        more = len(outcome.accepted) - len(shown)
        if more:
            terminal.say(f"and {more:,} more; pipe the output to get all IDs, or run `sluice list`")

    def _wait(self, gateway: Gateway, job_ids: list[str], sink: files.Output | None) -> bool:
        text_only = self.is_prompt and not sink and not self.as_json
        if not sink and not text_only and (self.as_json or terminal.is_piped()):
            sink = files.standard_output()
        answers: list[Json] = []

        def write_results(finished: list[Json]) -> None:
            if not sink and not text_only:
                return
            for job in fetch(gateway, [job["id"] for job in finished], _report_missing):
                if sink:
                    sink.write(line_of(job))
                else:
                    answers.append(job)

        good = wait_and_show(gateway, job_ids, write_results, again=self._again)
        for job in answers:
            _print_answer(job)
        if not sink and not text_only:
            terminal.say("run `sluice results` to fetch the answers, or use --out FILE next time")
        return good


def wait_and_show(
    gateway: Gateway,
    job_ids: list[str],
    on_finished: Callable[[list[Json]], None],
    *,
    again: str | None = None,
) -> bool:
    """Wait until all jobs have ended and show progress; return whether all succeeded."""
    started = time.monotonic()
    with display_for(sys.stderr) as display:
        gateway.on_wait = display.note
        try:
            last = wait_for(
                gateway, job_ids, display=display, group_of=group_of, on_finished=on_finished
            )
        except (KeyboardInterrupt, CommandFailed):
            if again:
                display.note(
                    f"the jobs keep running; run the same command with {again} to wait again"
                )
            raise
        finally:
            gateway.on_wait = terminal.say
    took = span(time.monotonic() - started)
    terminal.say(f"{last.succeeded:,} succeeded, {last.failed:,} failed in {took}, {last.cost}")
    return not last.failed


def display_for(stream: TextIO) -> Display:
    """Return a live bar on a terminal, plain lines anywhere else."""
    if not stream.isatty():
        return PlainLines(stream)
    # Rich takes tens of milliseconds to import, so only the bar imports it.
    from scripts.cli.bar import LiveBar  # noqa: PLC0415

    return LiveBar(stream)


def group_of(model: str) -> str:
    """Return the model group of a model."""
    name = base_model(model)
    return _model_groups().get(name, name)


@cache
def _model_groups() -> dict[str, str]:
    rows = json.loads(resources.files("sluice.data").joinpath("model_groups.json").read_bytes())[
        "groups"
    ]
    return {model: row["group"] for row in rows for model in row["models"]}


def _report_missing(job_id: str, reason: str) -> None:
    # It had ended a moment ago; it can only have been deleted at the end of its retention.
    terminal.say(f"{job_id}: {reason}")


def _print_answer(job: Json) -> None:
    if job["state"] == "succeeded":
        terminal.put_block(job.get("text") or terminal.as_json(job["message"]["content"]))
    else:
        error = job.get("error") or {"type": job["state"], "message": "no answer"}
        terminal.say(f"{job['id']} {job['state']}: {error['type']}: {error['message']}")
