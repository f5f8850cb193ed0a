"""The template as CloudFormation sees it: `python -m tests.expanded_template` prints it.

Linters cannot look into what SAM expands (roles, layers), so we expand template.yaml ourselves,
without an AWS account, and lint and assert on the result.
"""

import json
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator
from samtranslator.yaml_helper import yaml_parse

TEMPLATE = Path(__file__).parent.parent / "template.yaml"

Template = dict[str, Any]


def template() -> Template:
    """Return template.yaml as written, short forms such as !Ref as {"Ref": ...}."""
    return deepcopy(_parsed())


def expanded_template() -> Template:
    """Return template.yaml after the SAM transform, with stand-ins for the packages in S3."""
    return deepcopy(_expanded())


# Each takes a tenth of a second, and ten modules ask for them, in each process that collects tests.
@cache
def _parsed() -> Template:
    parsed: Template = yaml_parse(TEMPLATE.read_text())
    return parsed


@cache
def _expanded() -> Template:
    source = template()
    for resource in source["Resources"].values():
        for code in ("CodeUri", "ContentUri"):
            if code in resource.get("Properties", {}):
                resource["Properties"][code] = "s3://packages/package.zip"
    session = boto3.Session(region_name="us-east-1")
    translator = Translator(managed_policy_map={}, sam_parser=Parser(), boto_session=session)
    expanded: Template = translator.translate(source, parameter_values={})
    return expanded


if __name__ == "__main__":
    json.dump(expanded_template(), sys.stdout, indent=1)
