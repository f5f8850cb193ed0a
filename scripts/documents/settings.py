"""The tables of docs/settings.md, from template.yaml: parameters, outputs, secrets and environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from scripts.documents.markers import replaced, row
from scripts.local_stack.deploy import Template, read_template

TEMPLATE: Final = Path(__file__).parents[2] / "template.yaml"

KINDS: Final[Mapping[str, str]] = {
    "AWS::DynamoDB::Table": "table",
    "AWS::S3::Bucket": "bucket",
    "AWS::SQS::Queue": "queue",
    "AWS::SecretsManager::Secret": "secret",
    "AWS::Serverless::Function": "function",
}


def parameters(template: Template) -> str:
    """Return the parameters as a Markdown table."""
    rows = [row("parameter", "default", "allowed", "meaning"), "|---|---|---|---|"]
    for name, facts in template["Parameters"].items():
        default = str(facts["Default"]) or "(none)"
        rows.append(row(f"`{name}`", default, _allowed(facts), facts["Description"]))
    return "\n".join(rows)


def _allowed(parameter: Mapping[str, Any]) -> str:
    if "AllowedValues" in parameter:
        return ", ".join(str(value) for value in parameter["AllowedValues"])
    if "MinValue" in parameter and "MaxValue" in parameter:
        return f"{parameter['MinValue']:,} to {parameter['MaxValue']:,}"
    if "MinValue" in parameter:
        return f"at least {parameter['MinValue']:,}"
    return "text"


def outputs(template: Template) -> str:
    """Return the outputs as a Markdown table."""
    rows = [row("output", "meaning"), "|---|---|"]
    for name, facts in template["Outputs"].items():
        rows.append(row(f"`{name}`", facts["Description"]))
    return "\n".join(rows)


def secrets(template: Template) -> str:
    """Return the secrets as a Markdown table."""
    rows = [row("secret", "output", "meaning"), "|---|---|---|"]
    output_of = {
        facts["Value"].get("Ref"): name
        for name, facts in template["Outputs"].items()
        if isinstance(facts["Value"], dict)
    }
    for name, facts in template["Resources"].items():
        if facts["Type"] == "AWS::SecretsManager::Secret":
            meaning = facts["Properties"]["Description"]
            rows.append(row(f"`{name}`", f"`{output_of[name]}`", meaning))
    return "\n".join(rows)


def environment(template: Template) -> str:
    """Return the environment variables that the template sets as a Markdown table."""
    rows = [row("variable", "value", "functions"), "|---|---|---|"]
    everywhere = template["Globals"]["Function"]["Environment"]["Variables"]
    found = {name: (value, "all") for name, value in everywhere.items()}
    for logical_id, facts in template["Resources"].items():
        own = facts.get("Properties", {}).get("Environment", {}).get("Variables", {})
        function = logical_id.removesuffix("Function").lower()
        found |= {name: (value, function) for name, value in own.items()}
    for name, (value, functions) in found.items():
        rows.append(row(f"`{name}`", _value(value, template), functions))
    return "\n".join(rows)


def _value(value: Any, template: Template) -> str:
    match value:
        case {"Ref": str(name)} if name in template["Parameters"]:
            return f"parameter `{name}`"
        case {"Ref": str(name)} if name in template["Resources"]:
            return f"{KINDS[template['Resources'][name]['Type']]} `{name}`"
        case {"Ref": str(name)}:
            return f"`{name}`"
        case {"Fn::If": [_, first, second]}:
            return f"{_value(first, template)}, or {_value(second, template)}"
        case {"Fn::Sub": str(text)}:
            return f"`{' '.join(text.split())}`"
        case _:
            return f"`{value}`"


def updated(page: str) -> str:
    """Return the page with the tables of the template."""
    template = read_template(TEMPLATE)
    for part in (parameters, outputs, secrets, environment):
        page = replaced(page, part.__name__, part(template))
    return page
