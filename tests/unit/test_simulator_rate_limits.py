"""What the simulator's Rate Limits API says, without HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.claude_simulator import rate_limits
from scripts.claude_simulator.checks import RequestError
from scripts.claude_simulator.settings import (
    Organization,
    Settings,
    SettingsError,
    catalogue,
    read,
)

OLD, NEW = "2023-06-01", "2026-10-21"
LIMITS = {"default": {"rpm": 50, "itpm": 30_000, "otpm": 8000}, "opus-5": {"otpm": None}}


def organisation(**more: Any) -> Organization:
    found = {"limits": LIMITS, "admin_keys": ["sk-ant-admin-test-one"], **more}
    return read({"organisations": [found]}).organisations[0]


def listed(version: str = NEW, organisation: Organization | None = None, **query: str) -> Any:
    return rate_limits.of_organization(
        organisation or Organization.model_validate({"limits": LIMITS}),
        catalogue(Settings()),
        version,
        query,
    )


def of_workspace(version: str = NEW, workspace: str = "wrkspc_two", **query: str) -> Any:
    workspaces = {"wrkspc_two": {"limits": {"opus-5": {"rpm": 7, "otpm": 900}}}}
    found = organisation(workspaces=workspaces)
    return rate_limits.of_workspace(found, workspace, catalogue(Settings()), version, query)


def test_a_group_has_every_name_of_its_models_and_its_limits() -> None:
    entry = listed(model="claude-opus-4-6")["data"][0]

    assert entry["type"] == "rate_limit"
    assert entry["group"]["type"] == "model_group"
    assert entry["group"]["display_name"] == "Claude Opus 4.x"
    assert entry["models"] == [
        "claude-opus-4-5",
        "claude-opus-4-5-20251101",
        "claude-opus-4-6",
        "claude-opus-4-7",
        "claude-opus-4-8",
    ]
    assert entry["limits"] == [
        {"type": "requests_per_minute", "value": 50},
        {"type": "input_tokens_per_minute_cache_aware", "value": 30_000},
        {"type": "output_tokens_per_minute", "value": 8000},
    ]


def test_the_old_version_names_the_type_of_a_group_and_no_ids() -> None:
    new, old = (listed(version, model="claude-haiku-4-5")["data"][0] for version in (NEW, OLD))

    assert set(new) == {"type", "id", "group", "models", "limits"}
    assert set(old) == {"type", "group_type", "models", "limits"}
    assert (old["group_type"], old["limits"]) == ("model_group", new["limits"])


def test_a_missing_limit_is_not_listed() -> None:
    kinds = [limit["type"] for limit in listed(model="claude-opus-5")["data"][0]["limits"]]

    assert kinds == ["requests_per_minute", "input_tokens_per_minute_cache_aware"]


def test_a_group_is_the_same_everywhere_and_its_entry_is_not() -> None:
    one, two = (listed(organisation=organisation(id=name))["data"][0] for name in "ab")

    assert one["group"]["id"] == two["group"]["id"]
    assert one["id"] != two["id"]


def test_batches_and_counting_are_groups_without_models() -> None:
    found = {group: listed(group_type=group)["data"] for group in ("batch", "token_count", "files")}

    assert found["batch"][0]["models"] is None
    assert "display_name" not in found["batch"][0]["group"]
    assert found["batch"][0]["limits"] == [
        {"type": "requests_per_minute", "value": 1000},
        {"type": "enqueued_batch_requests", "value": 200_000},
    ]
    assert found["token_count"][0]["limits"] == [{"type": "requests_per_minute", "value": 2000}]
    assert found["files"] == []


def test_a_workspace_lists_what_it_overrides_and_on_demand_what_it_inherits() -> None:
    own = of_workspace()["data"]
    everything = of_workspace(include_inherited="true")["data"]
    opus = next(entry for entry in everything if entry["group"]["display_name"] == "Claude Opus 5")

    assert [entry["models"] for entry in own] == [["claude-opus-5"]]
    assert own[0]["workspace_id"] == "wrkspc_two"
    assert own[0]["limits"] == [
        {
            "type": "requests_per_minute",
            "value": 7,
            "org_limit": 1000,
            "source": {"type": "workspace"},
        },
        {
            "type": "output_tokens_per_minute",
            "value": 900,
            "org_limit": None,
            "source": {"type": "workspace"},
        },
    ]
    assert len(everything) == len(listed()["data"])
    inherited = next(limit for limit in opus["limits"] if limit["type"].startswith("input"))
    assert inherited["value"] == inherited["org_limit"] == 2_000_000
    assert inherited["source"] == {"type": "organization"}
    assert opus["rate_limit_id"] in {entry["id"] for entry in listed()["data"]}


def test_the_old_version_of_a_workspace_names_no_source() -> None:
    entry = of_workspace(OLD)["data"][0]

    assert set(entry) == {"type", "group_type", "models", "limits"}
    assert entry["limits"][0] == {"type": "requests_per_minute", "value": 7, "org_limit": 1000}


def test_the_default_workspace_overrides_nothing() -> None:
    assert of_workspace(workspace="wrkspc_default")["data"] == []


def test_pages_end_with_no_next_page() -> None:
    seen, page = [], listed(limit="4")
    seen += page["data"]
    while page["next_page"] is not None:
        page = listed(limit="4", page=page["next_page"])
        seen += page["data"]

    assert seen == listed()["data"]
    assert listed()["next_page"] is None


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"model": "claude-none"}, 404),
        ({"group_type": "weather"}, 400),
        ({"limit": "0"}, 400),
        ({"limit": "1001"}, 400),
        ({"page": "somewhere"}, 400),
    ],
)
def test_a_question_the_api_would_refuse_is_refused(query: dict[str, str], status: int) -> None:
    with pytest.raises(RequestError) as caught:
        listed(NEW, None, **query)

    assert caught.value.failure.status == status


@pytest.mark.parametrize(
    ("workspace", "query", "status"),
    [
        ("wrkspc_none", {}, 404),
        ("wrkspc_two", {"model": "claude-opus-5"}, 400),  # only the organization's list has it
        ("wrkspc_two", {"include_inherited": "perhaps"}, 400),
    ],
)
def test_a_question_about_a_workspace_may_be_refused(
    workspace: str, query: dict[str, str], status: int
) -> None:
    with pytest.raises(RequestError) as caught:
        of_workspace(workspace=workspace, **query)

    assert caught.value.failure.status == status


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"admin_keys": ["sk-ant-test-two"]}, "admin_keys"),
        ({"workspaces": {"wrkspc_default": {}}}, "wrkspc_default is the default workspace"),
        ({"workspaces": {"wrkspc_two": {"keys": ["sk-ant-test-one"]}}}, "duplicate key"),
    ],
)
def test_a_wrong_workspace_or_admin_key_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        organisation(**changes)
