"""What a terminal would obey is never printed: the rule, for any text."""

import io
import json
import re
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.cli import tables, terminal
from scripts.cli.bar import LiveBar
from scripts.cli.progress import PlainLines
from scripts.cli.terminal import as_json, block, json_text, line, safe

# Any text at all, also halves of surrogate pairs, which JSON can carry as escapes.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
SHORT_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | SHORT_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT_TEXT, inner, max_size=3),
    max_leaves=5,
)
ESCAPE, BELL, C1, BACK, RETURN = "\x1b[2J", "\x07", "\x9b31m", "\b", "\r"
REVERSED, ISOLATED = "\u202egnp.exe", "\u2066"
HOSTILE = f"a{ESCAPE}b{BELL}c{C1}d{BACK}e{RETURN}f{REVERSED}g{ISOLATED}h\ud83di\u2028j\nk"


def obeyed(text: str) -> set[str]:
    """What of a text a terminal obeys, by the Unicode standard: controls, and overrides of direction."""
    return {
        each
        for each in text
        if unicodedata.category(each) in {"Cc", "Cs", "Zl", "Zp"}
        or unicodedata.bidirectional(each)
        in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    }


@given(ANY_TEXT)
def test_a_line_has_nothing_that_a_terminal_obeys_and_can_be_encoded(text: str) -> None:
    assert set() == obeyed(line(text))
    line(text).encode()


@pytest.mark.parametrize("text", ["plain", "déjà vu", "你好 🙂", "👩\u200d👩\u200d👧", 'a "b" \\n'])
def test_ordinary_text_is_printed_as_it_is(text: str) -> None:
    assert (text, text) == (line(text), block(text))


def test_what_is_escaped_can_be_read() -> None:
    assert r"a\x1b[31mb\n\t\u202e" == line("a\x1b[31mb\n\t\u202e")
    assert "half \N{REPLACEMENT CHARACTER}" == line("half \ud83d")


@given(ANY_TEXT)
def test_a_block_keeps_line_breaks_and_tabs_and_nothing_else(text: str) -> None:
    assert obeyed(block(text)) <= {"\n", "\t"}
    assert block(text).count("\t") == text.count("\t")
    assert block(text).count("\n") == text.count("\n")


def test_line_breaks_of_windows_are_line_breaks() -> None:
    assert r"a\rb" == block("a\rb")
    assert "a\nb" == block("a\r\nb")


@given(JSON)
def test_json_is_the_same_value_in_characters_that_any_terminal_and_encoding_takes(
    value: Any,
) -> None:
    text = as_json(value)

    # Two halves that happen to be neighbors are one character in JSON; a value from JSON has none.
    value = json.loads(json.dumps(value))
    assert value == json.loads(text)
    assert set() == obeyed(text)
    text.encode()


@given(JSON)
def test_json_of_others_is_changed_in_its_spelling_only(value: Any) -> None:
    theirs = json.dumps(json.loads(json.dumps(value)), ensure_ascii=False)

    assert json.loads(theirs) == json.loads(json_text(theirs))
    assert set() == obeyed(json_text(theirs))


@given(JSON)
def test_every_string_of_a_value_is_escaped(value: Any) -> None:
    def strings(each: Any) -> list[str]:
        match each:
            case str():
                return [each]
            case dict():
                return [*each, *(text for inner in each.values() for text in strings(inner))]
            case list():
                return [text for inner in each for text in strings(inner)]
            case _:
                return []

    assert set() == set().union(*map(obeyed, strings(safe(value))))


def test_messages_and_results_are_printed_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(HOSTILE)
    terminal.put(HOSTILE)
    terminal.put_block(HOSTILE)
    terminal.print_json({HOSTILE: HOSTILE})

    printed = capsys.readouterr()
    assert {"\n"} == obeyed(printed.out + printed.err)
    assert 1 == printed.err.count("\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_without_a_character_gets_its_escape_and_json_stays_json(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))

    terminal.prepare()
    terminal.print_json("ü 你 🙂")
    sys.stdout.flush()

    assert "ü 你 🙂" == json.loads(raw.getvalue().decode(encoding))


# ---------------------------------------------------------------- tables

TIME = "2026-12-01T12:00:00Z"
ATTEMPT = {
    "attempt": 1,
    "at": HOSTILE,
    "model": HOSTILE,
    "outcome": HOSTILE,
    "request_id": HOSTILE,
    "error": {"type": HOSTILE, "message": HOSTILE},
}
JOB = {
    "id": HOSTILE,
    "state": HOSTILE,
    "custom_id": HOSTILE,
    "model": HOSTILE,
    "lane": HOSTILE,
    "created_at": HOSTILE,
    "finished_at": HOSTILE,
    "deadline": HOSTILE,
    "text": HOSTILE,
    "metadata": {HOSTILE: HOSTILE},
    "fallback_models": [HOSTILE],
    "attempts": [ATTEMPT],
    "error": {"type": HOSTILE, "message": HOSTILE},
    "attempts_used": 1,
    "snoozes": 0,
}
BATCH = {
    "id": HOSTILE,
    "name": HOSTILE,
    "state": HOSTILE,
    "problem": HOSTILE,
    "cost_micro_usd": 1,
    "created_at": HOSTILE,
    "estimated_end_at": HOSTILE,
    "ended_at": HOSTILE,
    "expires_at": HOSTILE,
    "input_tokens": 1,
    "output_tokens": 1,
    "rows": dict.fromkeys(
        (
            "expected",
            "done",
            "succeeded",
            "errored",
            "canceled",
            "expired",
            "invalid",
            "duplicates",
        ),
        1,
    ),
}
LIMIT = {
    "group": HOSTILE,
    "blocked_until": HOSTILE,
    "blocked_reason": HOSTILE,
    "set_aside": [{"what": HOSTILE, "until": HOSTILE}],
}
USAGE = {"group_by": [HOSTILE], "data": [{HOSTILE: HOSTILE}], "total": {}}
KEY = {"key_id": HOSTILE, "tenant": HOSTILE, "name": HOSTILE, "created_at": HOSTILE}
LETTER = {
    "letter": HOSTILE,
    "kept_at": HOSTILE,
    "reason": HOSTILE,
    "job": HOSTILE,
    "state": HOSTILE,
    "hindrance": HOSTILE,
    "estimated_cost_micro_usd": None,
}
SHOWN = {
    "job_panel": JOB,
    "jobs_table": [JOB],
    "batch_panel": BATCH,
    "batches_table": [BATCH],
    "limits_table": [LIMIT],
    "usage_table": USAGE,
    "keys_table": [KEY],
    "letters_table": [LETTER],
}


def test_every_table_and_panel_is_tried() -> None:
    made = {name for name in vars(tables) if re.fullmatch(r"[a-z]\w*_(panel|table)", name)}

    assert set(SHOWN) == made


@pytest.mark.parametrize("name", SHOWN)
def test_a_table_shows_foreign_names_escaped(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(getattr(tables, name)(SHOWN[name]))

    out = capsys.readouterr().out
    assert {"\n"} == obeyed(out)
    assert r"\x1b" in out


# ---------------------------------------------------------------- progress


def test_notes_beside_the_progress_are_escaped() -> None:
    plain, drawn = io.StringIO(), io.StringIO()

    PlainLines(plain).note(HOSTILE)
    with LiveBar(drawn) as bar:
        bar.note(HOSTILE)

    assert {"\n"} == obeyed(plain.getvalue())
    assert ESCAPE not in drawn.getvalue()
    assert not {BELL, C1[0], BACK, REVERSED[0], "\ud83d"} & set(drawn.getvalue())
