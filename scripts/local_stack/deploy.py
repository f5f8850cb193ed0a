"""Deploy template.yaml into the emulator, without the SAM CLI: package, transform, fix up, create.

The Lambda workers of the emulator run with the interpreter of this environment, so third-party
packages come from here and only first-party source is packaged. Each function named `fix_...`
covers one gap of the emulator and says which; another emulator may need none of them.
"""

from __future__ import annotations

import io
import json
import logging
import time
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.local_stack import permissions
from scripts.local_stack.emulator import REGION, Client, Emulator, Json, StackError
from sluice.domain.shares import CEILINGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

STACK_NAME = "sluice-local"
API_ID = "sluice"
BUCKET = "sluice-local-artifacts"
DEPLOY_SECONDS = 60.0

Template = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deployed:
    """A created stack, as found in the emulator."""

    template: Template
    """The transformed template that was deployed."""
    resources: Mapping[str, str]
    """Logical id -> physical id."""
    outputs: Mapping[str, str]


def deploy(emulator: Emulator, template: Template, folder: Path) -> Deployed:
    """Create the stack from `template` (see `prepared`), whose source paths are under `folder`."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - check_packages

    try:
        upload_sources(emulator, template, folder)
        transformed = transform(template)
        refuse_what_lacks_permission(transformed)
        fix_concurrency_type(transformed)
        fix_api_address(transformed)
        fix_secret_references(transformed)
        deployed = _created(emulator, transformed)
        fix_time_to_live(emulator, deployed)
    except ClientError as error:
        said = error.response.get("Error", {}).get("Message") or str(error)
        raise StackError(f"cannot deploy template.yaml: {said}") from error
    except BotoCoreError as error:
        raise StackError(f"cannot deploy template.yaml: {error}") from error
    return deployed


def read_template(path: Path) -> Template:
    """Return the template with CloudFormation's short tags (`!Ref`) written out."""
    from samtranslator.yaml_helper import yaml, yaml_parse  # noqa: PLC0415 - see check_packages

    try:
        parsed = yaml_parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StackError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise StackError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("Resources"), dict):
        raise StackError(f"{path} has no Resources")
    return parsed


def prepared(
    template: Template,
    *,
    concurrency: int | None,
    public_url: str,
    bulk_concurrency: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Template:
    """Return `template` with the local values as defaults of its parameters.

    `environment` is added to the variables of every function.
    """
    values: dict[str, Any] = {
        # An alarm with metric math makes the emulator roll the whole stack back.
        "MetricMathAlarms": "false",
        "PublicUrl": public_url,
        # Webhooks to a receiver on this machine are allowed.
        "WebhookNetworks": "127.0.0.0/8",
        # Tests and benchmarks send everything with one key.
        "ClientRequestsPerSecond": 1_000,
    }
    if concurrency is not None:
        values["MaxConcurrency"] = concurrency
    if bulk_concurrency is not None:
        values["BulkConcurrency"] = bulk_concurrency
    parameters = {
        name: {**declared, "Default": values[name]} if name in values else declared
        for name, declared in template.get("Parameters", {}).items()
    }
    local = {**template, "Parameters": parameters, "Resources": dict(template["Resources"])}
    if environment:
        local["Globals"] = _with_variables(template.get("Globals", {}), environment)
    return local


def _with_variables(shared: Template, environment: Mapping[str, str]) -> Template:
    function = shared.get("Function", {})
    variables = {**function.get("Environment", {}).get("Variables", {}), **environment}
    return {**shared, "Function": {**function, "Environment": {"Variables": variables}}}


def start_at_ceilings(template: Template) -> None:
    """Let each mapping start with what the governor gives it in its first minute, where the account has room for all.

    Deployed, it starts with the least; on AWS the deployment takes longer than that minute.
    """
    parameters, resources = template.get("Parameters", {}), template["Resources"]
    ceilings = {
        "WorkerMapping": parameters.get("MaxConcurrency", {}).get("Default"),
        "RangesMapping": parameters.get("BulkConcurrency", {}).get("Default"),
        "BatchesMapping": CEILINGS["batches"],
        "WebhooksMapping": CEILINGS["webhooks"],
    }
    for logical_id in ceilings.keys() & resources.keys():
        mapping, ceiling = resources[logical_id], ceilings[logical_id]
        properties = {
            **mapping["Properties"],
            "ScalingConfig": {"MaximumConcurrency": int(ceiling)},
        }
        resources[logical_id] = {**mapping, "Properties": properties}


# ---------------------------------------------------------------- package


def upload_sources(emulator: Emulator, template: Template, folder: Path) -> None:
    """Zip each function's and layer's own source into S3 and point the template there."""
    s3 = emulator.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    for logical_id, resource in template["Resources"].items():
        match resource.get("Type"):
            case "AWS::Serverless::Function":
                place, content = "CodeUri", function_zip
            case "AWS::Serverless::LayerVersion":
                place, content = "ContentUri", layer_zip
            case _:
                continue
        source = resource.get("Properties", {}).get(place)
        if not isinstance(source, str):
            raise StackError(f"{logical_id} has no {place} with a path")
        if not (folder / source).is_dir():
            raise StackError(f"{logical_id}: {place} {source} is not a folder in {folder}")
        s3.put_object(Bucket=BUCKET, Key=f"{logical_id}.zip", Body=content(folder / source))
        properties = {**resource["Properties"], place: f"s3://{BUCKET}/{logical_id}.zip"}
        template["Resources"][logical_id] = {**resource, "Properties": properties}


def function_zip(folder: Path) -> bytes:
    """Return a zip of the folder's files, as Lambda unpacks them into the task root."""
    return _zip({path.relative_to(folder).as_posix(): path for path in _files(folder)})


def layer_zip(folder: Path) -> bytes:
    """Return a zip of the folder's packages under `python/`, where Lambda looks in a layer."""
    packages = [child for child in folder.iterdir() if (child / "__init__.py").exists()]
    return _zip(
        {
            f"python/{path.relative_to(folder).as_posix()}": path
            for package in packages
            for path in _files(package)
        }
    )


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    ]


def _zip(files: Mapping[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, path in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
    return buffer.getvalue()


# ---------------------------------------------------------------- transform


def transform(template: Template) -> Template:
    """Return the template with its AWS::Serverless resources expanded, as CloudFormation does."""
    # See check_packages for why they stand here.
    from samtranslator.model.exceptions import InvalidDocumentException  # noqa: PLC0415
    from samtranslator.parser.parser import Parser  # noqa: PLC0415
    from samtranslator.translator.arn_generator import ArnGenerator  # noqa: PLC0415
    from samtranslator.translator.translator import Translator  # noqa: PLC0415

    # It warns that nobody collects its usage statistics; nobody does.
    logging.getLogger("samtranslator.metrics").setLevel(logging.ERROR)
    ArnGenerator.BOTO_SESSION_REGION_NAME = REGION
    try:
        translated = Translator({}, Parser(), boto_session=_OneRegion()).translate(
            template, parameter_values={}
        )
    except InvalidDocumentException as error:
        causes = "; ".join(cause.message for cause in error.causes)
        raise StackError(f"cannot transform template.yaml: {causes}") from error
    plain: Template = json.loads(json.dumps(translated))
    return plain


def refuse_what_lacks_permission(template: Template) -> None:
    """Raise `StackError` where AWS would refuse the stack, or leave a part of it silent, for want of a permission."""
    found = permissions.problems(template)
    if found:
        raise StackError(f"template.yaml would fail on AWS: {'; '.join(found)}")


class _OneRegion:
    """All that the transform asks a boto3 session for; a real one reads the user's AWS profile."""

    region_name = REGION


# ---------------------------------------------------------------- fix up


def fix_concurrency_type(template: Template) -> None:
    """Write MaximumConcurrency as a literal integer.

    The emulator keeps a `!Ref` to a Number parameter as text; its poller then fails on every pass,
    and no queue of the whole region reaches a function.
    """
    for properties in _properties(template, "AWS::Lambda::EventSourceMapping"):
        scaling = properties.get("ScalingConfig", {})
        if "MaximumConcurrency" in scaling:
            scaling["MaximumConcurrency"] = _number(template, scaling["MaximumConcurrency"])


def api_url(endpoint_url: str) -> str:
    """Return where the emulator serves the HTTP API."""
    return f"{endpoint_url}/_aws/execute-api/{API_ID}"


def fix_api_address(template: Template) -> None:
    """Give the HTTP API a fixed id, so that the local address is the same after every start."""
    for properties in _properties(template, "AWS::ApiGatewayV2::Api"):
        properties["Tags"] = {**properties.get("Tags", {}), "ms-custom-id": API_ID}


def fix_secret_references(template: Template) -> None:
    """Write a reference to a secret as its ARN, which is what `!Ref` of a secret gives on AWS.

    In the emulator it gives the name, which no policy that names the secret would match.
    """
    secrets = {
        name
        for name, resource in template["Resources"].items()
        if resource["Type"] == "AWS::SecretsManager::Secret"
    }
    template["Resources"] = _with_arns(template["Resources"], secrets)
    template["Outputs"] = _with_arns(template.get("Outputs", {}), secrets)


def _with_arns(value: Json, secrets: set[str]) -> Json:
    match value:
        case {"Ref": str(name)} if name in secrets:
            return {"Fn::GetAtt": [name, "Id"]}
        case dict():
            return {key: _with_arns(part, secrets) for key, part in value.items()}
        case list():
            return [_with_arns(part, secrets) for part in value]
        case _:
            return value


def fix_time_to_live(emulator: Emulator, deployed: Deployed) -> None:
    """Turn on the tables' time to live, which the emulator ignores in a template."""
    dynamodb = emulator.client("dynamodb")
    for logical_id, specification in time_to_live(deployed.template).items():
        dynamodb.update_time_to_live(
            TableName=deployed.resources[logical_id], TimeToLiveSpecification=specification
        )


def time_to_live(template: Template) -> dict[str, dict[str, Any]]:
    """Return the TTL specification of every table that declares one, by logical id."""
    return {
        logical_id: resource["Properties"]["TimeToLiveSpecification"]
        for logical_id, resource in template["Resources"].items()
        if resource["Type"] == "AWS::DynamoDB::Table"
        and "TimeToLiveSpecification" in resource["Properties"]
    }


def _properties(template: Template, kind: str) -> list[dict[str, Any]]:
    return [
        resource.setdefault("Properties", {})
        for resource in template["Resources"].values()
        if resource["Type"] == kind
    ]


def _number(template: Template, value: Json) -> int:
    """Return what a number in the template is: a literal, or the one parameter it refers to."""
    named = {name for name in _references(value) if name in template.get("Parameters", {})}
    return int(template["Parameters"][named.pop()]["Default"] if len(named) == 1 else value)


def _references(value: Json) -> Iterator[str]:
    match value:
        case {"Ref": str(name)}:
            yield name
        case dict() | list():
            for part in value.values() if isinstance(value, dict) else value:
                yield from _references(part)


# ---------------------------------------------------------------- create


def _created(emulator: Emulator, template: Template) -> Deployed:
    emulator.client("s3").put_object(
        Bucket=BUCKET, Key="template.json", Body=json.dumps(template).encode()
    )
    cloudformation = emulator.client("cloudformation")
    cloudformation.create_stack(
        StackName=STACK_NAME,
        TemplateURL=f"{emulator.endpoint_url}/{BUCKET}/template.json",
        Capabilities=["CAPABILITY_IAM", "CAPABILITY_NAMED_IAM", "CAPABILITY_AUTO_EXPAND"],
    )
    deadline = time.monotonic() + DEPLOY_SECONDS
    while True:
        stack = cloudformation.describe_stacks(StackName=STACK_NAME)["Stacks"][0]
        if stack["StackStatus"] == "CREATE_COMPLETE":
            break
        if stack["StackStatus"] != "CREATE_IN_PROGRESS":
            raise StackError(
                "cannot deploy template.yaml: "
                f"{_first_failure(cloudformation) or stack['StackStatus']}"
            )
        if time.monotonic() > deadline:
            raise StackError(f"deploying template.yaml timed out after {DEPLOY_SECONDS:.0f} s")
        time.sleep(0.03)
    listed = cloudformation.describe_stack_resources(StackName=STACK_NAME)["StackResources"]
    return Deployed(
        template=template,
        resources={
            found["LogicalResourceId"]: found.get("PhysicalResourceId", "") for found in listed
        },
        outputs={output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])},
    )


def _first_failure(cloudformation: Client) -> str | None:
    events = cloudformation.describe_stack_events(StackName=STACK_NAME)["StackEvents"]
    failed = [event for event in events if event.get("ResourceStatus") == "CREATE_FAILED"]
    if not failed:
        return None
    first = min(failed, key=lambda event: event["Timestamp"])
    return f"{first['LogicalResourceId']}: {first.get('ResourceStatusReason', 'no reason given')}"
