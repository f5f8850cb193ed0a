"""What commands read from and write to: answers on standard output, all else on standard error."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from scripts.cli_errors import CommandFailed


def say(text: str) -> None:
    """Tells the person something that is not the command's answer."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Prints an answer for a program."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def is_piped() -> bool:
    """Tells whether a program, not a person, reads standard output."""
    return not sys.stdout.isatty()


@contextmanager
def lines_of(file: Path | None) -> Iterator[Iterable[bytes]]:
    """Gives the lines of a file; `-` and None are standard input."""
    if file is None or str(file) == "-":
        yield sys.stdin.buffer
        return
    try:
        opened = file.open("rb")
    except OSError as error:
        raise CommandFailed(f"{file} cannot be read: {error.strerror}") from None
    with opened:
        yield opened


@contextmanager
def written_to(file: Path) -> Iterator[TextIO]:
    """Gives a file to write text to; `-` is standard output."""
    if str(file) == "-":
        yield sys.stdout
        return
    try:
        opened = file.open("w", encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{file} cannot be written: {error.strerror}") from None
    with opened:
        yield opened


def counted(number: int, thing: str) -> str:
    """Writes `1 job`, `2 jobs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
