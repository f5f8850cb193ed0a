"""Fill what a fresh stack lacks: the key pool, and one client key."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from scripts.local_stack.emulator import Emulator, StackError
from sluice.domain import client_keys
from sluice.domain.errors import KeyPoolBroken
from sluice.domain.keys import parse_key_pool

TEST_KEY = "sk-ant-test-local"
"""The upstream key the simulator gets when nobody gave a key pool."""

KeyPool = Mapping[str, Any]


def read_key_pool(source: Path | KeyPool | None, claude_url: str | None) -> KeyPool:
    """Return the key pool to install.

    Keys without a base_url are sent to `claude_url`, if that is given. Without a source there is
    one test key, and `claude_url` must be given. Raises `StackError` for a file that is not a key
    pool.
    """
    if source is None:
        return {"keys": [{"id": "local", "api_key": TEST_KEY, "base_url": claude_url}]}
    if isinstance(source, Path):
        name = f"key pool {source}"
        try:
            pool = json.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise StackError(f"{name} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise StackError(f"{name} is not valid JSON: {error}") from error
    else:
        name, pool = "the key pool", source
    _check(name, pool)
    return {**pool, "keys": [_with_base_url(key, claude_url) for key in pool["keys"]]}


def _check(name: str, pool: object) -> None:
    """Refuse what the worker would refuse later, where only its log shows it."""
    try:
        keys = parse_key_pool(pool)
    except KeyPoolBroken as error:
        raise StackError(f"{name}: {error}") from error
    if not keys:
        raise StackError(f"{name} has no keys; add at least one Claude API key")


def _with_base_url(key: Mapping[str, Any], claude_url: str | None) -> Mapping[str, Any]:
    return key if key.get("base_url") or claude_url is None else {**key, "base_url": claude_url}


def install_key_pool(emulator: Emulator, secret: str, pool: KeyPool) -> None:
    """Store the key pool as the secret's current value."""
    emulator.client("secretsmanager").put_secret_value(
        SecretId=secret, SecretString=json.dumps(pool)
    )


def new_client_key() -> str:
    """Return a fresh client key for this laptop."""
    return f"sluice_local_{secrets.token_urlsafe(24)}"


def check_client_key(key: str) -> None:
    """Raise `StackError` when a client key is one that Sluice refuses."""
    if len(key) < client_keys.MIN_LENGTH:
        raise StackError(
            f"the client key has {len(key)} characters; the minimum is {client_keys.MIN_LENGTH}"
        )


class HasClients(Protocol):
    """An emulator, or a running stack."""

    @property
    def client(self) -> Callable[[str], Any]:
        """Returns a boto3 client of a service."""
        ...


def install_client_key(
    emulator: HasClients, *, table: str, pepper_secret: str, key: str, tenant: str
) -> None:
    """Let `key` in as `tenant`."""
    pepper = emulator.client("secretsmanager").get_secret_value(SecretId=pepper_secret)[
        "SecretString"
    ]
    emulator.client("dynamodb").put_item(
        TableName=table,
        Item={
            "key_id": {"S": client_keys.key_id(pepper, key)},
            "hash": {"S": client_keys.verifier(pepper, key)},
            "tenant": {"S": tenant},
            "name": {"S": "local"},
            "created_at": {"S": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
            "disabled": {"BOOL": False},
        },
    )
