"""What the template permits, read from its expanded form, and what AWS itself needs permitted to run it.

The emulator invokes functions without asking whether it may. On AWS an event source mapping is not even created while
the role of its function cannot read the source, and a queue, a function or a schedule that does not let its caller in
stays silent. `problems` finds these before a stack is created.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

Template = Mapping[str, Any]
Json = Any

QUEUE_ACTIONS: Final = frozenset(
    {"sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"}
)
"""What Lambda does with a queue, as the function's role.

https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-configure.html, "Configuring execution role permissions"
"""

STREAM_ACTIONS: Final = frozenset(
    {"dynamodb:DescribeStream", "dynamodb:GetRecords", "dynamodb:GetShardIterator"}
)
LIST_STREAMS: Final = "dynamodb:ListStreams"
"""What Lambda does with a table's stream, as the function's role. A list of streams is of the whole account.

https://docs.aws.amazon.com/lambda/latest/dg/services-dynamodb-eventsourcemapping.html, and for ListStreams the service
authorization reference, in which it has no resource type.
"""

LOGS_POLICY: Final = "service-role/AWSLambdaBasicExecutionRole"
"""With it Lambda writes the function's log, as the function's role.

https://docs.aws.amazon.com/lambda/latest/dg/lambda-intro-execution-role.html
"""


@dataclass(frozen=True, slots=True)
class Grant:
    """One action that the role of one function may perform on one resource."""

    function: str
    """Logical id."""
    sid: str
    action: str
    resource: str
    """A pattern of logical ids, such as `DataBucket/in/*`; see `written`."""
    conditions: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def covers(self, action: str, resource: str, context: Mapping[str, str]) -> bool:
        """Return whether it permits a request."""
        return (
            self.action == action
            and fnmatchcase(resource, self.resource)
            and all(_holds(*each, context) for each in self.conditions.items())
        )


def grants(template: Template) -> list[Grant]:
    """Return all that the functions' own policies permit. Raises `ValueError` for a statement of another kind."""
    found = []
    for name, role in of_type(template, "AWS::IAM::Role").items():
        if not name.endswith("FunctionRole"):
            continue
        for policy in role.get("Policies", []):
            for statement in policy["PolicyDocument"]["Statement"]:
                if statement["Effect"] != "Allow" or not {"Action", "Resource"} <= statement.keys():
                    raise ValueError(f"{name}, {statement.get('Sid')}: only plain grants are read")
                found += [
                    Grant(
                        name.removesuffix("Role"),
                        str(statement.get("Sid")),
                        action,
                        written(resource),
                        statement.get("Condition", {}),
                    )
                    for action in as_list(statement["Action"])
                    for resource in as_list(statement["Resource"])
                ]
    return found


def written(resource: Json) -> str:
    """Write a resource of a policy with logical ids, without the part that depends on account and region."""
    match resource:
        case {"Ref": str(name)} | {"Fn::GetAtt": [str(name), "Arn"]}:
            return name
        case {"Fn::GetAtt": [str(name), "StreamArn"]}:
            return f"{name}/stream/*"
        case {"Fn::Sub": str(text)}:
            text = re.sub(r"\$\{AWS::\w+\}", "", text)
            text = re.sub(r"^arn::[^:]+:::", "", text)
            return re.sub(r"\$\{(\w+)(?:\.Arn)?\}", r"\1", text)
        case str(text):
            return text
        case _:
            raise ValueError(f"a resource that is not understood: {resource}")


def problems(template: Template) -> list[str]:
    """Return, in one line each, what AWS would refuse or do in vain for want of a permission."""
    return [
        *_mappings_that_may_not_read(template),
        *_roles_without_logs(template),
        *_rules_that_may_not_send(template),
        *_integrations_that_may_not_invoke(template),
        *_schedules_that_may_not_invoke(template),
    ]


def needed_for(source: Json) -> Iterator[tuple[str, str]]:
    """Yield each action, with its resource, that Lambda performs as the function's role to read an event source."""
    match source:
        case {"Fn::GetAtt": [str(queue), "Arn"]}:
            for action in QUEUE_ACTIONS:
                yield action, queue
        case {"Fn::GetAtt": [str(table), "StreamArn"]}:
            for action in STREAM_ACTIONS:
                yield action, f"{table}/stream/*"
            yield LIST_STREAMS, "*"
        case _:
            raise ValueError(f"an event source that is not understood: {source}")


def _mappings_that_may_not_read(template: Template) -> Iterator[str]:
    """https://docs.aws.amazon.com/lambda/latest/api/API_CreateEventSourceMapping.html: it is refused then."""
    all_grants = grants(template)
    for name, mapping in of_type(template, "AWS::Lambda::EventSourceMapping").items():
        function = _name(mapping["FunctionName"])
        for action, resource in sorted(needed_for(mapping["EventSourceArn"])):
            if not any(
                grant.function == function and grant.covers(action, resource, {})
                for grant in all_grants
            ):
                yield f"{name}: the role of {function} lacks {action} on {resource}"


def _roles_without_logs(template: Template) -> Iterator[str]:
    for name, role in of_type(template, "AWS::IAM::Role").items():
        if name.endswith("FunctionRole") and LOGS_POLICY not in str(role.get("ManagedPolicyArns")):
            yield f"{name}: lacks {LOGS_POLICY}, so the function writes no log"


def _rules_that_may_not_send(template: Template) -> Iterator[str]:
    """https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-use-resource-based.html: SQS by queue policy."""
    permitted = [
        (_name(statement["Resource"]), statement.get("Condition"))
        for policy in of_type(template, "AWS::SQS::QueuePolicy").values()
        for statement in policy["PolicyDocument"]["Statement"]
        if statement["Effect"] == "Allow"
        and statement["Principal"] == {"Service": "events.amazonaws.com"}
        and "sqs:SendMessage" in as_list(statement["Action"])
    ]
    for name, rule in of_type(template, "AWS::Events::Rule").items():
        of_this_rule = {"ArnEquals": {"aws:SourceArn": {"Fn::GetAtt": [name, "Arn"]}}}
        for target in rule["Targets"]:
            queue = _name(target["Arn"])
            if (queue, None) not in permitted and (queue, of_this_rule) not in permitted:
                yield f"{name}: no queue policy of {queue} lets events.amazonaws.com send for it"


def _integrations_that_may_not_invoke(template: Template) -> Iterator[str]:
    """https://docs.aws.amazon.com/apigateway/latest/developerguide/http-api-develop-integrations-lambda.html."""
    permitted = {
        (_name(each["FunctionName"]), str(each["Principal"]))
        for each in of_type(template, "AWS::Lambda::Permission").values()
        if each["Action"] == "lambda:InvokeFunction"
    }
    for name, integration in of_type(template, "AWS::ApiGatewayV2::Integration").items():
        function = _name(integration["IntegrationUri"])
        if (function, "apigateway.amazonaws.com") not in permitted:
            yield f"{name}: no permission lets apigateway.amazonaws.com invoke {function}"


def _schedules_that_may_not_invoke(template: Template) -> Iterator[str]:
    """https://docs.aws.amazon.com/scheduler/latest/UserGuide/setting-up.html: by the role of the schedule."""
    roles = of_type(template, "AWS::IAM::Role")
    for name, schedule in of_type(template, "AWS::Scheduler::Schedule").items():
        function, role = schedule["Target"]["Arn"], roles[_name(schedule["Target"]["RoleArn"])]
        statements = [
            statement
            for policy in role.get("Policies", [])
            for statement in policy["PolicyDocument"]["Statement"]
        ]
        trusts = "scheduler.amazonaws.com" in str(role["AssumeRolePolicyDocument"])
        if not trusts or not any(
            "lambda:InvokeFunction" in as_list(each["Action"])
            and function in as_list(each["Resource"])
            for each in statements
        ):
            yield f"{name}: its role may not invoke {_name(function)}"


def of_type(template: Template, kind: str) -> dict[str, dict[str, Any]]:
    """Return the properties of every resource of one type, by logical id."""
    return {
        name: resource.get("Properties", {})
        for name, resource in template["Resources"].items()
        if resource["Type"] == kind
    }


def as_list(value: Json) -> list[Any]:
    """Return a list of one, if it is not a list: policies leave the brackets out."""
    return value if isinstance(value, list) else [value]


def _name(reference: Json) -> str:
    return written(reference)


def _holds(operator: str, keys: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    """Return whether a condition holds.

    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html
    """
    _, for_all, comparison = operator.rpartition("ForAllValues:")
    if comparison not in {"StringEquals", "StringLike", "StringLikeIfExists"}:
        raise ValueError(f"a condition that is not understood: {operator}")
    for key, wanted in keys.items():
        given = context.get(key)
        if given is None:
            # Of no value, all are as wanted.
            if not for_all and not comparison.endswith("IfExists"):
                return False
        elif not any(
            given == each if comparison == "StringEquals" else fnmatchcase(given, each)
            for each in as_list(wanted)
        ):
            return False
    return True
