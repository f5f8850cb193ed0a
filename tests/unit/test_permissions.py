"""Each function may do what it does, under AWS's own names, and nothing more.

What functions do is recorded below their code, by the tests that run them (tests/conftest.py). Nothing here repeats
what the template or the code says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from importlib.resources import files
from typing import Any, Final

import pytest

from scripts.local_stack import StackError, permissions
from scripts.local_stack.deploy import refuse_what_lacks_permission
from scripts.local_stack.permissions import Grant, as_list, grants, of_type, problems
from tests.aws_calls import (
    AS_NAMED,
    GRANTED_ALL_THE_SAME,
    OTHERWISE_NAMED,
    Call,
    Need,
    missing,
    needed_by_aws,
    needs,
    recorded,
    unused,
)
from tests.expanded_template import expanded_template

EXPANDED: Final = expanded_template()
GRANTS: Final = grants(EXPANDED)
CALLS: Final = recorded()
WANTED: Final = [*needs(CALLS), *needed_by_aws(EXPANDED)]
FUNCTIONS: Final = of_type(EXPANDED, "AWS::Lambda::Function")


@cache
def reference(service: str) -> dict[str, Any]:
    """The service authorization reference, as cfn-lint ships it: actions in lower case, with their resource types."""
    shipped = files("cfnlint.data").joinpath("AdditionalSpecs", "Policies.json")
    actions: dict[str, Any] = json.loads(shipped.read_text())[service]["Actions"]
    return actions


def types_of(action: str) -> set[str] | None:
    """The types of resource an action can be granted on; None for an action that AWS does not have."""
    service, _, name = action.partition(":")
    found = reference(service).get(name.lower())
    return None if found is None else {each.lower() for each in found.get("Resources", ())}


def type_of(resource: str) -> str | None:
    """The reference's name for the type of a resource of the template; None for all of them."""
    name, _, below = resource.partition("/")
    if resource == "*":
        return None
    if name.startswith(("event-bus", "event-source-mapping:")):
        return "event-bus" if name == "event-bus" else "eventsourcemapping"
    return {
        "AWS::Lambda::Function": "function",
        "AWS::DynamoDB::Table": below.partition("/")[0] or "table",
        "AWS::S3::Bucket": "object" if below else "bucket",
        "AWS::SQS::Queue": "queue",
        "AWS::SecretsManager::Secret": "secret",
    }[EXPANDED["Resources"][name]["Type"]]


def test_every_recorded_call_is_permitted() -> None:
    assert [] == list(missing(WANTED, GRANTS))


def test_everything_that_is_permitted_is_done_or_has_its_reason() -> None:
    assert [] == list(unused(WANTED, GRANTS))


def test_calls_of_every_function_were_recorded() -> None:
    assert FUNCTIONS.keys() == {call.function for call in CALLS}


@pytest.mark.parametrize("grant", GRANTS, ids=lambda each: f"{each.function}-{each.action}")
def test_every_action_is_one_that_aws_has_on_a_resource_it_has(grant: Grant) -> None:
    """An action on a resource of another type grants nothing; one without types takes `*` alone."""
    types = types_of(grant.action)

    assert types is not None, "AWS has no such action"
    if types:
        assert type_of(grant.resource) in types
    else:
        assert grant.resource == "*"


@pytest.mark.parametrize(
    "action",
    sorted(
        {f"{service}:{each}" for service, names in AS_NAMED.items() for each in names}
        | set(OTHERWISE_NAMED.values())
    ),
)
def test_calls_are_compared_under_names_that_aws_has(action: str) -> None:
    assert types_of(action) is not None


@pytest.mark.parametrize("operation", sorted(OTHERWISE_NAMED))
def test_only_what_is_no_action_of_its_own_has_another_name(operation: str) -> None:
    assert types_of(operation) is None


@pytest.mark.parametrize("listed", GRANTED_ALL_THE_SAME)
def test_an_exception_is_still_granted_and_says_why(listed: tuple[str, str, str]) -> None:
    assert listed in {(each.function, each.action, each.resource) for each in GRANTS}
    assert GRANTED_ALL_THE_SAME[listed].endswith(".")


# The comparison has teeth -------------------------------------------------------------------------------------


def granted_actions() -> Iterator[tuple[str, int, int, str]]:
    """Every action of every statement of every role: role, policy, statement, action."""
    for role, properties in of_type(EXPANDED, "AWS::IAM::Role").items():
        for number, policy in enumerate(properties.get("Policies", [])):
            for place, statement in enumerate(policy["PolicyDocument"]["Statement"]):
                for action in as_list(statement["Action"]):
                    yield role, number, place, action


@pytest.mark.parametrize("taken", list(granted_actions()), ids=lambda each: f"{each[0]}-{each[3]}")
def test_each_action_that_is_taken_away_is_missed(taken: tuple[str, int, int, str]) -> None:
    role, number, place, action = taken
    template = deepcopy(EXPANDED)
    policy = template["Resources"][role]["Properties"]["Policies"][number]
    statement = policy["PolicyDocument"]["Statement"][place]
    statement["Action"] = [each for each in as_list(statement["Action"]) if each != action]

    found = [*missing(WANTED, grants(template)), *problems(template)]
    of_exceptions = {(function, name) for function, name, _ in GRANTED_ALL_THE_SAME}

    assert found or (role.removesuffix("Role"), action) in of_exceptions


@pytest.mark.parametrize("grant", GRANTS, ids=lambda each: f"{each.function}-{each.resource}")
def test_each_resource_that_is_taken_away_is_missed(grant: Grant) -> None:
    others = [each for each in GRANTS if each != grant]
    listed = (grant.function, grant.action, grant.resource) in GRANTED_ALL_THE_SAME

    assert list(missing(WANTED, others)) or listed


def test_a_grant_too_many_is_seen() -> None:
    too_much = Grant("WorkerFunction", "Any", "dynamodb:DeleteItem", "JobsTable")

    assert ["WorkerFunction may dynamodb:DeleteItem on JobsTable, and does not"] == list(
        unused(WANTED, [*GRANTS, too_much])
    )


def test_a_condition_is_part_of_a_grant() -> None:
    told = Need("JobEndsFunction", "events:PutEvents", "event-bus/default", {"events:source": "x"})

    assert list(missing([told], GRANTS))


def test_a_call_of_a_new_kind_asks_for_its_action() -> None:
    with pytest.raises(KeyError):
        needs([Call("WorkerFunction", "s3:RestoreObject", "DataBucket/in/...")])


# What AWS does itself -------------------------------------------------------------------------------------------


def test_aws_may_do_its_part() -> None:
    assert [] == problems(EXPANDED)


def changed(name: str, change: Any) -> dict[str, Any]:
    template = deepcopy(EXPANDED)
    change(template["Resources"][name]["Properties"])
    return template


def without(name: str) -> dict[str, Any]:
    template = deepcopy(EXPANDED)
    del template["Resources"][name]
    return template


def untrusted(role: dict[str, Any]) -> None:
    (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
    statement["Principal"] = {"Service": ["lambda.amazonaws.com"]}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (without("BatchesQueuePolicy"), "FileArrived: no queue policy of BatchesQueue lets"),
        (
            changed(
                "BatchesQueuePolicy",
                lambda policy: policy["PolicyDocument"]["Statement"][0]["Condition"].update(
                    ArnEquals={"aws:SourceArn": {"Fn::GetAtt": ["AnotherRule", "Arn"]}}
                ),
            ),
            "FileArrived: no queue policy of BatchesQueue lets",
        ),
        (without("ApiMayInvoke"), "ApiIntegration: no permission lets apigateway"),
        (
            changed("GovernorFunctionEveryMinuteRole", untrusted),
            "GovernorFunctionEveryMinute: its role may not invoke GovernorFunction",
        ),
        (
            changed("WorkerFunctionRole", lambda role: role.update(ManagedPolicyArns=[])),
            "WorkerFunctionRole: lacks service-role/AWSLambdaBasicExecutionRole",
        ),
    ],
)
def test_what_aws_may_not_do_is_named(template: dict[str, Any], problem: str) -> None:
    (found,) = problems(template)

    assert found.startswith(problem)


def test_a_template_that_lacks_a_permission_is_not_deployed() -> None:
    with pytest.raises(StackError, match=r"would fail on AWS: FileArrived: no queue policy"):
        refuse_what_lacks_permission(without("BatchesQueuePolicy"))


@pytest.mark.parametrize(
    "action",
    sorted(permissions.QUEUE_ACTIONS | permissions.STREAM_ACTIONS | {permissions.LIST_STREAMS}),
)
def test_what_lambda_does_to_wake_a_function_has_aws_names(action: str) -> None:
    assert types_of(action) is not None
