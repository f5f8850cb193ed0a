"""Files that commands read, and files that they write: whole or not at all.

An output file is written under a temporary name beside its place and renamed when it is complete. Until then, and if
anything fails, the old file stays as it is. Pipes and devices are written directly. Answers are as private as their
prompts, so only the owner can read an output file (mode 0600).
"""

import codecs
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TextIO

from scripts.cli import terminal
from scripts.cli.errors import CommandFailed, InvalidUsage

STANDARD = "-"
PRIVATE = 0o600
# Renaming a file over one of these would replace what the shell redirected standard output to.
_NAMES_OF_STANDARD_OUTPUT = {STANDARD, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}


# ---------------------------------------------------------------- reading


@contextmanager
def lines_of(file: Path | None) -> Iterator[Iterable[bytes]]:
    """Give the lines of a file; `-` and None are standard input."""
    if file is None or str(file) == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        opened = file.open("rb")
    except OSError as error:
        raise CommandFailed(f"{file} cannot be read: {error.strerror}") from None
    with opened:
        yield opened


def secret_in(file: Path) -> str:
    """Return the secret that a file has on its one line; `-` is standard input."""
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


# ---------------------------------------------------------------- writing


class Output:
    """Where a command writes its results, piece by piece."""

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._sink = sink
        self.written = False
        self.was_kept = False
        """Whether nothing was written, so that an old file was kept."""

    def write(self, piece: bytes) -> None:
        """Write a piece of UTF-8 text."""
        if piece:
            self._sink(piece)
            self.written = True


def standard_output() -> Output:
    """Return standard output; unsafe characters of the JSON written to it are escaped."""
    # A piece may end in the middle of a character.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def sink(piece: bytes) -> None:
        sys.stdout.write(terminal.json_text(decoder.decode(piece)))
        sys.stdout.flush()

    return Output(sink)


@contextmanager
def writing(
    file: Path | None, *, inputs: Sequence[Path | None] = (), even_if_empty: bool = False
) -> Iterator[Output]:
    """Give an output that becomes `file` when the block ends without an exception; None and `-` are standard output.

    If nothing was written, an existing file is kept, unless `even_if_empty`. Raise CommandFailed at once if the file
    cannot be written, InvalidUsage if it is one of the `inputs`.
    """
    refuse_inputs(file, inputs)
    if file is None or str(file) in _NAMES_OF_STANDARD_OUTPUT:
        yield standard_output()
    elif _is_special(file):
        with _reported(file):
            opened = file.open("wb", buffering=0)
        with opened:
            yield Output(_reporting(file, opened))
    else:
        yield from _whole(file, even_if_empty=even_if_empty)


def _whole(file: Path, *, even_if_empty: bool) -> Iterator[Output]:
    place = Path(os.path.realpath(file))  # a symbolic link stays; the file it points to is replaced
    with _reported(file):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(None, "Permission denied")
        descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=".sluice-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as opened:
            os.fchmod(descriptor, PRIVATE)
            output = Output(_reporting(file, opened))
            yield output
            with _reported(file):
                os.fsync(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not output.written and not even_if_empty:
        temporary.unlink(missing_ok=True)
        output.was_kept = True
        terminal.say(f"no results; {file} was not written")
        return
    try:
        temporary.replace(place)
    except OSError as error:
        raise CommandFailed(
            f"{file} cannot be replaced: {error.strerror}; the results are in {temporary}"
        ) from None


def _is_special(file: Path) -> bool:
    """Return whether a path is a pipe or a device; raise CommandFailed for a directory."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return False
    if stat.S_ISDIR(mode):
        raise CommandFailed(f"{file} cannot be written: it is a directory")
    return not stat.S_ISREG(mode)


def _reporting(file: Path, opened: FileIO) -> Callable[[bytes], None]:
    def sink(piece: bytes) -> None:
        left = memoryview(piece)
        with _reported(file):
            while left:
                left = left[opened.write(left) :]

    return sink


@contextmanager
def _reported(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandFailed(f"{file} cannot be written: {error.strerror}") from None


def refuse_inputs(output: Path | None, inputs: Sequence[Path | None]) -> None:
    """Raise InvalidUsage if the output is the same file as one of the inputs, under whatever name."""
    written = _identity(None if str(output) in _NAMES_OF_STANDARD_OUTPUT else output, sys.stdout)
    if written is None:
        return
    for each in inputs:
        if each is None:
            continue
        if _identity(None if str(each) == STANDARD else each, sys.stdin) == written:
            there = "standard output" if output is None else str(output)
            raise InvalidUsage(f"{there} is also the input {each}; choose another output file")


def _identity(file: Path | None, standard: TextIO) -> tuple[int, int] | None:
    """Return what identifies a regular file, whatever its name; None if there is none."""
    with suppress(OSError, ValueError):  # missing, or a stream without a descriptor
        found = os.fstat(standard.fileno()) if file is None else file.stat()
        if stat.S_ISREG(found.st_mode):
            return found.st_dev, found.st_ino
    return None
