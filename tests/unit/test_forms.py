"""Files that have no lines to cut at: what rows they become, and what is said of those that become none."""

import gzip
import json
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.domain import csv_files, forms
from sluice.domain.batches import MOST_LINE_BYTES, Options
from sluice.domain.forms import (
    PROBLEM,
    BadForm,
    csv_rows,
    document_row,
    ending_of,
    filled,
    id_of,
    named_document,
    unpacked,
    with_line_ends,
)
from sluice.intake.requests import CUSTOM_ID

PROMPT = Options(prompt="Summarise: {text}")


def in_pieces(body: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


def rows(body: bytes, options: Options = PROMPT, size: int = 7) -> list[Any]:
    return [row for _, row in numbered_rows(body, options, size)]


def numbered_rows(body: bytes, options: Options = PROMPT, size: int = 7) -> list[tuple[int, Any]]:
    made = b"".join(csv_rows(in_pieces(body, size), options))
    return [(n, json.loads(line)) for n, line in enumerate(made.split(b"\n"), start=1) if line]


def said(row: Any) -> str:
    text: str = row["params"]["messages"][0]["content"]
    return text


# Gzip ------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.integers(1, 50))
def test_gzip_is_unpacked_whatever_the_pieces_and_the_members(
    members: list[bytes], size: int
) -> None:
    packed = b"".join(gzip.compress(member) for member in members)

    assert b"".join(members) == b"".join(unpacked(in_pieces(packed, size)))


def test_what_unpacks_to_much_comes_a_little_at_a_time() -> None:
    packed = gzip.compress(b"x" * 10 * forms.PIECE_BYTES)

    assert max(map(len, unpacked([packed]))) <= forms.PIECE_BYTES


def test_a_file_that_unpacks_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MOST_ROWS_BYTES", 1_000)

    with pytest.raises(BadForm, match="the unpacked file exceeds 1,000 bytes"):
        list(unpacked([gzip.compress(b"x" * 2_000)]))


def test_gzip_that_is_broken_or_cut_off_says_so() -> None:
    with pytest.raises(BadForm, match="the file is not valid gzip"):
        list(unpacked([b"\x1f\x8bnothing of the kind"]))
    with pytest.raises(BadForm, match="truncated"):
        list(unpacked([gzip.compress(b"x" * 1_000)[:-5]]))
    assert [] == list(unpacked([]))


def test_twenty_megabytes_of_tiny_members_take_seconds() -> None:
    """Each member used to copy the rest of its piece: two minutes, in which no other file was planned."""
    member = gzip.compress(b"x")
    packed = member * (20_000_000 // len(member))
    started = process_time()

    found = sum(map(len, unpacked(in_pieces(packed, 8 * 1024 * 1024))))

    assert packed.count(member) == found
    assert process_time() - started < 20


def test_a_bomb_is_unpacked_in_little_memory() -> None:
    packed = gzip.compress(b"\0" * 50_000_000)
    tracemalloc.start()
    try:
        found = sum(map(len, unpacked([packed])))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert 50_000_000 == found
    assert peak < 8 * forms.PIECE_BYTES


def test_trailing_zeros_of_a_tape_are_no_member() -> None:
    with pytest.raises(BadForm, match="not valid gzip"):
        list(unpacked([gzip.compress(b"x"), b"\0" * 10]))


# CSV -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 1_000])
def test_each_record_is_a_row_with_the_prompt_filled_in(size: int) -> None:
    body = '\ufefftext,custom_id\r\n"one, ""two""\nthree",a\r\n\r\nä,b'.encode()

    found = rows(body, size=size)

    assert [("a", 'Summarise: one, "two"\nthree'), ("b", "Summarise: ä")] == [
        (row["custom_id"], said(row)) for row in found
    ]


def test_without_a_column_for_it_rows_are_numbered() -> None:
    assert ["row-1", "row-2"] == [row["custom_id"] for row in rows(b"text\nx\ny\n")]


def test_a_record_of_another_length_is_a_bad_row_and_no_more() -> None:
    bad, good = rows(b"text,more\nonly\nx,y\n")

    assert "the record has 1 fields; the header has 2" == bad[PROBLEM]
    assert "Summarise: x" == said(good)


def test_a_request_that_is_too_long_in_utf_8_has_its_own_id() -> None:
    body = b"custom_id,text\nu-1," + "€".encode() * 3_000_000 + b"\nu-2,x\n"

    bad, good = rows(body, size=1_000_000)

    assert "u-1" == bad["custom_id"]
    assert "the request has 9,000,0" in bad[PROBLEM]
    assert ("u-2", "Summarise: x") == (good["custom_id"], said(good))


def test_a_prompt_that_would_become_too_long_is_a_bad_row_and_is_not_filled() -> None:
    """A template of a few kilobytes can name a long field a thousand times: gigabytes, if it were filled in."""
    options = replace(PROMPT, prompt="{text}" * 1_000)

    bad, good = rows(b"text\n" + b"x" * 100_000 + b"\ny\n", options, size=50_000)

    assert (
        "the filled prompt has about 100,006,000 characters; the maximum is 8,388,608"
        == bad[PROBLEM]
    )
    assert "y" * 1_000 == said(good)


def test_a_long_prompt_does_not_make_a_small_file_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 12 KB with a prompt of 131 KB was half a gigabyte of rows."""
    assert forms.LEAST_ROWS_BYTES < 6_000 * 131_000
    monkeypatch.setattr(forms, "LEAST_ROWS_BYTES", 10_000_000)
    options = replace(PROMPT, prompt="{text}" + "x" * 131_000)
    found = csv_rows([b"text\n" + b"a\n" * 6_000], options)

    assert sum(len(next(found)) for _ in range(70)) <= forms.LEAST_ROWS_BYTES
    with pytest.raises(BadForm, match='put what all rows share into "system"'):
        list(islice(found, 10))


def test_a_large_file_may_have_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "LEAST_ROWS_BYTES", 10_000_000)
    options = replace(PROMPT, prompt="{text}" + "x" * 50_000)
    body = b"text\n" + (b"y" * 1_000 + b"\n") * 300

    size = sum(map(len, csv_rows(in_pieces(body, 1024 * 1024), options)))

    assert size > forms.LEAST_ROWS_BYTES


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        (b"text\nx\n", Options(), "a CSV file requires a prompt"),
        (b"", PROMPT, "the file is empty"),
        (b"\n \r\n", PROMPT, "the file is empty"),
        (b"other\nx\n", PROMPT, "the prompt uses unknown column 'text'; the columns are other"),
        (b"a;b,c;d\n", PROMPT, "unknown column 'text'; the columns are a, b,c, d"),
        (
            b"text,score,text\na,1,b\n",
            PROMPT,
            "the header has 2 columns 'text'; rename all but one",
        ),
        (b"text, id ,id\na,1,b\n", PROMPT, "the header has 2 columns 'id'; rename all but one"),
        (b'\n"te"xt\nx\n', PROMPT, "the header in line 2 is not valid CSV: field 1 continues"),
        (
            b"text,\xfc\nx\n",
            PROMPT,
            "the header in line 1 is not valid UTF-8; save the file as UTF-8",
        ),
    ],
)
def test_the_error_of_a_csv_file_that_cannot_become_rows_says_why(
    body: bytes, options: Options, message: str
) -> None:
    with pytest.raises(BadForm, match=message):
        rows(body, options)


def test_an_error_has_the_id_and_the_line_of_the_file() -> None:
    body = (
        b"custom_id,text\nu-1,one\n\nu-2,two,extra\n" + b'u-3,"a\nb",c\nu-4,"four"\nu-5\n\xff,x\n'
    )

    found = numbered_rows(body)

    assert [
        (2, "u-1", None),
        (4, "u-2", "the record has 3 fields; the header has 2"),
        (5, "u-3", "the record (lines 5 to 6) has 3 fields; the header has 2"),
        (7, "u-4", None),
        (8, "u-5", "the record has 1 fields; the header has 2"),
        (9, None, "the record is not valid UTF-8; save the file as UTF-8"),
    ] == [(line, row.get("custom_id"), row.get(PROBLEM)) for line, row in found]


def test_an_error_before_the_id_has_none() -> None:
    """It is no `row-2`, which no line of the file has."""
    (bad,) = rows(b"text,custom_id\nx\n")

    assert {PROBLEM: "the record has 1 fields; the header has 2"} == bad


@pytest.mark.parametrize("bad", [b'2,"two "quoted" words"', b'2,"not closed', b'2,"two"x'])
def test_one_bad_quote_costs_one_row(bad: bytes) -> None:
    found = numbered_rows(b"custom_id,text\n1,one\n" + bad + b'\n3,"three"\n4,four\n')

    assert [(2, "1"), (3, "2"), (4, "3"), (5, "4")] == [
        (line, row["custom_id"]) for line, row in found
    ]
    assert ["2"] == [row["custom_id"] for _, row in found if PROBLEM in row]


def test_a_field_may_have_any_length() -> None:
    (row,) = rows(b'id,text\n1,"' + b"lorem " * 50_000 + b'"\n', size=70_000)

    assert "Summarise: " + "lorem " * 50_000 == said(row)


@pytest.mark.parametrize(
    "body",
    [
        b"id,text\r1,one\r2,two\r",
        b"\xef\xbb\xbfid,text\r\n1,one\r\n2,two",
        b"id;text\n1;one\n2;two\n",
        b'"id"\t"text"\n1\tone\n2\ttwo\n',
        b"sep=;\r\nid;text\r\n1;one\r\n2;two\r\n",
        b"SEP=|\nid|text\n1|one\n2|two\n",
        b"id,text,,\n1,one,,\n2,two,,\n",
        b"\n\nid,text\n1,one\n2,two\n",
    ],
)
def test_files_of_other_programs_are_read(body: bytes) -> None:
    assert ["Summarise: one", "Summarise: two"] == [said(row) for row in rows(body)]


def test_a_nul_byte_is_a_character() -> None:
    assert ["Summarise: a\0b"] == [said(row) for row in rows(b"text\na\0b\n")]


def test_a_line_without_end_is_one_bad_row_and_not_held_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(csv_files, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(csv_files, "PIECE_BYTES", 10)

    found = numbered_rows(b"text\n" + b"x" * 500 + b'\ny\n"' + b"z" * 500 + b"\nlast\n", size=10)

    assert [
        (2, "the line exceeds 100 characters"),
        (3, None),
        (4, "the line exceeds 100 characters"),
        (5, None),
    ] == [(line, row.get(PROBLEM)) for line, row in found]


@pytest.mark.parametrize("size", [3, 1_000])
@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'"x', [(2, "field 1 begins with a quote that is not closed")]),
        (b'"x""', [(2, "field 1 begins with a quote that is not closed")]),
        (b'"x"', [(2, None)]),
        (b'a\r\n"x"\r', [(2, None), (3, None)]),
        (b"y" * 500, [(2, "the line exceeds 100 characters")]),
        (b"y" * 500 + b"\r\nz", [(2, "the line exceeds 100 characters"), (3, None)]),
        (
            b'"' + b"z\n" * 60 + b'"',
            [
                (2, "field 1 exceeds 100 characters, or its quote is not closed"),
                *((line, None) for line in range(3, 62)),
                (62, "field 1 begins with a quote that is not closed"),
            ],
        ),
    ],
)
def test_the_end_of_a_file_may_be_anywhere(
    monkeypatch: pytest.MonkeyPatch, body: bytes, found: list[tuple[int, str | None]], size: int
) -> None:
    monkeypatch.setattr(csv_files, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(csv_files, "PIECE_BYTES", 10)

    made = numbered_rows(b"text\n" + body, size=size)

    assert found == [(line, row.get(PROBLEM)) for line, row in made]


# Documents -------------------------------------------------------------------------------------------------


def document(name: str, body: bytes, options: Options = PROMPT) -> Any:
    return json.loads(document_row(name, len(body), body, options))


def test_a_document_goes_up_as_a_block_before_the_prompt() -> None:
    options = Options(prompt="What does {name} say?")

    row = document("a/b.md", b"\xef\xbb\xbf# Title", options)

    block, prompt = row["params"]["messages"][0]["content"]
    assert {"type": "text", "media_type": "text/plain", "data": "# Title"} == block["source"]
    assert ("document", "a/b.md") == (block["type"], block["title"])
    assert {"type": "text", "text": "What does a/b.md say?"} == prompt


def test_a_pdf_goes_up_as_it_is() -> None:
    row = document("x.PDF", b"%PDF-1.7")

    source = row["params"]["messages"][0]["content"][0]["source"]
    assert {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjc="} == source


@pytest.mark.parametrize(
    ("name", "body", "problem"),
    [
        ("x.txt", b"\xff", "x.txt is not valid UTF-8; save it as UTF-8"),
        ("x.txt", "text".encode("utf-16"), "x.txt is UTF-16; save it as UTF-8"),
        ("x.md", "text".encode("utf-16-le"), "x.md is UTF-16; save it as UTF-8"),
        ("x.txt", b"x" * MOST_LINE_BYTES, "x.txt has 8,388,608 bytes; the limit of a request is 8,388,608 bytes"),
        ("x.docx", b"PK", "x.docx: documents .docx are not supported; use .txt, .md, .html, .htm, .pdf"),
        ("README", b"x", "README: documents without a suffix are not supported; use .txt"),
    ],
)  # fmt: skip
def test_a_document_that_cannot_go_up_is_a_bad_row(name: str, body: bytes, problem: str) -> None:
    row = document(name, body)

    assert row[PROBLEM].startswith(problem)
    assert id_of(name) == row["custom_id"]


def test_the_limit_that_is_named_for_a_pdf_is_true() -> None:
    fits = document("x.pdf", b"x" * forms.MOST_PDF_BYTES, Options(prompt="?" * 60_000))
    large = json.loads(document_row("x.pdf", 12_500_000, b"", PROMPT))

    assert "params" in fits
    assert (
        "x.pdf has 12,500,000 bytes; the limit of a request is 8,388,608 bytes, that of a PDF 6,225,920"
        == large[PROBLEM]
    )


def test_the_id_of_a_document_leads_back_to_its_name() -> None:
    assert {"custom_id": id_of("ä/b.md"), "document": "ä/b.md"} == json.loads(
        named_document("ä/b.md")
    )


@pytest.mark.parametrize("size", [12, 100])
def test_lines_that_end_with_cr_alone_are_lines(size: int) -> None:
    made = b"".join(with_line_ends(in_pieces(b"first line\rsecond\r", size)))

    assert b"first line\nsecond\n" == made


@pytest.mark.parametrize("body", [b"a\r\nb\r\n", b"a\rb\n", b"a\r", b"a"])
def test_other_line_ends_stay(body: bytes) -> None:
    assert body == b"".join(with_line_ends([b"", body, b"x\ry"])).removesuffix(b"x\ry")


@pytest.mark.parametrize("name", ["a.txt", "ä/ö ü.md", "x" * 200 + ".pdf"])
def test_a_documents_name_makes_a_custom_id(name: str) -> None:
    assert re.fullmatch(CUSTOM_ID, id_of(name))
    assert id_of(name) != id_of(name + "x")


def test_an_ending_is_that_of_the_name_and_not_of_its_folder() -> None:
    assert [".md", "", ""] == [ending_of("a.b/C.MD"), ending_of("a.b/c"), ending_of("c")]


def test_braces_and_unknown_fields_stay() -> None:
    assert "{a} x {nobody}" == filled("{{a}} { b } {nobody}", {"b": "x"})
