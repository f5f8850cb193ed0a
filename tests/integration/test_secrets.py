"""The key pool and the pepper in Secrets Manager: how old they may be, and that no error shows a key."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from typing import Any, Final

import pytest
from botocore.stub import Stubber

from sluice.adapters import aws
from sluice.adapters.secrets import POOL_AGE_MS, RELOAD_AT_MOST_EVERY_MS, SecretKeyPool, SecretText
from sluice.domain.errors import KeyPoolBroken, StoreBusy
from tests.fakes import FrozenClock
from tests.moto_aws import Aws, in_memory

KEY: Final = "sk-ant-test-sentinel-of-the-pool"


@pytest.fixture
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def secret(cloud: Aws, clock: FrozenClock) -> SecretText:
    return SecretText(cloud.secrets, "KeyPoolSecret", clock)


@pytest.fixture
def pool(secret: SecretText) -> SecretKeyPool:
    return SecretKeyPool(secret)


def one(name: str) -> dict[str, Any]:
    return {"id": name, "api_key": f"{KEY}-{name}"}


def names(pool: SecretKeyPool) -> list[str]:
    return [key.id for key in pool.keys()]  # noqa: SIM118 - not a dict's


def test_a_changed_pool_is_seen_after_five_minutes(
    cloud: Aws, clock: FrozenClock, pool: SecretKeyPool
) -> None:
    cloud.set_key_pool(one("old"))
    names(pool)
    cloud.set_key_pool(one("new"))

    clock.at += POOL_AGE_MS - 1
    assert ["old"] == names(pool)
    clock.at += 1
    assert ["new"] == names(pool)


def test_a_rejected_key_makes_the_pool_be_read_at_once(
    cloud: Aws, clock: FrozenClock, pool: SecretKeyPool
) -> None:
    cloud.set_key_pool(one("old"))
    names(pool)
    cloud.set_key_pool(one("new"))

    clock.at += RELOAD_AT_MOST_EVERY_MS
    pool.reload()

    assert ["new"] == names(pool)


def test_a_storm_of_rejections_reads_the_pool_once(clock: FrozenClock, cloud: Aws) -> None:
    client = aws.secrets_manager()
    pool = SecretKeyPool(SecretText(client, "KeyPoolSecret", clock))
    del cloud
    with Stubber(client) as stub:
        text = json.dumps({"keys": [one("main")]})
        stub.add_response("get_secret_value", {"SecretString": text})
        stub.add_response("get_secret_value", {"SecretString": text})
        names(pool)

        clock.at += RELOAD_AT_MOST_EVERY_MS
        for _ in range(50):
            pool.reload()
            names(pool)
            clock.at += 1

        stub.assert_no_pending_responses()


def test_a_pool_is_all_that_was_written(cloud: Aws, pool: SecretKeyPool) -> None:
    cloud.set_key_pool(
        {**one("main"), "organization": "org", "base_url": "https://relay/", "models": ["m"],
         "tenants": ["acme"], "weight": 3},
        {"api_key": f"{KEY}-2"},
    )  # fmt: skip

    main, second = pool.keys()

    assert f"{KEY}-main" == main.api_key
    assert ("org", "https://relay", frozenset({"m"}), frozenset({"acme"}), 3) == (
        main.organization, main.base_url, main.models, main.tenants, main.weight,
    )  # fmt: skip
    assert ("key-2", None, 1) == (second.id, second.organization, second.weight)


def test_an_empty_pool_is_a_pool(pool: SecretKeyPool) -> None:
    """What a fresh deployment has until `sluice setup` fills it."""
    assert [] == names(pool)


BROKEN: Final = [
    f"{KEY} is not JSON",
    f'["{KEY}"]',
    f'{{"keys": "{KEY}"}}',
    f'{{"keys": ["{KEY}"]}}',
    f'{{"keys": [{{"key": "{KEY}"}}]}}',
    f'{{"keys": [{{"id": "a", "api_key": ["{KEY}"]}}]}}',
    f'{{"keys": [{{"id": "a", "api_key": "{KEY}é"}}]}}',
    f'{{"keys": [{{"id": "a", "api_key": "{KEY}", "weight": "heavy"}}]}}',
    f'{{"keys": [{{"id": "a", "api_key": "{KEY}", "base_url": "relay"}}]}}',
    f'{{"keys": [{{"id": "a", "api_key": "{KEY}", "models": "all"}}]}}',
    f'{{"keys": [{{"id": "a", "api_key": "{KEY}"}}, {{"id": "a", "api_key": "{KEY}"}}]}}',
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_pool_says_what_is_wrong_and_shows_no_key(
    cloud: Aws, pool: SecretKeyPool, text: str
) -> None:
    cloud.secrets.put_secret_value(SecretId="KeyPoolSecret", SecretString=text)

    with pytest.raises(KeyPoolBroken) as broken:
        pool.keys()

    shown = "".join(traceback.format_exception(broken.value))
    assert str(broken.value)
    assert KEY not in shown


def test_a_pool_shows_no_key_when_it_is_printed(cloud: Aws, pool: SecretKeyPool) -> None:
    cloud.set_key_pool(one("main"))

    assert KEY not in repr(pool.keys())
    assert KEY not in repr(pool)


def test_a_repaired_pool_is_read_again(cloud: Aws, clock: FrozenClock, pool: SecretKeyPool) -> None:
    cloud.secrets.put_secret_value(SecretId="KeyPoolSecret", SecretString="{}")
    with pytest.raises(KeyPoolBroken):
        pool.keys()
    cloud.set_key_pool(one("main"))

    clock.at += POOL_AGE_MS

    assert ["main"] == names(pool)


def test_a_secret_of_bytes_is_no_pool(cloud: Aws, pool: SecretKeyPool) -> None:
    cloud.secrets.put_secret_value(SecretId="KeyPoolSecret", SecretBinary=KEY.encode())

    with pytest.raises(KeyPoolBroken, match="KeyPoolSecret is binary; store it as text"):
        pool.keys()


def test_a_secret_that_may_not_be_read_says_so(cloud: Aws, clock: FrozenClock) -> None:
    secret = SecretText(cloud.secrets, "AnotherSecret", clock)

    with pytest.raises(KeyPoolBroken, match="AnotherSecret cannot be read: ResourceNotFound"):
        secret()


def test_a_busy_secrets_manager_is_busy_and_not_broken(cloud: Aws, clock: FrozenClock) -> None:
    client = aws.secrets_manager()
    del cloud
    with Stubber(client) as stub:
        for code in ("ThrottlingException", "InternalServiceError", "LimitExceededException", "X"):
            stub.add_client_error("get_secret_value", code, http_status_code=500)

        with pytest.raises(StoreBusy, match="Secrets Manager is busy"):
            SecretText(client, "KeyPoolSecret", clock)()
