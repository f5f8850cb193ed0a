"""Words that the glossary retires occur in no document, message, comment, docstring or identifier."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"

CODE_IS_CHECKED = {
    "bench": True,
    "functions": True,
    "layers": True,
    "scripts": True,
    "tests": True,
}
"""Folders with Python code. While the texts of a folder are being rewritten, it is False."""


@dataclass(frozen=True)
class Exempt:
    """A place where a retired word is right."""

    path: str
    text: str
    """What the line contains."""
    reason: str


EXEMPT: tuple[Exempt, ...] = (
    Exempt(
        "bench/limits/scenarios.py",
        'title="4 unequal organisations"',
        "as recorded in docs/bench.md",
    ),
    Exempt("docs/bench.md", "4 unequal organisations", "the title of a scenario, as recorded"),
    Exempt(
        "scripts/claude_simulator/__init__.py", '"organisations":', "a field of its configuration"
    ),
    Exempt(
        "scripts/claude_simulator/settings.py", '"organisations: ', "a field of its configuration"
    ),
    Exempt(
        "tests/integration/test_simulator.py", '{"organisations": [', "a field of its configuration"
    ),
    Exempt("tests/smoke_runs.py", "_MODULE: Final", "a pattern of the names of modules"),
)


FIELDS = {
    "organisation": "one of `organisations`",
    "organisations": "a field of the simulator's configuration",
    "set_aside": "a field of GET /limits",
    "told": "stored in batches",
    "under_way": "stored in limit groups",
    "under_way_at": "stored in limit groups",
}
"""Identifiers whose names are given by stored data, JSON or a protocol."""


@dataclass(frozen=True)
class Text:
    """Something that people read."""

    path: str
    line: int
    """Where it starts."""
    words: str


# What is read


def retired() -> re.Pattern[str]:
    """Read the words of both tables of the glossary as one pattern."""
    section = GLOSSARY.read_text(encoding="utf-8").partition("\n## Retired words\n")[2]
    cells = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", section, re.MULTILINE)
    words = [word for cell in cells if cell != "retired" for word in cell.split(", ")]
    spaced = (re.escape(word).replace(r"\ ", r"\s+") for word in sorted(words, key=len)[::-1])
    return re.compile(rf"\b({'|'.join(spaced)})\b", re.IGNORECASE)


RETIRED = retired()
CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|\bbench[-/.]\w[\w./]*", re.DOTALL)
"""Names of code, files and links, which are no prose."""


def prose(text: str) -> str:
    """Blank out code, and keep the lines and their numbers."""
    return CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def documents() -> list[str]:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    pages += [ROOT / name for name in ("Makefile", "samconfig.toml", "template.yaml")]
    return sorted(path.relative_to(ROOT).as_posix() for path in pages)


def texts_of_document(path: str) -> Iterator[Text]:
    text = (ROOT / path).read_text(encoding="utf-8")
    if ROOT / path == GLOSSARY:
        text = text.partition("\n## Retired words\n")[0]
    yield Text(path, 1, prose(text))


def modules(folder: str) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*.py")
        if "node_modules" not in path.parts and path != Path(__file__)
    )


def texts_of_module(path: str) -> Iterator[Text]:
    """Yield comments, docstrings, messages, and the names that the module defines."""
    source = (ROOT / path).read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(path, token.start[0], prose(token.string))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield Text(path, node.lineno, prose(node.value))
        for name in set(defined(node)) - FIELDS.keys():
            apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name)
            yield Text(path, getattr(node, "lineno", 1), apart)
    # The tests of the package bench are called test_bench_*.
    name = path.partition("/")[2].replace("test_bench_", "test_")
    yield Text(path, 1, re.sub(r"[/_.]", " ", name))


def defined(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.Attribute(attr=name, ctx=ast.Store()):
            yield name
        case _:
            pass


def hits(texts: Iterator[Text]) -> list[str]:
    """Return where retired words occur, without the exceptions."""
    found = []
    for text in texts:
        source = (ROOT / text.path).read_text(encoding="utf-8").split("\n")
        for word in RETIRED.finditer(text.words):
            line = text.line + text.words.count("\n", 0, word.start())
            if not any(each.path == text.path and each.text in source[line - 1] for each in EXEMPT):
                found.append(f"{text.path}:{line}: {' '.join(word[0].split())}")
    return found


# What holds


@pytest.mark.parametrize("path", documents())
def test_no_document_uses_a_retired_word(path: str) -> None:
    assert hits(texts_of_document(path)) == []


def test_no_description_of_the_api_uses_a_retired_word() -> None:
    path = "docs/openapi.json"
    described = json.loads((ROOT / path).read_text(encoding="utf-8"))

    assert hits(Text(path, 1, prose(said)) for said in spoken(described)) == []


def spoken(value: object) -> Iterator[str]:
    match value:
        case dict():
            for name, each in value.items():
                if name in {"description", "summary"} and isinstance(each, str):
                    yield each
                else:
                    yield from spoken(each)
        case list():
            for each in value:
                yield from spoken(each)
        case _:
            pass


@pytest.mark.parametrize(
    "path", [path for folder, on in CODE_IS_CHECKED.items() if on for path in modules(folder)]
)
def test_no_module_uses_a_retired_word(path: str) -> None:
    assert hits(texts_of_module(path)) == []


def test_every_folder_with_code_is_in_the_table() -> None:
    with_code = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(path.rglob("*.py"))
    }

    assert with_code == {path.partition("/")[0] for path in CODE_IS_CHECKED}


@pytest.mark.parametrize("exception", EXEMPT, ids=lambda each: each.text)
def test_an_exception_is_needed_and_has_a_reason(exception: Exempt) -> None:
    text = (ROOT / exception.path).read_text(encoding="utf-8")
    its_lines = [line for line in text.split("\n") if exception.text in line]

    assert exception.reason
    assert any(RETIRED.search(line) for line in its_lines)


def test_the_exempt_fields_are_used() -> None:
    used = {
        name
        for folder in ("layers", "scripts")
        for path in modules(folder)
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        for name in defined(node)
    }

    assert FIELDS.keys() <= used


# The check itself


def test_the_check_finds_words_wherever_people_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code.py").write_text(
        '"""A job that is gone."""\n'
        "# it has begun\n"
        "def tell_all(desk):\n"
        '    raise ValueError(f"told to {desk}")\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)

    found = [each.rpartition(": ")[2] for each in hits(texts_of_module("code.py"))]

    assert sorted(found) == ["begun", "desk", "gone", "tell", "told"]


def test_code_and_links_in_a_page_are_no_prose() -> None:
    page = "Run `bench --tell`, see [it](gone.md)\n```\ntold\n```\nbench/limits has begun"

    assert [found[0] for found in RETIRED.finditer(prose(page))] == ["begun"]
