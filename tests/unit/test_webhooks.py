"""Webhooks: whom they may call, how they are signed, when they are tried again; and which ends are published."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address
from itertools import accumulate
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook as Signer

from sluice.domain.jobs import JobError, State
from sluice.domain.pricing import Usage
from sluice.domain.webhooks import (
    LONGEST_PAUSE_MS,
    PAUSES_MS,
    Delivered,
    GiveUp,
    Retry,
    check_url,
    judge,
    may_be_called,
    read_networks,
    signing_secret,
)
from sluice.notices.deliver import REFUSED, Deliver
from sluice.notices.publish import Publish
from sluice.ports.jobs import Received
from sluice.ports.messages import webhook_of
from sluice.ports.world import Notice, Reply, Webhook
from tests.bulk_fakes import MemoryNotices
from tests.fakes import (
    NOON,
    SECOND,
    FrozenClock,
    MemoryQueue,
    RecordingEvents,
    VirtualClock,
    VirtualTime,
    a_job,
)

HOME: Final = read_networks("127.0.0.0/8, 10.1.0.0/16,fd12::/16")
PUBLIC: Final = "93.184.216.34"
URL: Final = "https://acme.example:8443/hooks?token=hidden"


# Where ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        (PUBLIC, True),
        ("2606:4700::1111", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104 - an address to be refused
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fd12::1", False),
        ("ff0e::1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::a00:1", False),
        ("64:ff9b:1:a00:0:100:808:808", False),
        ("::7f00:1", False),
        ("2002:7f00:1::1", False),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", False),
    ],
)
def test_a_webhook_goes_to_public_addresses_only(address: str, *, is_public: bool) -> None:
    assert is_public == may_be_called(ip_address(address))
    assert not may_be_called(ip_address(address), plainly=True)


@pytest.mark.parametrize(
    ("address", "is_home"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("fd12::1", True),
        ("10.2.0.1", False),
        ("fd13::1", False),
        (PUBLIC, False),
    ],
)
def test_the_operators_networks_may_be_called_and_without_tls(
    address: str, *, is_home: bool
) -> None:
    assert is_home == may_be_called(ip_address(address), HOME, plainly=True)


@given(st.ip_addresses())
def test_no_address_is_both_private_and_called(address: Any) -> None:
    if may_be_called(address):
        assert not address.is_loopback
        assert not address.is_link_local
        assert not address.is_multicast


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://acme.example/", "must start with https://"),
        ("ftp://acme.example/", "must start with https://"),
        ("https:///hook", "must start with https://"),
        ("acme.example/hook", "must start with https://"),
        ("https://user:secret@acme.example/", "must not contain a user name or a #fragment"),
        ("https://acme.example/#top", "must not contain a user name or a #fragment"),
        ("https://127.0.0.1/", "must not point to a private address (127.0.0.1)"),
        ("https://[::ffff:10.0.0.1]/", "must not point to a private address"),
        ("https://acme.example/a b", "ASCII characters"),
        ("https://acme.example/\n", "ASCII characters"),
        ("https://ünder.example/", "ASCII characters"),
        ("https://acme.example:99999/", "a port from 1 to 65535"),
        ("https://acme.example:0/", "a port from 1 to 65535"),
        ("https://[acme.example/", "must have a valid host"),
        ("https://acme.example./", "host has an empty label"),
        ("https://.example/", "host has an empty label"),
        ("https://acme.example/" + "a" * 2_048, "at most 2,048"),
    ],
)
def test_an_address_that_cannot_be_called_is_refused_in_words(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        check_url(url)

    assert problem in str(error.value)


def test_an_address_that_may_be_called_is_taken() -> None:
    check_url(URL)
    check_url("https://93.184.216.34/")
    check_url("http://127.0.0.1:9000/hook", HOME)
    with pytest.raises(ValueError, match="must not point to a private address"):
        check_url("http://93.184.216.34/", HOME)
    with pytest.raises(ValueError, match="https:// or http://"):
        check_url("ftp://127.0.0.1/", HOME)


def test_networks_are_a_list_or_an_error() -> None:
    assert () == read_networks("")
    assert 3 == len(HOME)
    assert read_networks("10.0.0.0/8") == read_networks(" 10.1.2.3/8,")
    with pytest.raises(ValueError, match=r"10\.1\.2/8"):
        read_networks("10.1.2/8")


# When ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 202, 204, 299])
def test_only_two_hundreds_are_a_delivery(status: int) -> None:
    assert Delivered() == judge(status, 1, 0)


@pytest.mark.parametrize("status", [None, 100, 301, 307, 400, 401, 404, 429, 500, 503])
def test_whatever_else_is_tried_again(status: int | None) -> None:
    assert Retry(5 * SECOND) == judge(status, 1, 0)


def test_a_receiver_that_is_missing_is_left_alone_at_once() -> None:
    assert GiveUp() == judge(410, 1, 0)


def test_pauses_grow_for_a_day_and_then_retries_end() -> None:
    ages = [0, *accumulate(PAUSES_MS)]
    verdicts = [judge(503, count, age) for count, age in enumerate(ages, start=1)]

    assert [*(Retry(pause) for pause in PAUSES_MS), GiveUp()] == verdicts
    assert list(PAUSES_MS) == sorted(PAUSES_MS)
    assert 24 * 3_600_000 < sum(PAUSES_MS) < 36 * 3_600_000


def test_receives_without_a_delivery_do_not_use_up_its_day() -> None:
    """Nine invocations in which the secret could not be read, and then the receiver fails once."""
    assert Retry(PAUSES_MS[-1]) == judge(500, 10, 3_600_000)


def test_a_receiver_may_ask_for_a_longer_pause_that_the_queue_can_keep() -> None:
    assert Retry(90 * SECOND) == judge(429, 1, 0, 90)
    assert Retry(5 * SECOND) == judge(429, 1, 0, 2)
    assert Retry(LONGEST_PAUSE_MS) == judge(503, 1, 0, 10**9)


# How -----------------------------------------------------------------------------------------------------------


def test_each_tenant_has_a_secret_of_its_own_that_is_always_the_same() -> None:
    secrets = {signing_secret(master, tenant) for master in "ab" for tenant in ("acme", "bolt")}

    assert 4 == len(secrets)
    assert all(each.startswith("whsec_") for each in secrets)
    assert signing_secret("a", "acme") in secrets


class FakeWeb:
    """Other people's servers."""

    def __init__(self, *replies: Reply, leads_to: Sequence[str] = (PUBLIC,)) -> None:
        self.replies = list(replies)
        self.leads_to = leads_to
        self.asked: list[tuple[str, int]] = []
        self.posts: list[tuple[str, str, Mapping[str, str], str]] = []

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.leads_to

    async def post(self, url: str, address: str, headers: Mapping[str, str], body: str) -> Reply:
        self.posts.append((url, address, headers, body))
        return self.replies.pop(0)


class Scene:
    """The webhooks queue and its function."""

    def __init__(self, web: FakeWeb, *masters: str) -> None:
        self.web = web
        # The library judges a signature's age by the real time.
        self.clock = FrozenClock(int(datetime.now(UTC).timestamp() * 1000))
        self.queue = MemoryQueue(self.clock.now)
        self.events = RecordingEvents()
        self.deliver = Deliver(
            web, lambda: masters or ("master",), self.queue, HOME, self.clock, self.events
        )

    def post(self, url: object = URL, **facts: Any) -> None:
        body = {"v": 1, "webhook": "job_1-7", "tenant": "acme", "url": url, "body": '{"type":"x"}'}
        self.queue.post(body=json.dumps(body | facts))

    def once(self) -> list[str]:
        """One invocation, as Lambda sees it: what is not reported is deleted."""
        messages = self.queue.deliver(10)
        later = asyncio.run(self.deliver(messages))
        self.queue.delete([each for each in messages if each.message_id not in later])
        return later


class SilentWeb(FakeWeb):
    """Servers of which some never answer; the adapter gives up after 15 s."""

    async def post(self, url: str, address: str, headers: Mapping[str, str], body: str) -> Reply:
        self.posts.append((url, address, headers, body))
        if "silent" not in url:
            return Reply(200)
        await asyncio.sleep(15)
        return Reply(problem="no answer within 15 s")


def test_receivers_that_never_answer_hold_an_environment_once_a_minute() -> None:
    """Other tenants' webhooks wait for the end of the invocation before theirs."""
    time = VirtualTime()
    scene = Scene(SilentWeb())
    scene.queue = MemoryQueue(time.now)
    clock = VirtualClock(time)
    scene.deliver = Deliver(scene.web, lambda: ("master",), scene.queue, HOME, clock, scene.events)

    def seconds_of(*tenants: str) -> float:
        for number, tenant in enumerate(tenants):
            url = URL if tenant == "birch" else f"https://silent{number}.example/hook"
            scene.post(url, tenant=tenant, webhook=f"job_{number}")
        started = time.seconds
        time.run(scene.deliver(scene.queue.deliver(10)))
        return time.seconds - started

    assert [15, 2, 2] == [seconds_of("acme", "acme", "birch") for _ in range(3)]
    assert 0 == seconds_of("birch")
    time.run(asyncio.sleep(60))
    assert [15, 2] == [seconds_of("acme"), seconds_of("acme")]
    assert 4 == scene.events.counted("WebhooksDelivered")
    time.close()


def test_a_delivery_is_signed_as_the_receivers_library_expects() -> None:
    scene = Scene(FakeWeb(Reply(200)))
    scene.post()

    assert [] == scene.once()

    ((url, address, headers, body),) = scene.web.posts
    assert (URL, PUBLIC, '{"type":"x"}') == (url, address, body)
    assert [("acme.example", 8443)] == scene.web.asked
    assert ("job_1-7", "application/json") == (headers["webhook-id"], headers["content-type"])
    assert {"type": "x"} == Signer(signing_secret("master", "acme")).verify(body, dict(headers))
    assert 1 == scene.events.counted("WebhooksDelivered")


def test_the_previous_secret_signs_too_so_that_a_rotation_needs_no_coordination() -> None:
    scene = Scene(FakeWeb(Reply(204)), "new", "old")
    scene.post()

    scene.once()

    (_, _, headers, body) = scene.web.posts[0]
    for master in ("new", "old"):
        Signer(signing_secret(master, "acme")).verify(body, dict(headers))


def test_a_failed_delivery_is_repeated_with_the_same_id_and_logged_without_its_url() -> None:
    scene = Scene(FakeWeb(Reply(problem="ConnectError"), Reply(500), Reply(200)))
    scene.post()

    assert 1 == len(scene.once())
    scene.clock.at += 5 * SECOND
    assert 1 == len(scene.once())
    scene.clock.at += 60 * SECOND
    assert [] == scene.once()

    assert 1 == len({headers["webhook-id"] for _, _, headers, _ in scene.web.posts})
    assert 3 == len({headers["webhook-timestamp"] for _, _, headers, _ in scene.web.posts})
    failures = [facts for event, facts in scene.events.notes if event == "webhook failed"]
    assert ["ConnectError", None] == [each["problem"] for each in failures]
    assert "token" not in str(scene.events.notes)


def test_a_webhook_with_an_unexpected_error_is_retried_like_any_other() -> None:
    scene = Scene(FakeWeb(Reply(200)))
    for name in ("a", "b"):
        # There is one answer for two.
        scene.post(webhook=name)

    assert 1 == len(scene.once())

    assert 1 == scene.events.counted("WebhooksDelivered")
    assert ["unexpected error delivering webhook"] == scene.events.problem_names


def test_a_queue_that_is_busy_takes_nothing_back_and_forgets_nothing() -> None:
    scene = Scene(FakeWeb(Reply(500), Reply(200)))
    for name in ("a", "b"):
        scene.post(webhook=name)
    scene.queue.fail_next("put_back")

    assert 1 == len(scene.once())

    assert 1 == scene.queue.depth()


def test_a_letter_that_cannot_be_rejected_now_is_rejected_later() -> None:
    scene = Scene(FakeWeb())
    scene.post(url=7)
    scene.queue.fail_next("reject")

    assert 1 == len(scene.once())
    scene.clock.at += 60 * SECOND
    assert [] == scene.once()

    assert 1 == len(scene.queue.rejected)


def test_one_that_fails_does_not_keep_the_others() -> None:
    scene = Scene(FakeWeb(Reply(500), Reply(200), Reply(410)))
    for name in ("a", "b", "c"):
        scene.post(webhook=name)

    assert 1 == len(scene.once())

    assert (1, 1) == (
        scene.events.counted("WebhooksDelivered"),
        scene.events.counted("WebhooksGivenUp"),
    )


@pytest.mark.parametrize(
    ("url", "leads_to"),
    [
        (URL, ("169.254.169.254",)),
        (URL, (PUBLIC, "10.9.9.9")),
        (URL, ("fe80::1%eth0",)),
        ("https://10.9.9.9/", ("10.9.9.9",)),
        ("http://acme.example/", (PUBLIC,)),
    ],
)
def test_a_name_that_leads_to_a_private_address_is_not_called_at_all(
    url: str, leads_to: Sequence[str]
) -> None:
    scene = Scene(FakeWeb(leads_to=leads_to))
    scene.post(url)

    assert [] == scene.once()

    assert [] == scene.web.posts
    assert 1 == scene.events.counted("WebhooksGivenUp")
    assert REFUSED in str(scene.events.notes)


@pytest.mark.parametrize(
    ("url", "port"), [("http://127.0.0.1/", 80), ("http://127.0.0.1:9/", 9), ("https://a.b/", 443)]
)
def test_the_port_is_the_schemes_own_unless_one_is_named(url: str, port: int) -> None:
    scene = Scene(FakeWeb(Reply(200), leads_to=("127.0.0.1",)))
    scene.post(url)

    scene.once()

    assert port == scene.web.asked[0][1]
    assert 1 == scene.events.counted("WebhooksDelivered")


def test_a_name_that_leads_nowhere_now_may_do_so_later() -> None:
    scene = Scene(FakeWeb(leads_to=()))
    scene.post()

    assert 1 == len(scene.once())


def test_a_message_that_is_no_webhook_is_kept_for_an_investigation() -> None:
    scene = Scene(FakeWeb())
    scene.post(url=7)

    assert [] == scene.once()

    assert ["not a webhook of Sluice's"] == [reason for _, reason in scene.queue.rejected]


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"v": 1, "webhook": "a", "tenant": "b"}'])
def test_only_whole_messages_are_read(body: str) -> None:
    assert webhook_of(Received("m", "r", body, None)) is None


def test_a_whole_message_is_read_whatever_else_a_later_release_says_in_it() -> None:
    body = {"v": 2, "webhook": "i", "tenant": "t", "url": "u", "body": "b", "new": 1}

    read = webhook_of(Received("m", "r", json.dumps(body), None))

    assert Webhook("i", "t", "u", "b") == read


# Who hears of what ---------------------------------------------------------------------------------------------


def ended(number: int, **facts: Any) -> Any:
    return a_job(f"job_{number}", state=State.SUCCEEDED, finished_at=NOON + 5 * SECOND, **facts)


def test_the_end_of_a_job_is_published_without_its_request_or_answer() -> None:
    notices = MemoryNotices()
    job = ended(
        1,
        custom_id="mine",
        usage=Usage(input_tokens=3, output_tokens=4),
        cost_micro_usd=1_250_000,
        metadata={"team": "search"},
        webhook=URL,
        version=7,
    )

    assert 1 == Publish(notices, RecordingEvents())([job])

    (reported,) = notices.told
    assert ("Job Ended", "job_1-7", NOON + 5 * SECOND, URL) == (
        reported.kind, reported.id, reported.at, reported.webhook,
    )  # fmt: skip
    assert {
        "job_id": "job_1",
        "custom_id": "mine",
        "tenant": job.tenant,
        "state": "succeeded",
        "model": job.model,
        "lane": "live",
        "error_type": None,
        "attempts_used": 0,
        "usage": Usage(input_tokens=3, output_tokens=4).as_dict(),
        "cost_micro_usd": 1_250_000,
        "cost_usd": "1.250000",
        "known_cost_micro_usd": 1_250_000,
        "unknown_costs": 0,
        "created_at": "2026-11-20T12:00:00.000000Z",
        "started_at": None,
        "finished_at": "2026-11-20T12:00:05.000000Z",
        "metadata": {"team": "search"},
    } == reported.facts
    json.dumps(reported.facts)


def test_an_error_is_published_by_its_type_alone_for_its_message_may_quote_the_request() -> None:
    notices = MemoryNotices()
    failed = replace(ended(1), state=State.ERRORED, error=JobError("api_error", "it said: ..."))

    Publish(notices, RecordingEvents())([failed])

    assert "api_error" == notices.told[0].facts["error_type"]
    assert "it said" not in str(notices.told[0].facts)


class NarrowBus(MemoryNotices):
    """Takes ten events, and the others later."""

    def publish(self, notices: Sequence[Notice]) -> None:
        super().publish(notices)
        self.fail_next("publish")


def test_a_bus_that_is_busy_gets_the_rest_later() -> None:
    notices, events = NarrowBus(), RecordingEvents()
    jobs = [ended(number) for number in range(25)]

    assert 10 == Publish(notices, events)(jobs)
    assert 10 == Publish(notices, events)(jobs[10:])
    assert 5 == Publish(notices, events)(jobs[20:])

    assert [f"job_{number}-1" for number in range(25)] == [each.id for each in notices.told]
    assert ["store busy"] * 2 == events.problem_names
