"""What a page in the user's browser, or a program without the run's credentials, can do to a running stack: nothing."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import boto3
import pytest
from botocore.auth import S3SigV4QueryAuth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials as Signing
from botocore.exceptions import ClientError

from scripts.local_stack.emulator import HOST, REGION, Credentials, Emulator

ROOT_OF_OLD = Signing("test", "test")
ACCOUNT_AS_KEY = Signing("000000000000", "test")
BUCKET = "private"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    started = Emulator()
    try:
        started.wait_until_it_answers()
        s3 = started.client("s3")
        s3.create_bucket(Bucket=BUCKET)
        s3.put_object(Bucket=BUCKET, Key="answer", Body=b"private")
        yield started
    finally:
        started.stop()


def ask(
    emulator: Emulator,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> tuple[int, dict[str, str], bytes]:
    """Send a request as it is, with no header that is not given but Host."""
    connection = HTTPConnection(HOST, emulator.port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        sent = {"Host": f"{HOST}:{emulator.port}", "Content-Length": str(len(body))}
        for name, value in (sent | (headers or {})).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): v for name, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def signed(  # noqa: PLR0913, PLR0917 - the parts of a request
    emulator: Emulator, credentials: Signing, service: str, method: str, path: str, body: str = ""
) -> dict[str, str]:
    """Return the headers of a signed request."""
    request = AWSRequest(method, f"{emulator.endpoint_url}{path}", data=body)
    SigV4Auth(credentials, service, REGION).add_auth(request)
    return dict(request.headers.items())


def is_intact(emulator: Emulator) -> bool:
    found = emulator.client("s3").get_object(Bucket=BUCKET, Key="answer")["Body"].read()
    functions = emulator.client("lambda").list_functions()["Functions"]
    return (found, functions) == (b"private", [])


# A page in a browser ------------------------------------------------------------------------------------------

PAGE = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
"""What a page can send without asking first."""

FUNCTION = {
    "FunctionName": "mine",
    "Runtime": "python3.13",
    "Role": "arn:aws:iam::000000000000:role/any",
    "Handler": "app.handler",
    "Code": {"ZipFile": "UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA=="},
}


def test_a_page_cannot_create_a_function_and_call_it(emulator: Emulator) -> None:
    """Two `text/plain` POSTs would be enough to run a program as the user."""
    create = json.dumps(FUNCTION).encode()

    made = ask(emulator, "POST", "/2015-03-31/functions", PAGE, create)
    called = ask(emulator, "POST", "/2015-03-31/functions/mine/invocations", PAGE, b"{}")

    assert [403, 403] == [made[0], called[0]]
    assert is_intact(emulator)


def test_the_same_without_an_origin_needs_a_signature(emulator: Emulator) -> None:
    """A form that is sent from a page with `no-referrer` has the origin `null`; old browsers send none."""
    create = json.dumps(FUNCTION).encode()

    answers = [
        ask(emulator, "POST", "/2015-03-31/functions", headers, create)[0]
        for headers in ({"Content-Type": "text/plain"}, {**PAGE, "Origin": "null"})
    ]

    assert [403, 403] == answers
    assert is_intact(emulator)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example"])
def test_a_name_that_leads_here_is_not_this_host(emulator: Emulator, host: str) -> None:
    """DNS rebinding: the page's own name is resolved to 127.0.0.1, and so the request has its origin."""
    named = f"{host.partition(':')[0]}:{emulator.port}"

    for each in (host, named):
        status, _headers, _body = ask(
            emulator, "GET", "/_aws/execute-api/any/health", {"Host": each}
        )
        assert 403 == status


def test_no_response_can_be_read_by_a_web_page(emulator: Emulator) -> None:
    own = {"Origin": emulator.endpoint_url}
    asks_first = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization",
    }

    answers = [
        ask(emulator, "GET", "/_aws/execute-api/any/health", own),
        ask(emulator, "OPTIONS", "/2015-03-31/functions", asks_first),
        ask(emulator, "OPTIONS", f"/{BUCKET}/answer", asks_first),
        ask(
            emulator,
            "GET",
            f"/{BUCKET}/answer",
            signed(emulator, signing(emulator.credentials), "s3", "GET", f"/{BUCKET}/answer"),
        ),
    ]

    for _status, headers, _body in answers:
        assert not [name for name in headers if name.startswith("access-control-")]
    assert [403, 403] == [answers[1][0], answers[2][0]]


# A program without the run's credentials -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/_ministack/reset"),
        ("POST", "/_ministack/config"),
        ("GET", "/_ministack/health"),
        ("GET", "/_ministack/sqs/messages"),
        ("GET", "/_aws/ses"),
        ("GET", "/_aws/execute-api/../../_ministack/sqs/messages"),
        ("POST", "/_aws/execute-api/x/../../../_ministack/reset"),
        ("POST", "//_ministack/reset"),
        ("GET", "/health"),
    ],
)
def test_the_emulators_own_administration_is_closed(
    emulator: Emulator, method: str, path: str
) -> None:
    """A reset, for one, would take all jobs with it."""
    status, _headers, _body = ask(emulator, method, path)

    assert 403 == status
    assert is_intact(emulator)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", f"/{BUCKET}"),
        ("GET", f"/{BUCKET}/answer"),
        ("HEAD", f"/{BUCKET}/answer"),
        ("PUT", f"/{BUCKET}/answer"),
        ("DELETE", f"/{BUCKET}/answer"),
        ("POST", f"/{BUCKET}?delete"),
    ],
)
def test_unsigned_s3_is_refused(emulator: Emulator, method: str, path: str) -> None:
    status, _headers, body = ask(emulator, method, path)

    assert 403 == status
    assert b"private" not in body
    assert is_intact(emulator)


@pytest.mark.parametrize("key", ["test", "000000000000", "", "ROOT"])
@pytest.mark.parametrize("scope", ["s3", "lambda"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", f"/{BUCKET}/answer"), ("GET", "/2015-03-31/functions"), ("POST", "/_ministack/reset")],
)
def test_query_parameters_that_look_like_a_signature_are_none(
    emulator: Emulator, key: str, scope: str, method: str, path: str
) -> None:
    key = emulator.credentials.access_key_id if key == "ROOT" else key
    forged = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{key}/20261129/{REGION}/{scope}/aws4_request",
        "X-Amz-Date": "20261129T000000Z",
        "X-Amz-Expires": "604800",
        "X-Amz-SignedHeaders": "host",
        "X-Amz-Signature": "0" * 64,
    }

    whole = ask(emulator, method, f"{path}?{urlencode(forged)}")
    only_the_key = ask(
        emulator, method, f"{path}?X-Amz-Credential={quote(forged['X-Amz-Credential'])}"
    )

    assert [403, 403] == [whole[0], only_the_key[0]]
    assert is_intact(emulator)


def signing(credentials: Credentials, secret: str | None = None) -> Signing:
    return Signing(credentials.access_key_id, secret or credentials.secret_access_key)


@pytest.mark.parametrize("service", ["lambda", "s3", "sqs", "dynamodb", "iam"])
def test_only_the_runs_key_is_root_and_its_signature_is_verified(
    emulator: Emulator, service: str
) -> None:
    forged = signing(emulator.credentials, "a-secret-that-was-guessed")
    path = "/2015-03-31/functions" if service == "lambda" else "/"

    answers = {
        who.access_key: ask(emulator, "GET", path, signed(emulator, who, service, "GET", path))[0]
        for who in (ROOT_OF_OLD, ACCOUNT_AS_KEY, forged)
    }

    assert {403} == set(answers.values()), answers


def test_a_signature_is_for_one_body(emulator: Emulator) -> None:
    """The bytes that were signed, not others under the same signature."""
    path, create = "/2015-03-31/functions", json.dumps(FUNCTION)
    headers = signed(emulator, signing(emulator.credentials), "lambda", "POST", path, create)

    status, _headers, _body = ask(
        emulator, "POST", path, headers, create.replace("mine", "evil").encode()
    )

    assert 403 == status
    assert is_intact(emulator)


def test_a_presigned_link_works_for_what_it_was_made_for_alone(emulator: Emulator) -> None:
    s3 = emulator.client("s3")
    link = urlsplit(
        s3.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": "answer"})
    )
    put = AWSRequest("PUT", f"{emulator.endpoint_url}/{BUCKET}/other")
    S3SigV4QueryAuth(signing(emulator.credentials, "guessed"), "s3", REGION).add_auth(put)
    forged = urlsplit(str(put.url))

    good = ask(emulator, "GET", f"{link.path}?{link.query}")
    other_key = ask(emulator, "GET", f"/{BUCKET}/else?{link.query}")
    other_method = ask(emulator, "DELETE", f"{link.path}?{link.query}")
    other_service = ask(emulator, "GET", f"/2015-03-31/functions?{link.query}")
    administration = ask(emulator, "POST", f"/_ministack/reset?{link.query}")
    bad = ask(emulator, "PUT", f"{forged.path}?{forged.query}", body=b"evil")

    assert (200, b"private") == (good[0], good[2])
    assert {403} == {
        each[0] for each in (other_key, other_method, other_service, administration, bad)
    }
    assert is_intact(emulator)


def test_it_listens_on_this_machine_alone(emulator: Emulator) -> None:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", emulator.port))  # noqa: S104 - it must fail, or listen to nobody
        except OSError:
            return
    assert HOST == urlsplit(emulator.endpoint_url).hostname


# Roles ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def as_role(emulator: Emulator) -> Any:
    """Clients that act by a user's policy, as functions act by their role's."""
    iam = emulator.client("iam")

    def with_policy(name: str, *statements: dict[str, Any]) -> Any:
        iam.create_user(UserName=name)
        document = {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", **each} for each in statements],
        }
        iam.put_user_policy(UserName=name, PolicyName="its", PolicyDocument=json.dumps(document))
        key = iam.create_access_key(UserName=name)["AccessKey"]

        def client(service: Any) -> Any:
            return boto3.client(
                service,
                endpoint_url=emulator.endpoint_url,
                region_name=REGION,
                aws_access_key_id=key["AccessKeyId"],
                aws_secret_access_key=key["SecretAccessKey"],
                config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
            )

        return client

    return with_policy


def refused(call: Any, **arguments: Any) -> str | None:
    """Return AWS's name of the refusal, None when the call was done."""
    try:
        call(**arguments)
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return None


def test_a_missing_object_is_forbidden_to_those_who_may_not_list(as_role: Any) -> None:
    read = {"Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    listing = {"Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{BUCKET}"}
    prefixed = {**listing, "Condition": {"StringLikeIfExists": {"s3:prefix": ["in/*"]}}}

    codes = [
        refused(as_role(name, *statements)("s3").get_object, Bucket=BUCKET, Key="missing")
        for name, statements in (
            ("reads", [read]),
            ("reads-and-lists", [read, listing]),
            ("reads-and-lists-some", [read, prefixed]),
        )
    ]

    assert ["AccessDenied", "NoSuchKey", "NoSuchKey"] == codes


def test_a_partiql_statement_needs_the_action_of_its_verb_on_its_table(
    emulator: Emulator, as_role: Any
) -> None:
    tables = []
    for name in ("partiql-a", "partiql-b"):
        emulator.client("dynamodb").create_table(
            TableName=name,
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            BillingMode="PAY_PER_REQUEST",
        )
        tables.append(f"arn:aws:dynamodb:{REGION}:000000000000:table/{name}")
    inserts = as_role("inserts", {"Action": "dynamodb:PartiQLInsert", "Resource": tables[0]})
    batches = as_role("batches", {"Action": "dynamodb:BatchExecuteStatement", "Resource": "*"})

    def insert(table: str) -> dict[str, Any]:
        item = hashlib.sha256(table.encode()).hexdigest()
        return {"Statement": f"INSERT INTO \"{table}\" VALUE {{'id': '{item}'}}"}

    def code(client: Any, *statements: dict[str, Any]) -> str | None:
        return refused(client("dynamodb").batch_execute_statement, Statements=list(statements))

    assert code(inserts, insert("partiql-a")) is None
    assert "AccessDeniedException" == code(inserts, insert("partiql-a"), insert("partiql-b"))
    assert "AccessDeniedException" == code(
        inserts, {"Statement": "SELECT * FROM \"partiql-a\" WHERE id = 'x'"}
    )
    assert "AccessDeniedException" == code(batches, insert("partiql-a"))


def test_batches_of_messages_need_the_action_of_one(emulator: Emulator, as_role: Any) -> None:
    url = emulator.client("sqs").create_queue(QueueName="batches")["QueueUrl"]
    queue = f"arn:aws:sqs:{REGION}:000000000000:batches"
    sends = as_role("sends", {"Action": "sqs:SendMessage", "Resource": queue})("sqs")
    entries = [{"Id": "1", "MessageBody": "one"}]

    assert refused(sends.send_message_batch, QueueUrl=url, Entries=entries) is None
    assert refused(sends.receive_message, QueueUrl=url) is not None


def test_events_are_filtered_by_their_source(as_role: Any) -> None:
    put = {
        "Action": "events:PutEvents",
        "Resource": f"arn:aws:events:{REGION}:000000000000:event-bus/default",
        "Condition": {"StringEquals": {"events:source": "sluice"}},
    }
    bus = as_role("tells", put)("events")

    def event(source: str) -> dict[str, str]:
        return {"Source": source, "DetailType": "any", "Detail": "{}"}

    codes = [
        refused(bus.put_events, Entries=[event(source) for source in sources])
        for sources in (["sluice"], ["other"], ["sluice", "other"])
    ]

    assert [None, "AccessDeniedException", "AccessDeniedException"] == codes


def test_an_index_is_not_its_table(emulator: Emulator, as_role: Any) -> None:
    emulator.client("dynamodb").create_table(
        TableName="indexed",
        AttributeDefinitions=[
            {"AttributeName": "id", "AttributeType": "S"},
            {"AttributeName": "of", "AttributeType": "S"},
        ],
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        GlobalSecondaryIndexes=[
            {
                "IndexName": "by_of",
                "KeySchema": [{"AttributeName": "of", "KeyType": "HASH"}],
                "Projection": {"ProjectionType": "ALL"},
            }
        ],
        BillingMode="PAY_PER_REQUEST",
    )
    table = f"arn:aws:dynamodb:{REGION}:000000000000:table/indexed"
    query = {
        "TableName": "indexed",
        "IndexName": "by_of",
        "KeyConditionExpression": "#of = :of",
        "ExpressionAttributeNames": {"#of": "of"},
        "ExpressionAttributeValues": {":of": {"S": "x"}},
    }

    codes = [
        refused(
            as_role(name, {"Action": "dynamodb:Query", "Resource": resource})("dynamodb").query,
            **query,
        )
        for name, resource in (("of-table", table), ("of-index", f"{table}/index/by_of"))
    ]

    assert ["AccessDeniedException", None] == codes


ONE, OTHER = "0" * 36, "1" * 36


def test_one_mapping_is_read_and_changed_by_actions_of_their_own(as_role: Any) -> None:
    mapping = f"arn:aws:lambda:{REGION}:000000000000:event-source-mapping:{ONE}"
    reads = as_role("reads-one", {"Action": "lambda:GetEventSourceMapping", "Resource": mapping})
    lists = as_role("lists", {"Action": "lambda:ListEventSourceMappings", "Resource": "*"})

    def codes(client: Any) -> list[str | None]:
        return [
            refused(client("lambda").get_event_source_mapping, UUID=ONE),
            refused(client("lambda").get_event_source_mapping, UUID=OTHER),
            refused(client("lambda").update_event_source_mapping, UUID=ONE, Enabled=False),
        ]

    assert ["ResourceNotFoundException", *["AccessDeniedException"] * 2] == codes(reads)
    assert ["AccessDeniedException"] * 3 == codes(lists)


def test_the_accounts_settings_have_an_action_of_their_own(as_role: Any) -> None:
    reads = as_role("reads-it", {"Action": "lambda:GetAccountSettings", "Resource": "*"})
    others = as_role("reads-other", {"Action": "lambda:GetFunction", "Resource": "*"})

    assert refused(reads("lambda").get_account_settings) is None
    assert "AccessDeniedException" == refused(others("lambda").get_account_settings)


def test_what_the_emulator_cannot_name_is_refused(as_role: Any) -> None:
    lists = as_role("lists-layers", {"Action": "lambda:ListLayers", "Resource": "*"})

    assert refused(lists("lambda").get_function_recursion_config, FunctionName="any") is not None
