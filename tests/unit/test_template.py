"""What template.yaml must hold, and no linter checks."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice.adapters import web
from sluice.adapters.dynamodb import SHORT_DAYS
from sluice.adapters.job_records import WAITING_DAYS
from sluice.adapters.sqs import HIDE_SECONDS
from sluice.domain.capacity import LEAST
from sluice.domain.jobs import State
from sluice.domain.shares import RESERVED
from sluice.domain.waits import LEASE_MS
from sluice.intake.submit import START_WITHIN_MS
from sluice.ports.metrics import BY_MODEL_GROUP, METRIC_NAMES, TOTALS
from sluice.settings import MAPPINGS as MAPPINGS_BY_QUEUE
from sluice.upkeep.schedule import RUN_MS
from sluice.wiring.governor import LONG_TIMEOUT_MS, SHORT, SHORT_TIMEOUT_MS
from tests.expanded_template import expanded_template, template

ROOT = Path(__file__).parents[2]

Properties = dict[str, Any]

WRITTEN = template()
EXPANDED = expanded_template()
RESOURCES = WRITTEN["Resources"]
PARAMETERS = WRITTEN["Parameters"]
OUTPUTS = WRITTEN["Outputs"]


def of_type(kind: str, resources: Properties = RESOURCES) -> dict[str, Properties]:
    """The properties of every resource of one type, by logical id."""
    return {
        name: resource.get("Properties", {})
        for name, resource in resources.items()
        if resource["Type"] == kind
    }


FUNCTIONS = of_type("AWS::Serverless::Function")
QUEUES = of_type("AWS::SQS::Queue")
MAPPINGS = of_type("AWS::Lambda::EventSourceMapping")
TABLES = of_type("AWS::DynamoDB::Table")
ALARMS = of_type("AWS::CloudWatch::Alarm")
STATEFUL = {
    name
    for kind in (
        "AWS::DynamoDB::Table",
        "AWS::Logs::LogGroup",
        "AWS::S3::Bucket",
        "AWS::SecretsManager::Secret",
        "AWS::SQS::Queue",
    )
    for name in of_type(kind)
}
DEAD_LETTER_QUEUES = {
    queue["RedrivePolicy"]["deadLetterTargetArn"]["Fn::GetAtt"][0]
    for queue in QUEUES.values()
    if "RedrivePolicy" in queue
}


STREAMS = {name: each for name, each in MAPPINGS.items() if "StartingPosition" in each}
OF_QUEUES = {name: each for name, each in MAPPINGS.items() if name not in STREAMS}

GOVERNED = {
    "jobs": "WorkerMapping",
    "ranges": "RangesMapping",
    "batches": "BatchesMapping",
    "webhooks": "WebhooksMapping",
    "dead letters": "DeadLettersMapping",
    "range dead letters": "RangeDeadLettersMapping",
}
"""The governor's words for the queues whose mappings it sets."""


def source_queue(mapping: Properties) -> str:
    name: str = mapping["EventSourceArn"]["Fn::GetAtt"][0]
    return name


def target_function(mapping: Properties) -> str:
    name: str = mapping["FunctionName"]["Fn::GetAtt"][0]
    return name


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def statements() -> Iterator[tuple[str, Properties]]:
    """Every policy statement after the SAM transform, with the resource it belongs to."""
    for name, role in of_type("AWS::IAM::Role", EXPANDED["Resources"]).items():
        for policy in role.get("Policies", []):
            for statement in policy["PolicyDocument"]["Statement"]:
                yield name, statement
    for name, policy in of_type("AWS::S3::BucketPolicy", EXPANDED["Resources"]).items():
        for statement in policy["PolicyDocument"]["Statement"]:
            yield name, statement


# Parameters and outputs


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_described(name: str) -> None:
    assert PARAMETERS[name].get("Description", "").endswith(".")


@pytest.mark.parametrize(
    "name", [name for name, parameter in PARAMETERS.items() if parameter["Type"] == "Number"]
)
def test_every_number_has_its_unit_in_its_first_words(name: str) -> None:
    first = PARAMETERS[name]["Description"].lower().split()[:3]

    units = {
        *{"attempts", "days", "dollars", "executions", "percentage", "requests", "seconds"},
        "workers",
    }
    assert len(units & set(first)) == 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_has_a_default_so_that_a_deploy_asks_nothing(name: str) -> None:
    assert "Default" in PARAMETERS[name]


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_says_what_to_do_with_it(name: str) -> None:
    assert OUTPUTS[name].get("Description", "").endswith(".")


# Functions


@pytest.mark.parametrize("name", FUNCTIONS)
def test_folder_handler_and_build_target_agree_with_the_logical_id(name: str) -> None:
    folder = ROOT / FUNCTIONS[name]["CodeUri"]

    assert name == "".join(word.title() for word in folder.name.split("_")) + "Function"
    assert f"build-{name}:" in (folder / "Makefile").read_text()
    assert (folder / "app.py").exists()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_logs_json_to_a_group_of_its_own(name: str) -> None:
    logging = FUNCTIONS[name]["LoggingConfig"]

    assert "JSON" == logging["LogFormat"]
    assert [name] == [
        other
        for other, function in FUNCTIONS.items()
        if function["LoggingConfig"]["LogGroup"] == logging["LogGroup"]
    ]
    assert logging["LogGroup"]["Ref"] in of_type("AWS::Logs::LogGroup")


@pytest.mark.parametrize("name", of_type("AWS::Logs::LogGroup"))
def test_no_log_is_kept_indefinitely(name: str) -> None:
    assert {"Ref": "LogRetentionDays"} == RESOURCES[name]["Properties"]["RetentionInDays"]


def test_the_environment_is_what_settings_read() -> None:
    settings = ast.parse((ROOT / "layers/sluice/sluice/settings.py").read_text())
    read = {
        node.value
        for node in ast.walk(settings)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"SLUICE_[A-Z_]+", node.value)
    }
    variables = WRITTEN["Globals"]["Function"]["Environment"]["Variables"]
    given = {name for name in variables if not name.startswith("POWERTOOLS_")}

    # A deployment keeps the usual waits: shorter ones are for tests and benchmarks, which set them themselves.
    of_runs = {"SLUICE_WAITS"}
    governors = FUNCTIONS["GovernorFunction"]["Environment"]["Variables"].keys()
    assert read == given | governors | of_runs
    assert not (given | governors) & of_runs


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"GovernorFunction"}))
def test_no_function_but_the_governor_has_an_environment_of_its_own(name: str) -> None:
    assert "Environment" not in FUNCTIONS[name]


def test_only_the_governor_knows_the_mappings_which_would_else_refer_to_themselves() -> None:
    variables = dict(FUNCTIONS["GovernorFunction"]["Environment"]["Variables"])
    mappings = json.loads(variables.pop("SLUICE_MAPPINGS")["Fn::Sub"])

    assert {queue: f"${{{mapping}}}" for queue, mapping in GOVERNED.items()} == mappings
    assert {
        "SLUICE_MAX_CONCURRENCY": {"Ref": "MaxConcurrency"},
        "SLUICE_BULK_CONCURRENCY": {"Ref": "BulkConcurrency"},
        "SLUICE_LAMBDA_CONCURRENCY": {"Ref": "LambdaConcurrency"},
        "SLUICE_UPSTREAM_FUNCTION": {"Ref": "UpstreamFunction"},
    } == variables


def test_every_mapping_of_a_queue_is_governed() -> None:
    """One that is not would use executions that the governor gives to others."""
    assert set(OF_QUEUES) == set(GOVERNED.values())
    assert set(MAPPINGS_BY_QUEUE) == GOVERNED.keys()


# Permissions


def test_no_statement_allows_everything_of_anything() -> None:
    for name, statement in statements():
        if statement["Effect"] == "Allow":
            actions = as_list(statement["Action"])
            assert not [action for action in actions if "*" in action], f"{name}: {actions}"


def test_the_only_managed_policy_is_the_one_that_writes_logs() -> None:
    managed = {
        json.dumps(arn).rpartition("/")[2].strip('"}')
        for role in of_type("AWS::IAM::Role", EXPANDED["Resources"]).values()
        for arn in role.get("ManagedPolicyArns", [])
    }

    assert {"AWSLambdaBasicExecutionRole"} == managed


def test_no_function_may_send_to_the_queue_that_wakes_it() -> None:
    """Lambda would stop it as a recursive loop, without a word in its log."""
    senders = {
        (name.removesuffix("Role"), queue["Fn::GetAtt"][0])
        for name, statement in statements()
        if "sqs:SendMessage" in as_list(statement["Action"])
        for queue in as_list(statement["Resource"])
    }
    woken = {(target_function(each), source_queue(each)) for each in MAPPINGS.values()}

    assert {("ApiFunction", "JobsQueue"), ("GovernorFunction", "JobsQueue")} <= senders
    assert set() == senders & woken


@pytest.mark.parametrize("queue", GOVERNED)
def test_the_governor_knows_how_long_an_invocation_can_last(queue: str) -> None:
    """What a disabled mapping may still be using is given away after that time."""
    timeout = FUNCTIONS[target_function(MAPPINGS[GOVERNED[queue]])]["Timeout"]

    assert timeout * 1000 == (SHORT_TIMEOUT_MS if queue in SHORT else LONG_TIMEOUT_MS)


def test_the_schedule_is_the_one_that_upkeep_counts_on() -> None:
    governor = FUNCTIONS["GovernorFunction"]

    assert "rate(1 minute)" == governor["Events"]["EveryMinute"]["Properties"]["ScheduleExpression"]
    assert (RUN_MS, RUN_MS) == (60_000, governor["Timeout"] * 1000)


def test_a_running_job_or_range_keeps_its_message_hidden() -> None:
    """Workers shorten the visibility timeout of a message; a crash before that must not free the job early."""
    for queue in ("JobsQueue", "RangesQueue"):
        assert QUEUES[queue]["VisibilityTimeout"] * 1000 > LEASE_MS


def test_a_function_has_time_for_what_it_waits_for() -> None:
    webhooks, api = FUNCTIONS["WebhooksFunction"], FUNCTIONS["ApiFunction"]

    assert (
        web.LOOKUP_SECONDS + web.SECONDS < webhooks["Timeout"]
    )  # the lookup of the address, then the delivery
    assert 3 * START_WITHIN_MS < api["Timeout"] * 1000  # store calls that start last, then sending
    assert HIDE_SECONDS < QUEUES["BatchesQueue"]["VisibilityTimeout"]


def test_a_failed_run_of_the_governor_is_not_repeated_and_a_throttled_one_for_a_minute() -> None:
    """The next minute is the retry."""
    config = FUNCTIONS["GovernorFunction"]["EventInvokeConfig"]

    assert {"MaximumRetryAttempts": 0, "MaximumEventAgeInSeconds": 60} == config


def test_only_the_api_may_delete_data_and_only_the_objects_of_batches() -> None:
    """For DELETE of a batch. Everything else expires."""
    deletes = {
        (name, action, str(resource))
        for name, statement in statements()
        for action in as_list(statement["Action"])
        if re.match(r"(dynamodb|s3):(Delete|Purge)", action)
        for resource in as_list(statement["Resource"])
    }

    assert {
        ("ApiFunctionRole", "s3:DeleteObject", str({"Fn::Sub": f"${{DataBucket.Arn}}/{prefix}/*"}))
        for prefix in ("out", "batches", "in/*/.uploads")
    } | {
        (
            "UpstreamFunctionRole",
            "s3:DeleteObject",
            str({"Fn::Sub": "${DataBucket.Arn}/batches/upstream_*"}),
        )
    } | {
        (role, "dynamodb:DeleteItem", str({"Fn::GetAtt": ["BatchesTable", "Arn"]}))
        for role in ("RangesFunctionRole", "UpstreamFunctionRole")
    } == deletes
    for sid, partition in (("WelcomeNewcomers", "newcomers"), ("LeaveWaitingList", "collect")):
        (listed,) = (each for _, each in statements() if each.get("Sid") == sid)
        only = {"ForAllValues:StringEquals": {"dynamodb:LeadingKeys": [partition]}}
        assert only == listed["Condition"], "entries of a list, no data"


# Queues


@pytest.mark.parametrize("name", sorted(QUEUES.keys() - DEAD_LETTER_QUEUES))
def test_every_queue_has_a_dead_letter_queue(name: str) -> None:
    redrive = QUEUES[name]["RedrivePolicy"]

    assert redrive["deadLetterTargetArn"]["Fn::GetAtt"][0] in QUEUES
    # Every snooze is a receive, and none is an attempt. In these two nothing snoozes.
    fewer = {"BatchesQueue": 300, "WebhooksQueue": 100}
    assert fewer.get(name, 1000) == redrive["maxReceiveCount"]


@pytest.mark.parametrize("name", QUEUES)
def test_every_queue_is_encrypted_and_keeps_messages_as_long_as_sqs_can(name: str) -> None:
    fourteen_days = 14 * 24 * 60 * 60

    assert QUEUES[name]["SqsManagedSseEnabled"] is True
    assert fourteen_days == QUEUES[name]["MessageRetentionPeriod"]


@pytest.mark.parametrize("name", QUEUES)
def test_every_queue_is_consumed(name: str) -> None:
    assert name in {source_queue(mapping) for mapping in MAPPINGS.values()}


@pytest.mark.parametrize("name", OF_QUEUES)
def test_visibility_is_at_least_six_times_the_consumer_timeout(name: str) -> None:
    visibility = QUEUES[source_queue(MAPPINGS[name])]["VisibilityTimeout"]
    timeout = FUNCTIONS[target_function(MAPPINGS[name])]["Timeout"]

    assert visibility >= 6 * timeout


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_mapping_reports_failures_one_by_one(name: str) -> None:
    assert ["ReportBatchItemFailures"] == MAPPINGS[name]["FunctionResponseTypes"]


@pytest.mark.parametrize("name", OF_QUEUES)
def test_every_mapping_is_within_what_lambda_accepts(name: str) -> None:
    mapping = MAPPINGS[name]

    assert 2 <= mapping["ScalingConfig"]["MaximumConcurrency"] <= 1000
    assert mapping["BatchSize"] <= 10 or mapping["MaximumBatchingWindowInSeconds"] >= 1


@pytest.mark.parametrize("name", OF_QUEUES)
def test_every_mapping_starts_with_the_least_and_switched_on(name: str) -> None:
    """Until its first run the governor can lower nothing, and a new account has 10 executions for everything."""
    assert {"MaximumConcurrency": LEAST} == MAPPINGS[name]["ScalingConfig"]
    # With a value here, a later change of the mapping would set it again, over what a person or the governor did.
    assert "Enabled" not in MAPPINGS[name]


@pytest.mark.parametrize("name", ["MaxConcurrency", "BulkConcurrency"])
def test_the_ceilings_are_within_what_lambda_accepts(name: str) -> None:
    assert (2, 1000) == (PARAMETERS[name]["MinValue"], PARAMETERS[name]["MaxValue"])


def test_what_is_reserved_is_one_execution_for_each_function_that_no_queue_wakes() -> None:
    woken = {target_function(MAPPINGS[name]) for name in OF_QUEUES}

    assert RESERVED == len(FUNCTIONS.keys() - woken)


# API


def test_the_function_answers_before_the_gateway_gives_up() -> None:
    (integration,) = of_type("AWS::ApiGatewayV2::Integration").values()

    assert FUNCTIONS["ApiFunction"]["Timeout"] * 1000 < integration["TimeoutInMillis"]


def test_the_stage_throttles_and_logs() -> None:
    (stage,) = of_type("AWS::ApiGatewayV2::Stage").values()

    assert {"ThrottlingRateLimit", "ThrottlingBurstLimit"} <= stage["DefaultRouteSettings"].keys()
    assert json.loads(stage["AccessLogSettings"]["Format"])


# Batches


@pytest.mark.parametrize("told", ["true", "false"])
def test_the_stream_shows_ends_alone_and_on_demand_only_those_with_a_webhook(told: str) -> None:
    (stream,) = STREAMS.values()
    condition, of_all, of_some = stream["FilterCriteria"]["Filters"][0]["Pattern"]["Fn::If"]
    pattern = json.loads(of_all if told == "true" else of_some)["dynamodb"]["NewImage"]

    assert {"Fn::Equals": [{"Ref": "JobEvents"}, "true"]} == WRITTEN["Conditions"][condition]
    assert {each.value for each in State if each.is_final} == set(pattern["state"]["S"])
    assert ("webhook" in pattern) == (told == "false")
    assert {"StreamViewType": "NEW_IMAGE"} == TABLES["JobsTable"]["StreamSpecification"]
    assert "TRIM_HORIZON" == stream["StartingPosition"]


def test_a_file_under_in_wakes_the_planner_through_a_queue() -> None:
    """By EventBridge: a bucket's own notification would have to know the queue, and the queue's policy the bucket."""
    bucket = RESOURCES["DataBucket"]["Properties"]["NotificationConfiguration"]
    rule = RESOURCES["FileArrived"]["Properties"]
    (statement,) = RESOURCES["BatchesQueuePolicy"]["Properties"]["PolicyDocument"]["Statement"]

    assert {"EventBridgeConfiguration": {"EventBridgeEnabled": True}} == bucket
    assert [{"prefix": "in/"}] == rule["EventPattern"]["detail"]["object"]["key"]
    assert {"Fn::GetAtt": ["BatchesQueue", "Arn"]} == rule["Targets"][0]["Arn"]
    assert {"Service": "events.amazonaws.com"} == statement["Principal"]
    assert {"Fn::GetAtt": ["FileArrived", "Arn"]} == statement["Condition"]["ArnEquals"][
        "aws:SourceArn"
    ]


def test_one_message_at_a_time_where_one_is_as_much_as_an_invocation_does() -> None:
    for name in ("BatchesMapping", "RangesMapping", "RangeDeadLettersMapping"):
        assert 1 == MAPPINGS[name]["BatchSize"]


# Stores


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_every_data_resource_states_whether_it_outlives_the_stack(name: str) -> None:
    kept = (RESOURCES[name].get("DeletionPolicy"), RESOURCES[name].get("UpdateReplacePolicy"))

    assert kept in {("RetainExceptOnCreate", "Retain"), ("Delete", "Delete")}


def test_what_cannot_be_made_again_outlives_the_stack() -> None:
    outlive = {n for n in STATEFUL if RESOURCES[n]["DeletionPolicy"] == "RetainExceptOnCreate"}

    assert outlive == TABLES.keys() - {"LimitsTable"} | {
        "DataBucket",
        "ClientKeyPepper",
        "WebhookSecret",
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_on_demand_and_recoverable(name: str) -> None:
    assert "PAY_PER_REQUEST" == TABLES[name]["BillingMode"]
    assert TABLES[name]["PointInTimeRecoverySpecification"]["PointInTimeRecoveryEnabled"] is True


@pytest.mark.parametrize("name", sorted(TABLES.keys() - {"ClientKeysTable"}))
def test_every_table_but_the_client_keys_forgets(name: str) -> None:
    forget = {"AttributeName": "expires_at", "Enabled": True}

    assert forget == TABLES[name]["TimeToLiveSpecification"]


def test_a_client_key_does_not_expire_by_itself() -> None:
    assert "TimeToLiveSpecification" not in TABLES["ClientKeysTable"]


def test_the_bucket_is_private_encrypted_and_forgets() -> None:
    (bucket,) = of_type("AWS::S3::Bucket").values()
    expiring = {
        rule["Prefix"]
        for rule in bucket["LifecycleConfiguration"]["Rules"]
        if rule.get("ExpirationInDays") == {"Ref": "RetentionDays"} and rule["Status"] == "Enabled"
    }
    waiting = {
        rule["Prefix"]: rule["ExpirationInDays"]
        for rule in bucket["LifecycleConfiguration"]["Rules"]
        if rule.get("Prefix") == "params/"
    }

    assert {True} == set(bucket["PublicAccessBlockConfiguration"].values())
    assert "BucketEncryption" in bucket
    kept = {"results/", "dead-letters/", "long-params/", "in/", "out/", "batches/"}
    assert kept == expiring
    assert 1 == len(waiting)
    assert WAITING_DAYS < min(waiting.values()), "a job may wait longer than RetentionDays"
    assert SHORT_DAYS == waiting["params/"]


def test_the_bucket_refuses_plain_http() -> None:
    (policy,) = of_type("AWS::S3::BucketPolicy").values()
    (statement,) = policy["PolicyDocument"]["Statement"]

    assert ("Deny", "*") == (statement["Effect"], statement["Principal"])
    assert {"Bool": {"aws:SecureTransport": "false"}} == statement["Condition"]


def test_the_key_pool_starts_empty() -> None:
    assert {"keys": []} == json.loads(RESOURCES["KeyPoolSecret"]["Properties"]["SecretString"])


# Alarms and dashboard


def test_metrics_and_log_lines_bear_the_stacks_name() -> None:
    """So that two stacks in one account and region do not watch each other's numbers."""
    variables = WRITTEN["Globals"]["Function"]["Environment"]["Variables"]

    assert {"Ref": "AWS::StackName"} == variables["POWERTOOLS_SERVICE_NAME"]


@pytest.mark.parametrize("name", ALARMS)
def test_every_alarm_notifies_and_describes_its_cause(name: str) -> None:
    alarm = ALARMS[name]

    assert [{"Ref": "AlarmTopic"}] == alarm["AlarmActions"]
    assert alarm["AlarmDescription"].endswith(".")
    assert "notBreaching" == alarm["TreatMissingData"]


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_on_metric_math_can_be_left_out_for_the_emulator(name: str) -> None:
    condition = RESOURCES[name].get("Condition")

    assert ("WithMetricMath" if "Metrics" in ALARMS[name] else None) == condition


def test_letters_left_in_the_dead_letter_queue_raise_an_alarm() -> None:
    """Visible or hidden between two tries; by age they would not be seen after the third try."""
    watched = {
        metric["MetricName"]
        for alarm in ALARMS.values()
        for metric in [
            alarm,
            *(
                each["MetricStat"]["Metric"]
                for each in alarm.get("Metrics", [])
                if "MetricStat" in each
            ),
        ]
        for dimension in metric.get("Dimensions", [])
        if dimension["Value"] == {"Fn::GetAtt": ["DeadLettersQueue", "QueueName"]}
    }

    assert {
        "ApproximateNumberOfMessagesVisible",
        "ApproximateNumberOfMessagesNotVisible",
    } == watched


def dashboard() -> Properties:
    """The dashboard's body, with STACK for the stack's name and 1 for every other reference."""
    body = RESOURCES["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    body = body.replace("${AWS::StackName}", "STACK")
    parsed: Properties = json.loads(re.sub(r"\$\{[^}]+\}", "1", body))
    return parsed


def shown() -> Iterator[tuple[str, bool]]:
    """Every metric of ours on the dashboard, and whether it is shown by model group."""
    for widget in dashboard()["widgets"]:
        for metric in widget["properties"]["metrics"]:
            if metric[0] == "Sluice":
                assert metric[2:4] == ["service", "STACK"]
                yield metric[1], False
            elif isinstance(metric[0], dict):
                expression = metric[0]["expression"]
                assert "{Sluice,service,model_group}" in expression
                assert ' service="STACK"' in expression, "not of every stack in the account"
                for name in re.findall(r'MetricName="(\w+)"', expression):
                    yield name, True


def watched() -> Iterator[str]:
    """Every metric of ours an alarm watches."""
    for alarm in ALARMS.values():
        stats = [entry["MetricStat"] for entry in alarm.get("Metrics", []) if "MetricStat" in entry]
        for metric in [alarm, *(stat["Metric"] for stat in stats)]:
            if metric.get("Namespace") == "Sluice":
                assert [{"Name": "service", "Value": {"Ref": "AWS::StackName"}}] == metric[
                    "Dimensions"
                ]
                yield metric["MetricName"]


def test_the_dashboard_shows_exactly_the_metrics_the_code_emits() -> None:
    assert {name for name, _ in shown()} == METRIC_NAMES


def test_the_dashboard_shows_each_metric_by_the_dimensions_it_has() -> None:
    assert {name for name, by_model_group in shown() if by_model_group} == BY_MODEL_GROUP
    assert {name for name, by_model_group in shown() if not by_model_group} == TOTALS


def test_alarms_watch_metrics_that_the_code_emits() -> None:
    assert set(watched()) <= TOTALS


def test_widgets_lie_side_by_side() -> None:
    cells = [
        (x, y)
        for widget in dashboard()["widgets"]
        for x in range(widget["x"], widget["x"] + widget["width"])
        for y in range(widget["y"], widget["y"] + widget["height"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_access_logs_say_where_a_request_came_from_and_hold_no_headers() -> None:
    """Client keys are in headers, and whatever a caller writes by mistake into a query stays out as well."""
    said = json.loads(RESOURCES["ApiStage"]["Properties"]["AccessLogSettings"]["Format"])

    assert "$context.identity.sourceIp" == said["source"]
    assert "$context.requestId" == said["request_id"]
    assert all(re.fullmatch(r"\$context(\.[a-zA-Z]+)+", value) for value in said.values())
    assert not [value for value in said.values() if re.search("header|query|authorizer", value)]
