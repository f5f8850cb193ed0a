"""The AWS calls that functions make, as recorded below their code, against what the template permits.

`python -m tests.aws_calls FOLDER` compares what a run recorded there, such as one of `make chaos`.

`make record-calls` runs the tests that drive functions, and writes what they recorded to `RECORDED`. At the end of
every test run, what was recorded in it is compared as well (tests/conftest.py): a new call cannot go unnoticed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from scripts.local_stack.permissions import Grant, grants, needed_for, of_type
from tests.expanded_template import expanded_template, template

RECORDED: Final = Path(__file__).parent / "fixtures" / "aws_calls.json"

AS_NAMED: Final = {
    "dynamodb": {
        "BatchGetItem", "BatchWriteItem", "DeleteItem", "GetItem", "PutItem", "Query", "Scan", "UpdateItem",
    },
    "lambda": {"GetAccountSettings", "GetEventSourceMapping", "UpdateEventSourceMapping"},
    "s3": {"AbortMultipartUpload", "GetObject", "PutObject"},
    "secretsmanager": {"DescribeSecret", "GetSecretValue"},
    "sqs": {
        "ChangeMessageVisibility", "DeleteMessage", "GetQueueAttributes", "ReceiveMessage",
        "SendMessage",
    },
}  # fmt: skip
"""Operations whose action has the same name.

https://docs.aws.amazon.com/service-authorization/latest/reference/reference_policies_actions-resources-contextkeys.html
"""

OTHERWISE_NAMED: Final = {
    # https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ql-iam.html
    "dynamodb:BatchExecuteStatement INSERT": "dynamodb:PartiQLInsert",
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
    "s3:DeleteObjects": "s3:DeleteObject",
    "s3:HeadObject": "s3:GetObject",
    "s3:ListObjectsV2": "s3:ListBucket",
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html#mpuAndPermissions
    "s3:CreateMultipartUpload": "s3:PutObject",
    "s3:UploadPart": "s3:PutObject",
    "s3:UploadPartCopy": "s3:PutObject",
    "s3:CompleteMultipartUpload": "s3:PutObject",
    "s3:ReadCopySource": "s3:GetObject",
    # https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html, "Permissions": else the answer is 403
    "s3:SeeThatAnObjectIsMissing": "s3:ListBucket",
    # https://docs.aws.amazon.com/lambda/latest/api/API_Invoke.html: "requires permission for lambda:InvokeFunction"
    "lambda:Invoke": "lambda:InvokeFunction",
    # https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-api-permissions-reference.html
    "sqs:ChangeMessageVisibilityBatch": "sqs:ChangeMessageVisibility",
    "sqs:DeleteMessageBatch": "sqs:DeleteMessage",
    "sqs:SendMessageBatch": "sqs:SendMessage",
}

_AFTER_A_FAILED_WRITE: Final = (
    "Clears an upload whose writing failed; its parts are invisible and paid for."
)
GRANTED_ALL_THE_SAME: Final[Mapping[tuple[str, str, str], str]] = {
    ("BatchesFunction", "s3:AbortMultipartUpload", "DataBucket/out/*"): _AFTER_A_FAILED_WRITE,
    ("BatchesFunction", "s3:AbortMultipartUpload", "DataBucket/batches/*"): _AFTER_A_FAILED_WRITE,
    ("RangesFunction", "s3:AbortMultipartUpload", "DataBucket/out/*"): _AFTER_A_FAILED_WRITE,
    ("RangesFunction", "s3:AbortMultipartUpload", "DataBucket/batches/*"): _AFTER_A_FAILED_WRITE,
    ("UpstreamFunction", "s3:AbortMultipartUpload", "DataBucket/batches/*"): _AFTER_A_FAILED_WRITE,
    ("UpstreamFunction", "dynamodb:Query", "LedgerTable"): (
        "Reads the calls of a worker that died with a range of a canceled batch, whose results arrive later."
    ),
}
"""Grants that no recorded call uses, as function, action and resource, each with its reason."""


@dataclass(frozen=True, order=True)
class Call:
    """One kind of call, as recorded."""

    function: str
    """The function's logical id."""
    operation: str
    resource: str
    """With logical ids, such as `DataBucket/in/...`."""


@dataclass(frozen=True)
class Need:
    """The permissions that a call requires."""

    function: str
    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict, compare=False)
    call: str = "it"
    """The operation as it was recorded."""

    def is_met_by(self, grant: Grant) -> bool:
        """Return whether the grant permits it."""
        return grant.function == self.function and grant.covers(
            self.action, self.resource, self.context
        )


def read(folder: Path) -> set[Call]:
    """Return what processes recorded into a folder."""
    names = variables()
    found = set()
    for file in folder.glob("*.jsonl"):
        # A process that was killed may have written half a line.
        for line in file.read_text().split("\n")[:-1]:
            call = json.loads(line)
            resource = re.sub(r"^\$\{([^}]+)\}", lambda name: names[name[1]], call["resource"])
            found.add(Call(logical_id(call["function"]), call["operation"], resource))
    return found


def recorded() -> set[Call]:
    """Return the calls that are recorded in the repository."""
    return {Call(*each) for each in json.loads(RECORDED.read_text())}


def logical_id(function: str) -> str:
    """Return a function's logical id, given the name that CloudFormation makes of it, or the id itself."""
    named = re.search(r"(?:^|-)(\w+Function)(?:-|$)", function)
    if named is None:
        raise ValueError(f"{function} is no function of the template")
    return named[1]


@cache
def variables() -> dict[str, str]:
    """Return which resource each environment variable of the functions names."""
    written = template()
    own = [
        function.get("Environment", {}).get("Variables", {})
        for function in of_type(written, "AWS::Serverless::Function").values()
    ]
    everybodys = written["Globals"]["Function"]["Environment"]["Variables"]
    return dict(
        named
        for some in (everybodys, *own)
        for variable, value in some.items()
        for named in _resources_in(variable, value)
    )


def _resources_in(variable: str, value: Any) -> Iterator[tuple[str, str]]:
    match value:
        case {"Ref": str(name)}:
            yield variable, name
        case {"Fn::Sub": str(text)} if text.startswith("{"):
            for key, name in json.loads(re.sub(r"\$\{(\w+)\}", r"\1", text)).items():
                yield f"{variable}.{key}", name


def needs(calls: Iterable[Call]) -> list[Need]:
    """Return what calls need. Raises `KeyError` for an operation that has no line above yet."""
    return [_need(call) for call in sorted(calls)]


def _need(call: Call) -> Need:
    service, _, operation = call.operation.partition(":")
    action, resource, context = call.operation, call.resource, {}
    if service == "events":
        action, _, context["events:source"] = action.partition(" of ")
    elif operation not in AS_NAMED.get(service, ()):
        action = OTHERWISE_NAMED[call.operation]
    if "EventSourceMapping" in operation:
        resource = f"event-source-mapping:{resource}"
    if action == "s3:ListBucket":
        resource, _, prefix = resource.partition("/")
        context |= {"s3:prefix": prefix} if prefix else {}
    return Need(call.function, action, resource, context, call.operation)


def missing(wanted: Iterable[Need], permitted: Iterable[Grant]) -> Iterator[str]:
    """Yield each call that AWS would refuse."""
    permitted = list(permitted)
    for need in wanted:
        if not any(need.is_met_by(grant) for grant in permitted):
            yield f"{need.function} calls {need.call}, and may not {need.action} on {need.resource}"


def unused(
    wanted: Iterable[Need],
    permitted: Iterable[Grant],
    reasons: Mapping[tuple[str, str, str], str] = GRANTED_ALL_THE_SAME,
) -> Iterator[str]:
    """Yield each grant that nothing needs and that has no reason."""
    wanted = list(wanted)
    for grant in permitted:
        has_reason = (grant.function, grant.action, grant.resource) in reasons
        if not has_reason and not any(need.is_met_by(grant) for need in wanted):
            yield f"{grant.function} may {grant.action} on {grant.resource}, and does not"


def needed_by_aws(expanded: Mapping[str, Any]) -> list[Need]:
    """Return what Lambda does as each function's role to wake it."""
    return [
        Need(mapping["FunctionName"]["Fn::GetAtt"][0], action, resource, call="its event source")
        for mapping in of_type(expanded, "AWS::Lambda::EventSourceMapping").values()
        for action, resource in needed_for(mapping["EventSourceArn"])
    ]


def write(calls: Iterable[Call]) -> None:
    """Put calls into the repository, one a line, so that a change shows what changed."""
    lines = [
        json.dumps([call.function, call.operation, call.resource]) for call in sorted(set(calls))
    ]
    RECORDED.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m tests.aws_calls", description=__doc__)
    made.add_argument("folder", type=Path, help="where SLUICE_RECORD_CALLS had calls recorded")
    return made


def main() -> int:
    """Compare the calls in a folder; return 1 when one is not permitted."""
    calls = read(parser().parse_args().folder)
    refused = list(missing(needs(calls), grants(expanded_template())))
    print("\n".join([*refused, f"{len(calls)} kinds of AWS calls, {len(refused)} not permitted"]))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
