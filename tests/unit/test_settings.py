"""The environment, read once, complained about by name."""

import pytest

from sluice.domain.waits import USUAL, Waits
from sluice.settings import Settings, SettingsError

COMPLETE = {
    "SLUICE_JOBS_TABLE": "jobs",
    "SLUICE_PARAMS_TABLE": "params",
    "SLUICE_LIMITS_TABLE": "limits",
    "SLUICE_LEDGER_TABLE": "ledger",
    "SLUICE_USAGE_TABLE": "usage",
    "SLUICE_CLIENT_KEYS_TABLE": "client-keys",
    "SLUICE_BATCHES_TABLE": "batches",
    "SLUICE_DATA_BUCKET": "bucket",
    "SLUICE_JOBS_QUEUE_URL": "https://queue/jobs",
    "SLUICE_DEAD_LETTERS_QUEUE_URL": "https://queue/dead-letters",
    "SLUICE_RANGES_QUEUE_URL": "https://queue/ranges",
    "SLUICE_RANGE_DEAD_LETTERS_QUEUE_URL": "https://queue/range-dead-letters",
    "SLUICE_BATCHES_QUEUE_URL": "https://queue/batches",
    "SLUICE_WEBHOOKS_QUEUE_URL": "https://queue/webhooks",
    "SLUICE_PUBLIC_URL": "https://sluice.example",
    "SLUICE_KEY_POOL_SECRET": "key-pool",
    "SLUICE_PEPPER_SECRET": "pepper",
    "SLUICE_WEBHOOK_SECRET": "webhooks",
    "SLUICE_RETENTION_DAYS": "30",
    "SLUICE_MAX_ATTEMPTS": "5",
    "SLUICE_CLIENT_REQUESTS_PER_SECOND": "10",
    "SLUICE_GATHER_SECONDS": "300",
    "SLUICE_DEFAULT_LANE": "auto",
}


def test_a_complete_environment_becomes_one_frozen_object() -> None:
    settings = Settings.from_environment(COMPLETE)

    assert ("jobs", "https://queue/jobs", "pepper") == (
        settings.jobs_table,
        settings.jobs_queue_url,
        settings.pepper_secret,
    )
    assert (30, 5) == (settings.retention_days, settings.max_attempts)
    with pytest.raises(AttributeError):
        settings.retention_days = 31  # type: ignore[misc]


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_a_missing_setting_is_named(name: str, value: str | None) -> None:
    environment = {key: text for key, text in COMPLETE.items() if key != name}
    if value is not None:
        environment[name] = value

    with pytest.raises(SettingsError, match=f"{name} is not set"):
        Settings.from_environment(environment)


@pytest.mark.parametrize(
    "name",
    ["SLUICE_RETENTION_DAYS", "SLUICE_MAX_ATTEMPTS", "SLUICE_CLIENT_REQUESTS_PER_SECOND"],
)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_a_number_must_be_a_whole_one_from_one_up(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be an integer of at least 1, got '"):
        Settings.from_environment(COMPLETE | {name: value})


@pytest.mark.parametrize("lane", ["live", "batch", "auto"])
def test_the_default_lane_is_one_of_three(lane: str) -> None:
    assert lane == Settings.from_environment(COMPLETE | {"SLUICE_DEFAULT_LANE": lane}).default_lane


@pytest.mark.parametrize("lane", ["Batch", " live", "cheap", "live,batch"])
def test_any_other_default_lane_is_refused_with_its_value(lane: str) -> None:
    expected = f"SLUICE_DEFAULT_LANE must be one of live, batch, auto, got '{lane}'"

    with pytest.raises(SettingsError, match=expected):
        Settings.from_environment(COMPLETE | {"SLUICE_DEFAULT_LANE": lane})


def test_webhooks_may_go_into_no_private_network_unless_one_is_named() -> None:
    named = COMPLETE | {"SLUICE_WEBHOOK_NETWORKS": "10.0.0.0/8, fd00::/8"}

    assert () == Settings.from_environment(COMPLETE).webhook_networks
    assert 2 == len(Settings.from_environment(named).webhook_networks)
    with pytest.raises(SettingsError, match="SLUICE_WEBHOOK_NETWORKS must be networks such as"):
        Settings.from_environment(named | {"SLUICE_WEBHOOK_NETWORKS": "home"})


def test_waits_are_the_usual_ones_unless_a_run_shortens_some() -> None:
    shortened = Settings.from_environment(COMPLETE | {"SLUICE_WAITS": '{"hold_ms": 7}'})

    assert USUAL == Settings.from_environment(COMPLETE).waits
    assert USUAL == Settings.from_environment(COMPLETE | {"SLUICE_WAITS": ""}).waits
    assert Waits(hold_ms=7) == shortened.waits


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("soon", "Expecting value"),
        ("[]", "not a JSON object"),
        ('{"patience_ms": 1}', "no wait is called 'patience_ms'; there are hold_ms, linger_ms,"),
        ('{"rest_ms": 10001}', "rest_ms must be milliseconds from 0 to 10000, got 10001"),
        ('{"rest_ms": -1}', "rest_ms must be milliseconds from 0 to 10000, got -1"),
        ('{"rest_ms": 1.5}', "rest_ms must be milliseconds from 0 to 10000, got 1.5"),
        ('{"rest_ms": true}', "rest_ms must be milliseconds from 0 to 10000, got True"),
    ],
)
def test_waits_that_are_none_are_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"SLUICE_WAITS must be waits such as .*: {reason}"):
        Settings.from_environment(COMPLETE | {"SLUICE_WAITS": text})


def test_without_an_argument_the_process_environment_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)

    assert Settings.from_environment(COMPLETE) == Settings.from_environment()
