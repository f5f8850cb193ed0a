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
    "bench": False,
    "functions": False,
    "layers": False,
    "scripts": False,
    "tests": False,
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
    Exempt("docs/bench.md", "4 unequal organisations", "the title of a scenario, as recorded"),
)


@dataclass(frozen=True)
class Text:
    """One line that people read."""

    path: str
    line: int
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
CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|\bbench[/.]\w[\w./]*", re.DOTALL)
"""Names of code, files and links, which are no prose."""


def prose(text: str) -> str:
    """Blank out code, and keep the lines and their numbers."""
    return CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def lines(path: str, text: str, first: int = 1) -> Iterator[Text]:
    for number, line in enumerate(prose(text).split("\n"), first):
        yield Text(path, number, line)


def documents() -> list[str]:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "template.yaml"]
    return sorted(path.relative_to(ROOT).as_posix() for path in pages)


def texts_of_document(path: str) -> Iterator[Text]:
    text = (ROOT / path).read_text(encoding="utf-8")
    if ROOT / path == GLOSSARY:
        text = text.partition("\n## Retired words\n")[0]
    yield from lines(path, text)


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
            yield from lines(path, token.string, token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from lines(path, node.value, node.lineno)
        for name in defined(node):
            apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name)
            yield Text(path, getattr(node, "lineno", 1), apart)
    yield Text(path, 1, re.sub(r"[/_.]", " ", path.partition("/")[2]))


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
    """Say where retired words occur, the exceptions apart."""
    return [
        f"{text.path}:{text.line}: {found[0]}"
        for text in texts
        for found in RETIRED.finditer(text.words)
        if not any(each.path == text.path and each.text in source_line(text) for each in EXEMPT)
    ]


def source_line(text: Text) -> str:
    return (ROOT / text.path).read_text(encoding="utf-8").split("\n")[text.line - 1]


# What holds


@pytest.mark.parametrize("path", documents())
def test_no_document_uses_a_retired_word(path: str) -> None:
    assert hits(texts_of_document(path)) == []


def test_no_description_of_the_api_uses_a_retired_word() -> None:
    path = "docs/openapi.json"
    described = json.loads((ROOT / path).read_text(encoding="utf-8"))

    assert hits(line for said in spoken(described) for line in lines(path, said)) == []


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

    assert with_code == set(CODE_IS_CHECKED)


@pytest.mark.parametrize("exception", EXEMPT, ids=lambda each: each.text)
def test_an_exception_is_needed_and_has_a_reason(exception: Exempt) -> None:
    text = (ROOT / exception.path).read_text(encoding="utf-8")
    its_lines = [line for line in text.split("\n") if exception.text in line]

    assert exception.reason
    assert any(RETIRED.search(line) for line in its_lines)


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
