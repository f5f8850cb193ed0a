"""The API function: jobs, batches, uploads, usage and limits."""

from __future__ import annotations

import os
from functools import cache

from sluice.adapters.dynamodb import DynamoClientKeys
from sluice.adapters.s3 import Links
from sluice.adapters.secrets import SecretText
from sluice.domain.batches import longest_wait_ms
from sluice.intake.accounts import Account
from sluice.intake.admission import Admission
from sluice.intake.batches import Batches
from sluice.intake.start_estimate import StartEstimate
from sluice.intake.submit import Submit
from sluice.intake.uploads import LINK_SECONDS, Uploads
from sluice.wiring.batch_stores import batches, batches_queue, ranges_queue
from sluice.wiring.batches import plan_batch
from sluice.wiring.shared import (
    CLOCK,
    dynamodb,
    model_groups,
    s3,
    secrets_manager,
    settings,
    telemetry,
)
from sluice.wiring.stores import jobs, ledger, limits, objects, params, queue, results


@cache
def pepper() -> SecretText:
    """Return the pepper: it hashes client keys and signs the ids of uploads."""
    return SecretText(secrets_manager(), settings().pepper_secret, CLOCK)


@cache
def client_keys() -> DynamoClientKeys:
    """Return the client keys."""
    return DynamoClientKeys(dynamodb(), settings().client_keys_table, pepper(), CLOCK)


@cache
def admission() -> Admission:
    """Return the use case that lets requests in."""
    return Admission(client_keys(), settings().client_requests_per_second, CLOCK)


@cache
def submit() -> Submit:
    """Return the use case behind `POST /jobs`."""
    return Submit(jobs(), params(), queue(), CLOCK, os.urandom, telemetry())


@cache
def waiting() -> StartEstimate:
    """Return the use case that estimates how long new jobs wait."""
    return StartEstimate(queue(), limits(), model_groups(), CLOCK, telemetry())


def account(tenant: str) -> Account:
    """Return one tenant's view."""
    return Account(tenant, jobs(), results(), limits(), ledger(), CLOCK, telemetry())


def uploads_of(tenant: str) -> Uploads:
    """Return one tenant's uploads."""
    links = Links(s3(), settings().data_bucket, LINK_SECONDS)
    return Uploads(tenant, objects(), links, plan_batch(), pepper(), os.urandom)


def batches_of(tenant: str) -> Batches:
    """Return one tenant's batches."""
    return Batches(
        tenant,
        batches(),
        objects(),
        batches_queue(),
        ranges_queue(),
        CLOCK,
        os.urandom,
        telemetry(),
        longest_wait_ms(settings().retention_days),
        settings().default_lane,
    )
