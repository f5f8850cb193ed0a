"""Records which AWS calls a function makes, below its own code: a hook in botocore, seen before anything is sent.

With SLUICE_RECORD_CALLS naming a folder, every function of a local stack writes there, once per process, each call it
makes: operation and resources, no data. A process of a function imports this file through `sitecustomize` (see
emulator.py); tests that run handlers in their own process call `install` with the name of the running function.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

FOLDER_VARIABLE: Final = "SLUICE_RECORD_CALLS"
EVERY_CALL_VARIABLE: Final = "SLUICE_RECORD_EVERY_CALL"
"""As FOLDER_VARIABLE, but each call is written as often as it is made, for benchmarks."""

MISSING: Final = 404
"""HTTP status of an object that S3 says is missing, which it says only to those who may list the bucket."""


def install(folder: Path, function: Callable[[], str | None], *, every_call: bool = False) -> None:
    """Record into `folder` the calls of all botocore sessions created from now on; `function` returns their owner."""
    import botocore.handlers  # noqa: PLC0415 - only where something is recorded

    seen: set[str] = set()

    def keep(service: str, operation: str, parameters: Mapping[str, Any]) -> None:
        name = function()
        if name is None:
            return
        for what, resource in asked(service, operation, parameters):
            line = json.dumps({"function": name, "operation": what, "resource": named(resource)})
            if every_call or line not in seen:
                seen.add(line)
                with (folder / f"{os.getpid()}.jsonl").open("a") as file:
                    file.write(line + "\n")

    # `provide-client-params` is emitted for every call, and for every presigned URL.
    def before(params: Mapping[str, Any], model: Any, context: dict[str, Any], **_: Any) -> None:
        context["recorded_parameters"] = dict(params)
        keep(model.service_model.service_name, model.name, params)

    def after(http_response: Any, model: Any, context: Mapping[str, Any], **_: Any) -> None:
        if http_response.status_code == MISSING and model.name in {"GetObject", "HeadObject"}:
            bucket = context.get("recorded_parameters", {}).get("Bucket")
            keep("s3", "SeeThatAnObjectIsMissing", {"Bucket": bucket})

    botocore.handlers.BUILTIN_HANDLERS.extend(
        [("provide-client-params", before), ("after-call.s3", after)]
    )


Asked = Iterator[tuple[str, str]]
"""Operations, each with the resource it is about: a physical id and what is below it."""


def asked(service: str, operation: str, parameters: Mapping[str, Any]) -> Asked:
    """Yield what a call asks for."""
    match service:
        case "dynamodb":
            yield from _of_tables(operation, parameters)
        case "s3":
            yield from _of_objects(operation, parameters)
        case "events":
            for entry in parameters["Entries"]:
                bus = entry.get("EventBusName", "default")
                yield f"events:{operation} of {entry['Source']}", f"event-bus/{bus}"
        case _:
            keys = ("QueueUrl", "SecretId", "UUID", "FunctionName")
            found = (parameters[key] for key in keys if key in parameters)
            yield f"{service}:{operation}", next(found, "*")


def _of_tables(operation: str, parameters: Mapping[str, Any]) -> Asked:
    for statement in parameters.get("Statements", ()):
        verb, *words = statement["Statement"].split()
        table = next(word for word in words if word.startswith('"')).strip('"')
        yield f"dynamodb:{operation} {verb.upper()}", table
    for table in parameters.get("RequestItems", ()):
        yield f"dynamodb:{operation}", table
    if table := parameters.get("TableName"):
        index = parameters.get("IndexName")
        yield f"dynamodb:{operation}", f"{table}/index/{index}" if index else table


def _of_objects(operation: str, parameters: Mapping[str, Any]) -> Asked:
    bucket = parameters["Bucket"]
    if operation == "DeleteObjects":
        for each in parameters["Delete"]["Objects"]:
            yield f"s3:{operation}", f"{bucket}/{_top(each['Key'])}"
        return
    key = parameters.get("Key", parameters.get("Prefix"))
    yield f"s3:{operation}", bucket if key is None else f"{bucket}/{_top(key)}"
    if source := parameters.get("CopySource"):
        yield "s3:ReadCopySource", f"{source['Bucket']}/{_top(source['Key'])}"


def _top(key: str) -> str:
    """Return the first part of an object's key; what is below it belongs to a tenant.

    Uploads through the API have a folder of their own, with grants of its own, and so have upstream batches.
    """
    top, *below = key.split("/")
    if below and below[0].startswith("upstream_"):
        return f"{top}/upstream_..."
    return f"{top}/TENANT/.uploads/..." if below[1:2] == [".uploads"] else f"{top}/..."


def named(resource: str) -> str:
    """Write a resource by the variable that gives the function its name, which is the same in every stack."""
    for name, value in _names():
        if resource == value or resource.startswith(f"{value}/"):
            return f"${{{name}}}{resource.removeprefix(value)}"
    return resource


def _names() -> Iterator[tuple[str, str]]:
    """Yield the function's own variables; those of a variable that is a JSON object one by one."""
    for name, value in os.environ.items():
        if not name.startswith("SLUICE_") or not value:
            continue
        yield name, value
        if value.startswith("{"):
            for key, part in json.loads(value).items():
                yield f"{name}.{key}", str(part)
