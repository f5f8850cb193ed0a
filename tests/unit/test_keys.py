"""The key pool: what may stand in the secret, which key serves whom, and when it is out of the rotation."""

from typing import Any

import pytest

from sluice.domain.errors import KeyPoolBroken
from sluice.domain.keys import (
    DEFAULT_BASE_URL,
    AdminKey,
    KeyMark,
    organization_of,
    parse_admin_keys,
    parse_key_pool,
    parse_model_groups,
    shared_organizations,
    stated_limits,
)
from tests.fakes import upstream_key

SECRET = "sk-ant-test-secret"

MAIN = upstream_key().fingerprint


def pool(*rows: Any) -> dict[str, Any]:
    return {"keys": list(rows)}


def test_a_key_needs_only_its_text() -> None:
    (key,) = parse_key_pool(pool({"api_key": f" {SECRET}\n"}))

    assert ("key-1", SECRET, DEFAULT_BASE_URL, 1) == (
        key.id,
        key.api_key,
        key.base_url,
        key.weight,
    )
    assert (None, None, None) == (key.organization, key.models, key.tenants)


def test_a_key_may_say_everything() -> None:
    (key,) = parse_key_pool(
        pool(
            {
                "id": "main",
                "api_key": SECRET,
                "organization": "org-1",
                "base_url": "http://127.0.0.1:8089/",
                "models": ["claude-a"],
                "tenants": ["acme"],
                "weight": 3,
                "limits": {"requests": 600, "output_tokens": 60_000},
            }
        )
    )

    assert "http://127.0.0.1:8089" == key.base_url
    assert ("main", "org-1", 3) == (key.id, key.organization, key.weight)
    assert {"requests": 600, "output_tokens": 60_000} == key.limits
    assert (frozenset({"claude-a"}), frozenset({"acme"})) == (key.models, key.tenants)


def test_nulls_mean_nothing_stated() -> None:
    row = {"id": None, "api_key": SECRET, "base_url": None, "models": None, "weight": None}

    (key,) = parse_key_pool(pool(row))

    assert ("key-1", DEFAULT_BASE_URL, None, 1) == (key.id, key.base_url, key.models, key.weight)


def test_an_empty_pool_is_a_pool() -> None:
    assert () == parse_key_pool(pool())


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([], "the key pool must be"),
        ("text", "the key pool must be"),
        ({}, "the key pool must be"),
        ({"keys": {}}, "the key pool must be"),
        (pool("text"), "key 1 of the pool is not a JSON object"),
        (pool({"api_key": SECRET}, 7), "key 2 of the pool is not a JSON object"),
        (pool({"api_key": SECRET, "wieght": 2, "a": 1}), "unknown fields: a, wieght"),
        (pool({"id": "main"}), "has no api_key"),
        (pool({"api_key": ""}), "has no api_key"),
        (pool({"api_key": "  "}), "has no api_key"),
        (pool({"api_key": 7}), "has no api_key"),
        (pool({"api_key": "sk-ant-test-ü"}), "an api_key that is not ASCII text"),
        (pool({"api_key": SECRET, "id": 7}), "id must be a non-empty string, got 7"),
        (pool({"api_key": SECRET, "id": ""}), "id must be a non-empty string"),
        (pool({"api_key": SECRET, "organization": []}), "organization must be a non-empty string"),
        (pool({"api_key": SECRET, "base_url": "ftp://x"}), "base_url must start with https://"),
        (
            pool({"api_key": SECRET, "models": "claude-a"}),
            "models must be a non-empty list of strings",
        ),
        (pool({"api_key": SECRET, "models": []}), "models must be a non-empty list of strings"),
        (pool({"api_key": SECRET, "tenants": [7]}), "tenants must be a non-empty list of strings"),
        (pool({"api_key": SECRET, "weight": 0.5}), "weight must be an integer of at least 1"),
        (pool({"api_key": SECRET, "weight": -1}), "weight must be an integer of at least 1"),
        (pool({"api_key": SECRET, "weight": "2"}), "weight must be an integer of at least 1"),
        (pool({"api_key": SECRET, "limits": [600]}), "limits supports requests, input_tokens"),
        (pool({"api_key": SECRET, "limits": {"rpm": 600}}), "limits supports requests"),
        (
            pool({"api_key": SECRET, "limits": {"requests": 0}}),
            "limits.requests must be an integer",
        ),
        (pool({"api_key": SECRET, "limits": {"requests": True}}), "limits.requests must be"),
        (pool({"api_key": SECRET, "limits": {"requests": "9"}}), "limits.requests must be"),
        (
            pool({"api_key": SECRET, "id": "a"}, {"api_key": SECRET, "id": "a"}),
            "duplicate key id 'a' in the pool",
        ),
    ],
)
def test_a_broken_pool_is_named_without_its_keys(document: object, complaint: str) -> None:
    with pytest.raises(KeyPoolBroken, match=complaint) as broken:
        parse_key_pool(document)
    assert SECRET not in str(broken.value)


# Admin keys and model groups -------------------------------------------------------------------------------


def test_an_admin_key_names_its_organization() -> None:
    rows = [
        {"organization": "org-1", "api_key": f" {SECRET} "},
        {"organization": "org-2", "api_key": SECRET, "base_url": "http://127.0.0.1:1/"},
    ]

    assert (
        AdminKey("org-1", SECRET),
        AdminKey("org-2", SECRET, "http://127.0.0.1:1"),
    ) == parse_admin_keys({"keys": [], "admin_keys": rows})
    assert SECRET not in repr(AdminKey("org-1", SECRET))


@pytest.mark.parametrize("document", [pool(), [], None])
def test_admin_keys_and_model_groups_are_optional(document: object) -> None:
    assert ((), {}) == (parse_admin_keys(document), parse_model_groups(document))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({"org": SECRET}, "admin_keys of the pool must be"),
        ([SECRET], "admin key 1 of the pool is not a JSON object"),
        ([{"api_key": SECRET}], "admin key 1 of the pool has no organization"),
        ([{"organization": "org"}], "admin key 1 of the pool has no api_key"),
        (
            [{"organization": "org", "api_key": SECRET, "weight": 2}],
            "admin key 1 of the pool has unknown fields: weight",
        ),
        (
            [{"organization": "org", "api_key": SECRET, "base_url": "ftp://x"}],
            "base_url must start with https://",
        ),
    ],
)
def test_a_broken_admin_key_is_named_without_its_text(rows: object, complaint: str) -> None:
    with pytest.raises(KeyPoolBroken, match=complaint) as broken:
        parse_admin_keys({"admin_keys": rows})
    assert SECRET not in str(broken.value)


def test_the_pool_may_say_which_models_share_limits() -> None:
    groups = {"claude-x-20260101": "shared", "claude-y": "shared"}

    assert {"claude-x": "shared", "claude-y": "shared"} == parse_model_groups(
        {"model_groups": groups}
    )


@pytest.mark.parametrize("groups", [[], "a", {"claude-x": ""}, {"": "a"}, {"claude-x": 1}])
def test_broken_model_groups_are_complained_about(groups: object) -> None:
    with pytest.raises(KeyPoolBroken, match="model_groups of the pool must be"):
        parse_model_groups({"model_groups": groups})


def test_of_several_statements_about_an_organization_the_lowest_holds() -> None:
    keys = [
        upstream_key("a", limits={"requests": 100, "input_tokens": 5_000}),
        upstream_key("b", limits={"requests": 60}),
        upstream_key("c", organization="other", limits={"requests": 10}),
        upstream_key("d", organization=None, limits={"requests": 7}),
    ]
    marks = {"d": KeyMark("d", organization="org", learned_with=keys[3].fingerprint)}

    assert {
        "org": {"requests": 7, "input_tokens": 5_000},
        "other": {"requests": 10},
    } == stated_limits(keys, marks)


def test_a_key_never_shows_its_text() -> None:
    key = upstream_key(api_key=SECRET)

    assert SECRET not in repr(key)
    assert SECRET not in key.fingerprint


# Who may use it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "model", "allowed"),
    [
        ({}, "claude-a", True),
        ({"tenants": frozenset({"acme"})}, "claude-a", True),
        ({"tenants": frozenset({"zenith"})}, "claude-a", False),
        ({"models": frozenset({"claude-a"})}, "claude-a", True),
        ({"models": frozenset({"claude-a"})}, "claude-b", False),
        # A name without date allows all releases; a dated one only itself.
        ({"models": frozenset({"claude-a"})}, "claude-a-20260101", True),
        ({"models": frozenset({"claude-a-20260101"})}, "claude-a-20260101", True),
        ({"models": frozenset({"claude-a-20260101"})}, "claude-a", False),
        # Both must hold.
        ({"tenants": frozenset({"acme"}), "models": frozenset({"claude-a"})}, "claude-b", False),
    ],
)
def test_the_pool_says_who_may_use_a_key_for_what(
    facts: dict[str, Any], model: str, *, allowed: bool
) -> None:
    assert allowed == upstream_key(**facts).allows("acme", model)


# Rejected --------------------------------------------------------------------------------------------------


def test_a_rejected_key_is_out() -> None:
    key = upstream_key()

    assert KeyMark("main", rejected=key.fingerprint).rejects(key)


def test_a_new_key_under_the_same_id_is_tried_again() -> None:
    old = upstream_key(api_key="sk-ant-test-old")
    mark = KeyMark("main", rejected=old.fingerprint)

    assert not mark.rejects(upstream_key(api_key="sk-ant-test-new"))


def test_a_key_that_upstream_has_not_rejected_is_used() -> None:
    assert not KeyMark("main", organization="org").rejects(upstream_key())


# Organizations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "learned", "organization"),
    [
        ("org-1", None, "org-1"),
        # What the pool says goes before what a header said.
        ("org-1", KeyMark("main", "org-2", MAIN), "org-1"),
        (None, KeyMark("main", "org-2", MAIN), "org-2"),
        # Unknown yet: the key is its own organization.
        (None, KeyMark("main"), f"key:main-{MAIN[:8]}"),
        (None, None, f"key:main-{MAIN[:8]}"),
        # Learned with another key under the same id, which may have been another organization's.
        (None, KeyMark("main", "org-2", "another"), f"key:main-{MAIN[:8]}"),
    ],
)
def test_a_key_draws_on_the_limits_of_its_organization(
    stated: str | None, learned: KeyMark | None, organization: str
) -> None:
    assert organization == organization_of(upstream_key(organization=stated), learned)


def test_two_keys_of_one_organization_are_reported_to_add_nothing() -> None:
    keys = [
        upstream_key("a", organization="org-1"),
        upstream_key("b", organization=None),
        upstream_key("c", organization=None),
    ]
    marks = {
        "b": KeyMark("b", "org-1", keys[1].fingerprint),
        "c": KeyMark("c", "org-2", keys[2].fingerprint),
    }

    (sentence,) = shared_organizations(keys, marks)

    assert "keys a, b belong to organization org-1" in sentence
    assert "adds no capacity" in sentence


def test_of_several_stated_limits_of_one_organization_the_lowest_holds() -> None:
    keys = [
        upstream_key("a", limits={"requests": 100}),
        upstream_key("b", limits={"requests": 50, "input_tokens": 7}),
        upstream_key("c", organization="other", limits={"requests": 10}),
    ]

    stated = stated_limits(keys, {})

    assert {"org": {"requests": 50, "input_tokens": 7}, "other": {"requests": 10}} == stated


@pytest.mark.parametrize(
    "url",
    [
        "https://relay.example",
        "https://10.0.0.5:8443/v1",
        "http://127.0.0.1:8089",
        "http://127.1.2.3",
        "http://[::1]:8089",
        "http://localhost:8089/claude",
    ],
)
def test_a_base_url_is_encrypted_or_on_this_machine(url: str) -> None:
    (key,) = parse_key_pool(pool({"api_key": SECRET, "base_url": url}))

    assert url == key.base_url


@pytest.mark.parametrize(
    "url",
    [
        "http://relay.example",
        "http://10.0.0.5:8080",
        "http://192.168.0.1",
        "http://0.0.0.0:8089",
        "http://127.0.0.1.example:8089",
        "http://localhost.example",
        "http://127.0.0.1@relay.example",
        "http://[::2]",
        "https://",
        "https://relay.example:0",
        "https://relay.example:port",
        "https://[relay",
        "file:///etc/passwd",
        "relay.example",
    ],
)
def test_key_and_prompts_do_not_travel_unencrypted(url: str) -> None:
    with pytest.raises(KeyPoolBroken, match="key 1 of the pool: base_url ") as refused:
        parse_key_pool(pool({"api_key": SECRET, "base_url": url}))
    admin = {"organization": "org", "api_key": SECRET, "base_url": url}
    with pytest.raises(KeyPoolBroken, match="admin key 1 of the pool: base_url "):
        parse_admin_keys({"keys": [], "admin_keys": [admin]})

    assert "@" not in str(refused.value)
    assert SECRET not in str(refused.value)
