"""The documents say what the code has: names that come or go there must come or go here."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.core import TyperArgument, TyperGroup, TyperOption

from bench.limits import chart, report
from bench.limits.scenarios import SCENARIOS
from scripts.cli import app
from scripts.documents.__main__ import DOCS, DOCUMENTS
from scripts.documents.markers import replaced
from sluice.api import requests
from sluice.domain import limits
from sluice.domain.jobs import AttemptOutcome, State
from sluice.domain.keys import UpstreamKey
from sluice.domain.retries import RetryPolicy
from sluice.domain.waits import LONGEST_DELAY_MS, USUAL
from sluice.intake import requests as validation
from sluice.intake import submit
from sluice.intake.admission import MOST_BYTES
from sluice.ports.metrics import METRIC_NAMES
from sluice.worker import limit_books, limit_planner, queue_source
from tests.expanded_template import template

ROOT = Path(__file__).parents[2]
TEMPLATE = template()
PAGES = [
    path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    if not path.name.startswith(".")
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README, RUNBOOK = TEXTS["README.md"], TEXTS["docs/runbook.md"]
API, LIMITS = TEXTS["docs/api.md"], TEXTS["docs/limits.md"]
SETTINGS, GLOSSARY = TEXTS["docs/settings.md"], TEXTS["docs/glossary.md"]
STATE_MACHINE = TEXTS["docs/state_machine.md"]

SETTING = re.compile(r"\bSLUICE_[A-Z_]*[A-Z]\b")
CODE_WITH_SETTINGS = [
    ROOT / "template.yaml",
    *(ROOT / "layers").rglob("*.py"),
    *(ROOT / "layers").rglob("Makefile"),
    *(ROOT / "scripts").rglob("*.py"),
]
POLICY = RetryPolicy()
ALARMS = [
    name
    for name, resource in TEMPLATE["Resources"].items()
    if resource["Type"] == "AWS::CloudWatch::Alarm"
]
STATE_PHRASE = re.compile(rf"^job ({'|'.join(State)})$")
# Spelled in pieces, so that this file does not hold what it forbids.
MACHINE_PATHS = re.compile("|".join(["/" + "work/", "/" + "tmp/", "/" + "home/", "/" + "Users/"]))


def commands(group: TyperGroup, prefix: str) -> list[str]:
    """Every command of the command line, as a person types it."""
    found = []
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            found += commands(command, f"{prefix} {name}")
        else:
            found.append(f"{prefix} {name}")
    return found


def command_line() -> TyperGroup:
    group = typer.main.get_command(app.app)
    assert isinstance(group, TyperGroup)
    return group


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its rank or above."""
    marks = heading.split(" ", 1)[0]
    _, found, rest = page.partition(f"\n{heading}\n")
    assert found, f"there is no heading {heading!r}"
    return re.split(rf"\n#{{1,{len(marks)}}} ", rest)[0]


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings, for links to them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


# Settings and parameters


def test_every_setting_of_the_code_is_documented_and_no_other() -> None:
    in_code = {
        name
        for path in CODE_WITH_SETTINGS
        for name in SETTING.findall(path.read_text(encoding="utf-8"))
    }

    assert in_code == set(SETTING.findall(SETTINGS))


def test_every_parameter_of_the_stack_is_documented_with_its_default() -> None:
    written = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", SETTINGS, re.MULTILINE))
    defaults = {
        name: str(parameter["Default"]) or "(none)"
        for name, parameter in TEMPLATE["Parameters"].items()
    }

    assert defaults == {name: written.get(name) for name in defaults}


def test_the_fields_of_the_key_pool_are_documented_and_no_others() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", section(SETTINGS, "## The key pool"), re.MULTILINE)

    beside_the_keys = ["admin_keys", "model_groups"]
    assert [*(field.name for field in fields(UpstreamKey)), *beside_the_keys] == documented


# Routes and commands


def test_every_route_is_in_the_table_and_no_other() -> None:
    document = json.loads((ROOT / "docs/openapi.json").read_text(encoding="utf-8"))
    routes = {
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method in methods
    }

    assert routes == set(re.findall(r"^\| `((?:GET|POST|DELETE) \S+)` \|", API, re.MULTILINE))


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_named_in_a_document_exists(name: str) -> None:
    known = commands(command_line(), "sluice")
    known += {command.rpartition(" ")[0] for command in known} - {"sluice"}
    for line in re.findall(r"\bsluice [a-z][a-z -]*", code_of(TEXTS[name])):
        assert any(f"{line} ".startswith(f"{command} ") for command in known), line


def code_of(page: str) -> str:
    """The blocks and spans of code, where commands are."""
    block = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return "\n".join([*block.findall(page), *re.findall(r"`([^`\n]+)`", block.sub("", page))])


def test_options_named_in_the_documents_exist() -> None:
    known = set()
    waiting = [command_line()]
    while waiting:
        for command in waiting.pop().commands.values():
            known |= {option for parameter in command.params for option in parameter.opts}
            if isinstance(command, TyperGroup):
                waiting.append(command)

    for page in TEXTS.values():
        for line in re.findall(r"\bsluice [a-z][^`\n|]*", code_of(page)):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= known, line


def test_every_make_target_named_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    for name, page in TEXTS.items():
        for line in re.findall(r"(?:^|`)make ([a-z-]+)", page, re.MULTILINE):
            assert line in targets, f"{name}: make {line}"


# States, alarms, metrics


@pytest.mark.parametrize("state", State)
def test_every_state_is_explained(state: State) -> None:
    assert f"| `{state}` |" in section(GLOSSARY, "## States")
    assert f"`{state}`" in section(STATE_MACHINE, "## Who may take which transition")


@pytest.mark.parametrize("outcome", AttemptOutcome)
def test_every_outcome_of_an_attempt_is_explained(outcome: AttemptOutcome) -> None:
    assert f"`{outcome}`" in section(STATE_MACHINE, "## What counts as an attempt")


def test_the_reference_has_every_command_with_its_options_arguments_and_help() -> None:
    page = TEXTS["docs/cli.md"].replace("\\|", "|")
    waiting = [("sluice", command_line())]
    while waiting:
        name, group = waiting.pop()
        for word, command in group.commands.items():
            found = section(page, f"## {name} {word}")
            assert " ".join((command.help or "?").split()) in " ".join(found.split())
            for parameter in command.params:
                assert isinstance(parameter, TyperOption | TyperArgument)
                shown = parameter.metavar or parameter.name or "?"
                first = parameter.opts[0] if isinstance(parameter, TyperOption) else shown
                assert first in found
                assert " ".join((parameter.help or "?").split()) in found
            if isinstance(command, TyperGroup):
                waiting.append((f"{name} {word}", command))


# Generated documents


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_generated_document_is_up_to_date(name: str) -> None:
    """If not: `python -m scripts.documents`."""
    text = (DOCS / name).read_text(encoding="utf-8")

    assert DOCUMENTS[name](text) == text


def test_a_page_without_markers_is_not_written_into() -> None:
    with pytest.raises(ValueError, match="drawing:begin"):
        replaced("# A page\n", "drawing", "picture")


# Alarms and metrics


def test_every_alarm_has_an_entry_that_says_what_to_do_and_no_other_has() -> None:
    entries = re.findall(r"^### (\w+)$", section(RUNBOOK, "## Alarms"), re.MULTILINE)

    assert sorted(ALARMS) == sorted(entries)


@pytest.mark.parametrize("alarm", ALARMS)
def test_an_entry_says_what_it_means_where_to_look_and_what_to_do(alarm: str) -> None:
    entry = section(RUNBOOK, f"### {alarm}")

    assert [
        part for part in ("**Meaning.**", "**Check.**", "**Action.**") if part not in entry
    ] == []


@pytest.mark.parametrize("metric", sorted(METRIC_NAMES))
def test_every_metric_is_in_the_runbook(metric: str) -> None:
    assert f"`{metric}`" in RUNBOOK


def test_phrases_of_the_log_that_the_runbook_names_are_logged() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("layers", "functions")
        for path in (ROOT / folder).rglob("*.py")
    )
    stated = re.findall(r"(?:phrases?|`,|and) `([a-z]+(?: [a-z]+)+)`", RUNBOOK)

    assert stated
    for phrase in stated:
        logged = re.sub(STATE_PHRASE, "job {job.state}", phrase)
        assert f'"{logged}"' in code, phrase


def test_outputs_that_the_runbook_asks_for_exist() -> None:
    asked = set(re.findall(r"\$\(output (\w+)\)", RUNBOOK))

    assert asked
    assert set() == asked - set(TEMPLATE["Outputs"])


# The pages themselves


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_to_the_repository_resolves(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(page.read_text(encoding="utf-8")), f"{name}: {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_no_page_names_a_path_of_a_developers_machine(name: str) -> None:
    assert MACHINE_PATHS.findall(TEXTS[name]) == []


def test_every_decision_has_its_four_parts() -> None:
    decisions = {name: page for name, page in TEXTS.items() if "/decisions/" in name}
    parts = ["**Context.**", "**Decision.**", "**Alternatives.**", "**Consequences.**"]

    assert decisions
    numbers = sorted(name.rpartition("/")[2][:4] for name in decisions)
    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]
    for name, page in decisions.items():
        number = name.rpartition("/")[2][:4]
        assert page.startswith(f"# {number} "), name
        assert parts == [part for part in parts if part in page], name


def test_the_readme_says_that_pooling_keys_raises_no_limit() -> None:
    said = " ".join(README.split())

    assert "Pooling keys does not raise any limit, and Sluice is not a way around limits" in said


@pytest.mark.parametrize(
    ("sentence", "numbers"),
    [
        (
            "starts at {} requests, {:,} input and {:,} output tokens a minute",
            [limits.SAFE_START[dimension] for dimension in limits.DIMENSIONS],
        ),
        ("start time up to {:.0f} s ahead", [limit_books.HORIZON_MS / 1000]),
        ("s ahead ({:.0f} s at slow rates)", [limit_books.LONGEST_HORIZON_MS / 1000]),
        ("cannot start within {:.0f} s go back to the queue", [USUAL.hold_ms / 1000]),
        ("blocked for more than {:.0f} s", [limit_planner.BLOCK_MS / 1000]),
        ("large call that has waited {:.0f} s", [limit_books.PATIENCE_MS / 1000]),
        ("takes {:.0f} s to reach", [limits.RAMP_MS / 1000]),
        ("holds up to {} jobs", [queue_source.SLOTS]),
        ("for up to {:.0f} minutes. Jobs", [queue_source.REFILL_MS / 60_000]),
        ("Up to {:.0f} s of a wait", [USUAL.rest_ms / 1000]),
        ("for at most {:.0f} minutes at a time", [LONGEST_DELAY_MS / 60_000]),
        ("continues at {:.0f} % of its rate", [limits.RATE_AFTER_429 / 10]),
        ("gains {:.0f} % of the limit per second", [limits.RECOVERY_PER_SECOND / 10]),
        (
            "calls pause for {:.0f} to {:.0f} s",
            [USUAL.breaker_pause_ms / 1000, USUAL.breaker_pause_cap_ms / 1000],
        ),
        ("tried again every {:.0f} minutes", [POLICY.spend_recheck_ms / 60_000]),
        (
            "random time up to {:.0f}, 2, 4 ... {:.0f} s",
            [POLICY.overload_base_ms / 1000, POLICY.overload_cap_ms / 1000],
        ),
        ("one of {} attempts", [POLICY.max_attempts]),
        (
            "up to {:.0f}, 4, 8 ... {:.0f} s",
            [POLICY.retry_base_ms / 1000, POLICY.retry_cap_ms / 1000],
        ),
        ("at most {:,} bytes", [MOST_BYTES]),
        ("sent again within {:.0f} minutes", [submit.RESEND_WINDOW_MS / 60_000]),
        ("a job at most {} levels of nesting", [validation.DEEPEST]),
        ("a list of up to {}", [requests.MOST_JOBS]),
    ],
)
def test_numbers_in_the_documents_are_those_of_the_code(
    sentence: str, numbers: list[float]
) -> None:
    assert sentence.format(*numbers) in " ".join(f"{API} {LIMITS}".split())


def test_the_comparison_in_the_readme_is_that_of_the_benchmark() -> None:
    figures = chart.recorded(TEXTS["docs/bench.md"])
    said = " ".join(README.split())
    jobs = {each.scenario: each.jobs for each in figures}
    for client, sentence in {
        "sdk": "ten retries loses {lost:,} of {jobs:,} jobs and gets {refused:.2f} 429s per answer",
        "tutorial": "backoff loses {lost:,} jobs and gets {refused:.2f} 429s per answer",
        "litellm": "ten retries loses {lost:,} jobs and gets {refused:.2f} 429s per answer",
        "sluice": "Sluice loses none, gets {refused:.2f} 429s per answer",
    }.items():
        own = [each for each in figures if each.client == client]
        lost = sum(each.lost for each in own)
        refused = sum(each.rate_limited_per_answer for each in own) / len(own)
        words = sentence.format(lost=lost, refused=refused, jobs=sum(jobs.values()))

        assert len(own) == len(SCENARIOS)
        assert words in said
        assert client != "sluice" or not lost

    scores = re.findall(r"\| sluice, 4 workers \| ([\d.]+)%", recorded_table())
    fastest, slowest = (100 / pick(float(score) for score in scores) for pick in (max, min))
    assert f"between {fastest:.2f} and {slowest:.2f} times the shortest possible time" in said


def recorded_table() -> str:
    """The results that the benchmark wrote, without those of other runs below them."""
    return TEXTS["docs/bench.md"].partition(report.BEGIN)[2].partition(report.END)[0]


def test_the_readme_shows_the_rows_that_the_demo_prints() -> None:
    block = README.partition("<!-- demo:begin -->")[2].partition("<!-- demo:end -->")[0]
    demo = (ROOT / "scripts/demo.py").read_text(encoding="utf-8")

    shown = re.findall(r"^│ (.+?) +│", block, re.MULTILINE)
    assert set(shown) == set(re.findall(r'add_row\(\s*"([^"]+)"', demo))


def test_the_readmes_curl_lines_are_one_block_between_their_markers() -> None:
    block = re.search(
        r"<!-- curl:begin -->\n```console\n(.*?)\n```\n<!-- curl:end -->", README, re.DOTALL
    )

    assert block is not None
    assert "```" not in block[1]
