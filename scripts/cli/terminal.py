"""Input and output of commands: results on standard output, messages on standard error."""

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from scripts.cli.errors import CommandFailed


def say(text: str) -> None:
    """Prints a message to standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Prints a result as JSON to standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def is_piped() -> bool:
    """Returns whether standard output is not a terminal."""
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


def secret_in(file: Path) -> str:
    """Returns the secret a file holds on its one line; `-` is standard input."""
    with lines_of(file) as source:
        lines = [line.strip() for line in source]
    if len(lines) > 1 and any(lines[1:]):
        raise CommandFailed(f"{file} has several lines; a key file must have one line with the key")
    try:
        secret = b"".join(lines).decode("ascii")
    except UnicodeDecodeError:
        raise CommandFailed(f"{file} does not contain a key: it is not plain ASCII text") from None
    if not secret:
        raise CommandFailed(f"{file} is empty; a key file must have one line with the key")
    return secret


PRIVATE = 0o600


@contextmanager
def written_to(file: Path) -> Iterator[TextIO]:
    """Gives a file to write text to, which only its owner may read; `-` is standard output.

    Answers are as private as the prompts they answer. A file that exists already becomes private, too, before anything
    is written to it; what is no regular file, such as a pipe, keeps its mode.
    """
    if str(file) == "-":
        yield sys.stdout
        return
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE)
    except OSError as error:
        raise CommandFailed(f"{file} cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.fchmod(descriptor, PRIVATE)
        except OSError as error:
            raise CommandFailed(
                f"cannot set private permissions on {file} ({error.strerror}); use another file"
            ) from None
        yield opened


def counted(number: int, thing: str) -> str:
    """Writes `1 job`, `2 jobs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
