"""The Rate Limits API through its adapter, against the simulator."""

from collections.abc import Iterator

import pytest

from scripts.claude_simulator import Running, read, running
from sluice.adapters.rate_limits import HttpRateLimits
from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.keys import AdminKey


@pytest.fixture(scope="module")
def simulator() -> Iterator[Running]:
    organisation = {
        "id": "one",
        "keys": ["sk-ant-test-one"],
        "admin_keys": ["sk-ant-admin-test-one"],
        "limits": {"default": {"rpm": 1_000, "itpm": 2_000_000, "otpm": 400_000}},
    }
    with running(read({"organisations": [organisation]})) as simulator:
        yield simulator


def test_the_limits_of_each_group_of_models_are_read(simulator: Running) -> None:
    known = HttpRateLimits().load(AdminKey("one", "sk-ant-admin-test-one", simulator.url))

    sonnet = next(each for each in known if "claude-sonnet-4-6" in each.models)
    assert "claude-sonnet-4-5" in sonnet.models
    assert {"requests": 1_000, "input_tokens": 2_000_000, "output_tokens": 400_000} == dict(
        sonnet.limits
    )
    assert all(each.models for each in known), "batches and token counts are no groups of models"


def test_a_rejected_key_is_named_by_its_organization(simulator: Running) -> None:
    with pytest.raises(KeyPoolBroken, match="answered 401 to the admin key of one") as error:
        HttpRateLimits().load(AdminKey("one", "sk-ant-admin-test-wrong", simulator.url))

    assert "sk-ant" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/\x7f"])
def test_an_api_that_does_not_answer_is_retried_later(url: str) -> None:
    with pytest.raises(StoreBusy, match="Rate Limits API"):
        HttpRateLimits().load(AdminKey("one", "sk-ant-admin-test-one", url))
