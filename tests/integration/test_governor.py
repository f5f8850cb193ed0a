"""The governor's seams: Lambda's mapping, the secret's age, and the whole function on the local stack."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from botocore.exceptions import ClientError
from botocore.stub import Stubber

from functions.governor import app
from scripts.cli.deployed import Stack
from scripts.local_stack import LocalStack, Ready
from scripts.local_stack.emulator import REGION, call
from scripts.local_stack.proofs import mappings_as_sent
from sluice.adapters import aws
from sluice.adapters.dynamodb import (
    JOBS_NOTES_ID,
    DynamoGovernorNotes,
    DynamoJobs,
    DynamoLimits,
    notes_id,
)
from sluice.adapters.lambdas import LIMIT_AGE_MS, LambdaExecutions, LambdaQueueMapping
from sluice.adapters.secrets import POOL_AGE_MS, SecretHistory
from sluice.adapters.sqs import LOOK_SECONDS, SqsQueue, depth_of
from sluice.domain.capacity import UNREFILLED, Backlog, Consumer
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import DueFor, State
from sluice.domain.limits import Group, Seen
from sluice.domain.shares import CEILINGS, Note
from sluice.ports.jobs import Pointer
from sluice.settings import SettingsError
from sluice.wiring import shared
from tests.fakes import NOON, ROOMY, FrozenClock, a_job, known_group
from tests.fresh import forget_what_is_wired
from tests.moto_aws import STACK, Aws, in_memory

UUID: Final = "14e0db71-5d35-4eb5-b481-8945cf9d10c2"
EVENT: Final = Path(__file__).resolve().parents[2] / "events" / "schedule.json"
CEILING: Final = 20
HOUR_MS: Final = 3_600_000
WITHIN_SECONDS: Final = 30.0


@pytest.fixture
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


# The mapping -----------------------------------------------------------------------------------------------


@pytest.fixture
def client(cloud: Aws) -> Any:  # noqa: ARG001 - its credentials
    return aws.lambdas()


@pytest.fixture
def stub(client: Any) -> Iterator[Stubber]:
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


def mapping_of(client: Any) -> LambdaQueueMapping:
    return LambdaQueueMapping(client, UUID, "the worker's mapping")


def described(state: str, **more: Any) -> dict[str, Any]:
    return {"UUID": UUID, "State": state, "BatchSize": 50, **more}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            described("Enabled", ScalingConfig={"MaximumConcurrency": 7}),
            Consumer(7, enabled=True, slots=50),
        ),
        (
            described("Disabled", ScalingConfig={"MaximumConcurrency": 2}),
            Consumer(2, enabled=False, slots=50),
        ),
        (described("Enabled"), Consumer(None, enabled=True, slots=50)),
        (described("Updating"), Consumer(None, enabled=True, slots=50, is_applied=False)),
        (described("Enabling"), Consumer(None, enabled=True, slots=50, is_applied=False)),
        (described("Disabling"), Consumer(None, enabled=False, slots=50, is_applied=False)),
    ],
)
def test_the_mapping_as_lambda_describes_it(
    client: Any, stub: Stubber, answer: dict[str, Any], expected: Consumer
) -> None:
    stub.add_response("get_event_source_mapping", answer, {"UUID": UUID})

    assert expected == mapping_of(client).state()


def test_where_a_message_is_many_calls_a_worker_has_as_many_slots(
    client: Any, stub: Stubber
) -> None:
    stub.add_response("get_event_source_mapping", described("Enabled") | {"BatchSize": 1})
    ranges = LambdaQueueMapping(client, UUID, "it", slots_per_message=64, busy=UNREFILLED)

    assert Consumer(None, enabled=True, slots=64, busy=UNREFILLED) == ranges.state()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_change_names_both_number_and_switch(
    client: Any, stub: Stubber, *, enabled: bool
) -> None:
    expected = {
        "UUID": UUID,
        "Enabled": enabled,
        "ScalingConfig": {"MaximumConcurrency": 5},
    }
    stub.add_response("update_event_source_mapping", described("Updating"), expected)

    assert mapping_of(client).set(5, enabled=enabled)


@pytest.mark.parametrize("code", ["ResourceInUseException", "ResourceConflictException"])
def test_a_mapping_that_is_being_changed_is_tried_next_time(
    client: Any, stub: Stubber, code: str
) -> None:
    stub.add_client_error("update_event_source_mapping", code, http_status_code=400)

    assert not mapping_of(client).set(5, enabled=True)


def test_a_throttled_call_is_busy(client: Any, stub: Stubber) -> None:
    for _ in range(4):
        stub.add_client_error("update_event_source_mapping", "TooManyRequestsException")

    with pytest.raises(StoreBusy, match="the worker's mapping"):
        mapping_of(client).set(5, enabled=True)


def test_what_the_role_may_not_do_is_an_error_and_no_next_time(client: Any, stub: Stubber) -> None:
    stub.add_client_error("update_event_source_mapping", "AccessDeniedException")

    with pytest.raises(ClientError):
        mapping_of(client).set(5, enabled=True)


# The account's limit ---------------------------------------------------------------------------------------


def answer_of(executions: int, unreserved: int | None = None) -> dict[str, Any]:
    left = executions if unreserved is None else unreserved
    return {
        "AccountLimit": {
            "ConcurrentExecutions": executions,
            "UnreservedConcurrentExecutions": left,
        }
    }


@pytest.mark.parametrize(
    ("answer", "at_most", "expected"),
    [
        (answer_of(1_000), None, 1_000),
        (answer_of(10), None, 10),
        # What is reserved for other functions is not ours.
        (answer_of(1_000, unreserved=900), None, 900),
        (answer_of(1_000), 50, 50),
        (answer_of(10), 50, 10),
    ],
)
def test_the_account_allows_what_is_not_reserved_and_the_parameter_may_lower_it(
    client: Any, stub: Stubber, answer: dict[str, Any], at_most: int | None, expected: int
) -> None:
    stub.add_response("get_account_settings", answer, {})

    assert expected == LambdaExecutions(client, FrozenClock(), at_most).at_once()


def test_the_limit_is_read_every_five_minutes(client: Any, stub: Stubber) -> None:
    clock = FrozenClock()
    executions = LambdaExecutions(client, clock, None)
    for number in (10, 1_000):
        stub.add_response("get_account_settings", answer_of(number), {})

    read = [executions.at_once()]
    clock.at += LIMIT_AGE_MS - 1
    read.append(executions.at_once())
    clock.at += 1
    read.append(executions.at_once())

    assert [10, 10, 1_000] == read


def test_a_limit_that_cannot_be_read_is_the_last_one_read(client: Any, stub: Stubber) -> None:
    clock = FrozenClock()
    executions = LambdaExecutions(client, clock, None)
    stub.add_response("get_account_settings", answer_of(10), {})
    stub.add_client_error("get_account_settings", "AccessDeniedException")

    first = executions.at_once()
    clock.at += LIMIT_AGE_MS

    assert (10, 10) == (first, executions.at_once())


def test_a_limit_that_was_never_read_is_what_the_parameter_says(client: Any, stub: Stubber) -> None:
    for _ in range(2):
        stub.add_client_error("get_account_settings", "AccessDeniedException")

    assert 50 == LambdaExecutions(client, FrozenClock(), 50).at_once()
    with pytest.raises(ClientError):
        LambdaExecutions(client, FrozenClock(), None).at_once()


# The queue's depth -----------------------------------------------------------------------------------------


def test_the_backlog_distinguishes_waiting_messages_from_those_with_a_worker(cloud: Aws) -> None:
    queue = SqsQueue(cloud.sqs, cloud.jobs_queue, {})
    queue.send([Pointer(f"job_{number}", "acme", "claude-a") for number in range(5)])
    cloud.sqs.send_message(QueueUrl=cloud.jobs_queue, MessageBody="{}", DelaySeconds=60)
    cloud.sqs.receive_message(QueueUrl=cloud.jobs_queue, MaxNumberOfMessages=2)

    assert Backlog(visible=3, in_flight=2, delayed=1) == queue.backlog()
    assert 6 == queue.depth()


def test_the_ranges_have_a_backlog_of_their_own(cloud: Aws) -> None:
    cloud.sqs.send_message(QueueUrl=cloud.batches_queue, MessageBody="{}")
    before = depth_of(cloud.sqs, cloud.ranges_queue, "it")
    cloud.sqs.send_message(QueueUrl=cloud.ranges_queue, MessageBody="{}")

    assert (Backlog(), Backlog(visible=1)) == (
        before,
        depth_of(cloud.sqs, cloud.ranges_queue, "it"),
    )


# The function ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """The context of an invocation."""

    function_name: str = "sluice-governor"
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:123456789012:function:sluice"
    aws_request_id: str = "11111111-2222-3333-4444-555555555555"

    def get_remaining_time_in_millis(self) -> int:
        return 60_000


@pytest.fixture
def environment(cloud: Aws, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the template sets for every function, but nothing of the governor's own."""

    def start_again() -> None:
        forget_what_is_wired()

    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    start_again()
    shared.telemetry()
    for handler in logging.getLogger(STACK).handlers:
        # Powertools keeps the first stdout for good, and pytest has closed that one.
        if isinstance(handler, logging.StreamHandler):
            monkeypatch.setattr(handler, "stream", io.StringIO())
    yield
    start_again()


@pytest.mark.usefixtures("environment")
def test_parked_jobs_do_not_wait_for_a_governor_that_fails(cloud: Aws) -> None:
    DynamoJobs(cloud.dynamodb, "JobsTable", retention_days=30).add(a_job(not_before=NOON))

    with pytest.raises(SettingsError, match="SLUICE_MAPPINGS"):
        app.handler(json.loads(EVENT.read_text()), Context())  # type: ignore[arg-type]

    (message,) = cloud.sqs.receive_message(QueueUrl=cloud.jobs_queue)["Messages"]
    assert {"v": 1, "job_id": "job_1"} == json.loads(message["Body"])


# The secret's age ------------------------------------------------------------------------------------------


def test_a_written_pool_shows_when(cloud: Aws) -> None:
    clock = FrozenClock()
    history = SecretHistory(cloud.secrets, "KeyPoolSecret", clock)
    before = history.changed_at()

    cloud.set_key_pool({"id": "main", "api_key": "sk-ant-test-1"})
    clock.at += POOL_AGE_MS
    after = history.changed_at()

    now = datetime.now(UTC).timestamp() * 1000
    assert now - 60_000 < before <= after <= now


def test_it_is_looked_up_every_five_minutes(cloud: Aws) -> None:  # noqa: ARG001 - its credentials
    client = aws.secrets_manager()
    clock = FrozenClock()
    history = SecretHistory(client, "KeyPoolSecret", clock)
    with Stubber(client) as stub:
        for at in (1_700_000_000, 1_700_000_500):
            stub.add_response(
                "describe_secret",
                {"LastChangedDate": datetime.fromtimestamp(at, UTC)},
                {"SecretId": "KeyPoolSecret"},
            )
        reported = [history.changed_at()]
        clock.at += POOL_AGE_MS - 1
        reported.append(history.changed_at())
        clock.at += 1
        reported.append(history.changed_at())

    assert [1_700_000_000_000, 1_700_000_000_000, 1_700_000_500_000] == reported


# On the local stack ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready() -> Iterator[Ready]:
    with LocalStack(concurrency=CEILING).running() as running:
        yield running


def now() -> int:
    return time.time_ns() // 1_000_000


def govern(ready: Ready) -> None:
    """Wake the function as the schedule does."""
    answer = ready.client("lambda").invoke(
        FunctionName=ready.resources["GovernorFunction"], Payload=EVENT.read_bytes()
    )

    assert "FunctionError" not in answer, answer["Payload"].read()


def mapping(ready: Ready, name: str = "WorkerMapping") -> tuple[Any, str]:
    """A mapping's concurrency, as it is and not as boto3 reads it, and its state."""
    mappings = mappings_as_sent(ready.client("lambda"))
    (found,) = [each for each in mappings if each["UUID"] == ready.resources[name]]
    return found["ScalingConfig"]["MaximumConcurrency"], found["State"]


def limits(ready: Ready) -> DynamoLimits:
    return DynamoLimits(ready.client("dynamodb"), ready.resources["LimitsTable"])


def know(ready: Ready, **facts: Any) -> None:
    """Store a busy limit group as if it had been learned."""
    store = limits(ready)
    stored = {group.id: group for group in store.groups()}
    seen = {**ROOMY, "requests": Seen(facts.pop("rpm"), 10)}
    group: Group = replace(
        known_group("governed", "some", seen, at=NOON), last_start=now(), **facts
    )
    version = stored[group.id].version if group.id in stored else 0
    store.replace(replace(group, version=version + 1), version)


def lines(ready: Ready, phrase: str) -> list[dict[str, Any]]:
    """The governor's log lines with one phrase."""
    configuration = ready.client("lambda").get_function_configuration(
        FunctionName=ready.resources["GovernorFunction"]
    )
    events = ready.client("logs").filter_log_events(
        logGroupName=configuration["LoggingConfig"]["LogGroup"]
    )["events"]
    logged = [json.loads(each["message"]) for each in events if each["message"].startswith("{")]
    return [line for line in logged if line.get("message") == phrase]


def eventually(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WITHIN_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {WITHIN_SECONDS:.0f} s")
        time.sleep(0.1)
    return found


def canary_passes(ready: Ready, canary: str) -> bool:
    """Return whether the worker gets what is on the queue."""
    ready.client("sqs").send_message(
        QueueUrl=ready.resources["JobsQueue"], MessageBody=json.dumps({"v": 1, "canary": canary})
    )
    key = {"id": {"S": f"canary#{canary}"}}
    table = ready.resources["LimitsTable"]
    found = eventually(
        lambda: ready.client("dynamodb").get_item(TableName=table, Key=key).get("Item")
    )
    return found is not None


def test_the_schedule_is_there_and_fires_every_minute(ready: Ready) -> None:
    """That it fires is the emulator's word; here, that it would wake the governor."""
    (found,) = ready.client("scheduler").list_schedules()["Schedules"]
    schedule = ready.client("scheduler").get_schedule(Name=found["Name"])

    assert ("rate(1 minute)", "ENABLED") == (schedule["ScheduleExpression"], schedule["State"])
    assert schedule["Target"]["Arn"].endswith(f":{ready.resources['GovernorFunction']}")


def test_the_governor_lowers_and_raises_the_mapping_and_says_why(ready: Ready) -> None:
    govern(ready)
    unknown = mapping(ready)
    know(ready, rpm=600, call_ms=7_500)
    govern(ready)
    lowered = mapping(ready)
    know(ready, rpm=4_000, call_ms=10_000)
    govern(ready)
    raised = mapping(ready)

    assert [(CEILING, "Enabled"), (4, "Enabled"), (CEILING, "Enabled")] == [
        unknown,
        lowered,
        raised,
    ]
    assert type(lowered[0]) is type(raised[0]) is int
    # A concurrency as text would stop the emulator's poller for all queues.
    assert canary_passes(ready, "raised")
    changes = eventually(lambda: lines(ready, "concurrency changed"))
    assert "jobs" == changes[0]["mapping"]
    assert (CEILING, 4) == (changes[0]["from"], changes[0]["to"])
    assert "75 calls in flight" in changes[0]["reason"]
    assert 600 == changes[0]["groups"]["governed/some"]["starts_per_minute"]


def test_an_outage_turns_both_down_and_its_end_up(ready: Ready) -> None:
    """Not off: the local stack has just written its key pool, which may hold keys that are not known yet."""
    know(ready, rpm=4_000, call_ms=10_000, blocked_until=now() + HOUR_MS)
    govern(ready)
    down, ranges_down = mapping(ready), mapping(ready, "RangesMapping")
    know(ready, rpm=4_000, call_ms=10_000)
    govern(ready)

    assert [(2, "Enabled"), (CEILING, "Enabled")] == [down, mapping(ready)]
    ranges_up = mapping(ready, "RangesMapping")
    assert [(2, "Enabled"), (4, "Enabled")] == [ranges_down, ranges_up]
    assert type(ranges_up[0]) is int


def test_what_the_governor_switched_off_goes_on_and_what_a_person_did_stays(ready: Ready) -> None:
    know(ready, rpm=600, call_ms=7_500)
    uuid = ready.resources["WorkerMapping"]
    notes = DynamoGovernorNotes(
        ready.client("dynamodb"), ready.resources["LimitsTable"], JOBS_NOTES_ID
    )
    ready.client("lambda").update_event_source_mapping(UUID=uuid, Enabled=False)
    govern(ready)
    by_hand = mapping(ready)[1]
    notes.write(Note(turned_off_at=now()))
    govern(ready)

    assert ("Disabled", (4, "Enabled")) == (by_hand, mapping(ready))
    assert notes.read().turned_off_at is None
    assert canary_passes(ready, "on")


OTHERS: Final = {
    "batches": "BatchesMapping",
    "webhooks": "WebhooksMapping",
    "dead letters": "DeadLettersMapping",
    "range dead letters": "RangeDeadLettersMapping",
}
"""The mappings that do not depend on Claude's limits, by what their queues hold."""


def test_with_room_again_what_it_disabled_is_enabled_with_its_ceiling(ready: Ready) -> None:
    for name, logical_id in OTHERS.items():
        notes = DynamoGovernorNotes(
            ready.client("dynamodb"), ready.resources["LimitsTable"], notes_id(name)
        )
        notes.write(Note(turned_off_at=now()))
        ready.client("lambda").update_event_source_mapping(
            UUID=ready.resources[logical_id],
            Enabled=False,
            ScalingConfig={"MaximumConcurrency": 2},
        )

    govern(ready)

    assert {name: (CEILINGS[name], "Enabled") for name in OTHERS} == {
        name: mapping(ready, logical_id) for name, logical_id in OTHERS.items()
    }


def test_setup_wakes_the_governor(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no client key exists before the concurrencies are set."""
    for name, value in ready.credentials.as_environment().items():
        monkeypatch.setenv(name, value)
    know(ready, rpm=4_000, call_ms=10_000)
    govern(ready)
    before = mapping(ready)[0]
    know(ready, rpm=600, call_ms=7_500)

    Stack("sluice-local", REGION, ready.endpoint_url).wake_governor()

    assert (CEILING, 4) == (before, mapping(ready)[0])


def test_parked_jobs_are_sent_by_the_sweep_and_run(ready: Ready) -> None:
    store = DynamoJobs(ready.client("dynamodb"), ready.resources["JobsTable"], retention_days=30)
    with nobody_running(ready):
        ids = [submitted_and_parked(ready, store, number) for number in range(5)]
    late, early = ids[3], ids[4]
    put(store, late, deadline=now())
    put(store, early, not_before=now() + HOUR_MS)

    govern(ready)

    def state(job_id: str) -> State:
        job = store.get(job_id)
        assert job is not None
        return job.state

    eventually(lambda: {State.SUCCEEDED} == {state(each) for each in ids[:3]})
    assert (State.EXPIRED, State.QUEUED) == (state(late), state(early))
    assert [] == list(store.due(DueFor.CALL, now(), 100))
    (swept,) = eventually(lambda: lines(ready, "due jobs swept"))
    assert (4, 3, 1, 0) == tuple(swept[each] for each in ("due", "sent", "expired", "left"))


@contextmanager
def nobody_running(ready: Ready) -> Iterator[None]:
    """Nobody takes messages meanwhile: neither the mapping nor a worker that is still running, on a canary say."""
    switch = partial(
        ready.client("lambda").update_event_source_mapping, UUID=ready.resources["WorkerMapping"]
    )
    switch(Enabled=False)
    time.sleep(LOOK_SECONDS + 1)
    yield
    switch(Enabled=True)


def submitted_and_parked(ready: Ready, store: DynamoJobs, number: int) -> str:
    """Submit a job, take its message away, and leave it parked."""
    sqs, queue = ready.client("sqs"), ready.resources["JobsQueue"]
    status, job = call(
        "POST",
        f"{ready.api_url}/jobs",
        {
            "custom_id": f"parked-{number}",
            "params": {
                "model": "claude-haiku-5-5",
                "max_tokens": 20,
                "messages": [{"role": "user", "content": "Say hello."}],
            },
        },
        {"x-api-key": ready.client_key},
    )
    assert 202 == status
    (message,) = eventually(lambda: sqs.receive_message(QueueUrl=queue).get("Messages"))
    sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
    put(store, job["id"], not_before=now() - 1)
    return str(job["id"])


def put(store: DynamoJobs, job_id: str, **facts: Any) -> None:
    """Change a waiting job's record."""
    job = store.get(job_id)
    assert job is not None
    store.replace(replace(job, version=job.version + 1, **facts), job.version)
