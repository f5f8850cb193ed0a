"""Every place where requests and answers are stored, how long they stay there, and what a DELETE takes away."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from sluice.adapters import job_records
from sluice.domain.batches import DAY_MS, JOIN_MS, LONGEST_MS, longest_wait_ms
from sluice.domain.errors import BatchNotFound, StoreBusy
from sluice.domain.jobs import State
from sluice.intake import batches
from sluice.intake.batches import Batches
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.expanded_template import template
from tests.fakes import NOON, VirtualClock, a_job

LAYER: Final = Path(__file__).parents[2] / "layers" / "sluice" / "sluice"
RETENTION: Final = {"Ref": "RetentionDays"}

PREFIXES: Final[dict[str, tuple[object, str]]] = {
    # The prefix, its lifecycle rule in days, and what else deletes its objects.
    "params": (60, "requests of jobs; nothing else, a job may wait that long"),
    "long-params": (RETENTION, "the same, where RetentionDays is above 60"),
    "in": (RETENTION, "files of the tenant; the tenant, and uploads: DELETE of the batch"),
    "batches": (RETENTION, "rows, chunks, parts, sections, packed results; DELETE of the batch"),
    "out": (RETENTION, "copies of results, errors, summary; DELETE of the batch"),
    "results": (RETENTION, "large answers of jobs; nothing else"),
    "dead-letters": (RETENTION, "message bodies: pointers, no content; nothing else"),
}

TABLES: Final[dict[str, str]] = {
    "JobsTable": "expires_at",
    "ParamsTable": "expires_at",
    "BatchesTable": "expires_at",
    "LimitsTable": "expires_at",
    "LedgerTable": "expires_at",
    "UsageTable": "expires_at",
    "ClientKeysTable": "",  # keys stay until they are revoked, and afterwards as a record of it
}


def rules() -> dict[str, Any]:
    """The days of each rule of the bucket's lifecycle, by prefix."""
    bucket = template()["Resources"]["DataBucket"]["Properties"]
    return {
        rule["Prefix"].rstrip("/"): rule["ExpirationInDays"]
        for rule in bucket["LifecycleConfiguration"]["Rules"]
        if "Prefix" in rule and rule["Status"] == "Enabled"
    }


def test_every_prefix_expires_as_the_table_says() -> None:
    assert {prefix: days for prefix, (days, _) in PREFIXES.items()} == rules()


def test_the_code_writes_under_no_other_prefix() -> None:
    source = "\n".join(path.read_text() for path in LAYER.rglob("*.py"))
    keys = re.findall(r'(?:key|KEY|PREFIX)\w*(?:: Final)? = f?"([a-z-]+)/', source)
    keys += re.findall(r'return f"([a-z-]+)/\{self\.(?:tenant|_tenant|batch_id)\}', source)
    keys += re.findall(r'prefix = "([a-z-]+)" if .* else "([a-z-]+)"', source)[0]

    assert PREFIXES.keys() == set(keys)


def test_every_table_with_content_expires() -> None:
    resources = template()["Resources"]
    found = {
        name: each["Properties"].get("TimeToLiveSpecification", {}).get("AttributeName", "")
        for name, each in resources.items()
        if each["Type"] == "AWS::DynamoDB::Table"
    }

    assert TABLES == found


def test_an_answer_in_a_job_record_expires_with_retention_days() -> None:
    ended = replace(a_job(), state=State.SUCCEEDED, finished_at=NOON)

    item = job_records.encode(ended, 7)

    assert str(NOON // 1000 + 7 * 86_400) == item["expires_at"]["N"]


@pytest.mark.parametrize(
    ("retention_days", "longest"),
    [(1, DAY_MS - JOIN_MS), (7, 7 * DAY_MS - JOIN_MS), (14, LONGEST_MS), (3_650, LONGEST_MS)],
)
def test_a_batch_ends_before_its_objects_expire(retention_days: int, longest: int) -> None:
    """S3 deletes an object at the earliest so many days after it was written."""
    assert longest == longest_wait_ms(retention_days)
    assert longest < retention_days * DAY_MS


# DELETE --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bulk() -> Any:
    made = Bulk()
    yield made
    made.close()


def api_of(bulk: Bulk, tenant: str = "acme") -> Batches:
    clock = VirtualClock(bulk.time)
    return Batches(
        *(tenant, bulk.batches, bulk.objects, bulk.queues, bulk.queues),
        *(clock, bytes, bulk.events),
    )


def ran(bulk: Bulk, key: str, content: bytes) -> str:
    """Run a file to its end; return the id of its batch."""
    known = set(bulk.batches.stored)
    bulk.objects.put(key, content)
    bulk.planner.arrived(key)
    bulk.drain()
    (batch_id,) = bulk.batches.stored.keys() - known
    return batch_id


def test_a_deleted_batch_leaves_nothing_but_the_tenants_own_file(bulk: Bulk) -> None:
    batch_id = ran(bulk, "in/acme/reviews.jsonl", jsonl(*map(a_row, range(300))))
    other = ran(bulk, "in/acme/other.jsonl", jsonl(a_row(1)))
    before = set(bulk.objects.stored)
    assert 4 < len([key for key in before if batch_id in key])
    assert "out/acme/reviews/results.jsonl" in before

    api_of(bulk).delete(batch_id)

    left = set(bulk.objects.stored)
    assert {"in/acme/reviews.jsonl"} == {key for key in left if "reviews" in key or batch_id in key}
    assert {key for key in before if "other" in key or other in key} <= left


def test_deleting_an_older_batch_leaves_the_results_of_a_later_one_of_that_name(bulk: Bulk) -> None:
    older = ran(bulk, "in/acme/reviews.jsonl", jsonl(a_row(1)))
    ran(bulk, "in/acme/reviews.jsonl", jsonl(a_row(2)))
    results = bulk.objects.stored["out/acme/reviews/results.jsonl"]

    api_of(bulk).delete(older)

    assert results == bulk.objects.stored["out/acme/reviews/results.jsonl"]
    assert not [key for key in bulk.objects.stored if older in key]


def test_no_tenant_deletes_anothers_batch(bulk: Bulk) -> None:
    batch_id = ran(bulk, "in/acme/reviews.jsonl", jsonl(a_row(1)))
    before = dict(bulk.objects.stored)

    with pytest.raises(BatchNotFound):
        api_of(bulk, "other").delete(batch_id)

    assert before == bulk.objects.stored


def test_more_objects_than_fit_into_a_request_are_deleted_by_the_next_ones(
    bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is deleted only when its last object is."""
    batch_id = ran(bulk, "in/acme/reviews.jsonl", jsonl(a_row(1)))
    for number in range(25):
        bulk.objects.put(f"batches/{batch_id}/chunks/00000000/{number}", b"answers")
    monkeypatch.setattr(batches, "ERASED_AT_ONCE", 10)
    monkeypatch.setattr(batches, "ERASE_MS", 0)
    api = api_of(bulk)

    with pytest.raises(StoreBusy):
        api.delete(batch_id)
    assert batch_id == api.get(batch_id).batch_id
    monkeypatch.setattr(batches, "ERASE_MS", 15_000)
    api.delete(batch_id)

    assert not [key for key in bulk.objects.stored if batch_id in key]
    with pytest.raises(BatchNotFound):
        api.get(batch_id)
