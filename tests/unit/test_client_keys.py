"""Client keys are kept as keyed hashes only."""

import hmac
from hashlib import sha256

import pytest

from sluice.domain.client_keys import MIN_LENGTH, key_id, matches, new_key, verifier

PEPPER = "pepper-of-this-stack"
KEY = "sluice_crunchy-armchair"


def test_a_new_key_is_url_safe_text_from_its_random_bytes() -> None:
    key = new_key(bytes(range(232, 256)))

    assert "sluice_6Onq6-zt7u_w8fLz9PX29_j5-vv8_f7_" == key
    assert len(key) >= MIN_LENGTH


def test_a_new_key_needs_192_bits() -> None:
    with pytest.raises(ValueError, match="24 random bytes, got 23"):
        new_key(bytes(23))


def test_the_two_hashes_are_what_the_contract_says() -> None:
    expected = hmac.new(PEPPER.encode(), KEY.encode(), sha256).hexdigest()
    check = hmac.new(PEPPER.encode(), b"verify:" + KEY.encode(), sha256).hexdigest()

    assert expected[:32] == key_id(PEPPER, KEY)
    assert check == verifier(PEPPER, KEY)


def test_a_key_matches_its_own_verifier_only() -> None:
    stored = verifier(PEPPER, KEY)

    assert matches(PEPPER, KEY, stored)
    assert not matches(PEPPER, KEY + "x", stored)
    assert not matches("another pepper", KEY, stored)
    assert not matches(PEPPER, KEY, key_id(PEPPER, KEY))


def test_the_id_in_the_table_does_not_give_the_verifier_away() -> None:
    assert not verifier(PEPPER, KEY).startswith(key_id(PEPPER, KEY))
