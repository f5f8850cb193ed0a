"""Text for a terminal: everything that a command prints goes through this module.

Results go to standard output, messages to standard error. Names, answers and error messages come from other systems.
Printed raw, they could move the cursor, overwrite lines or reverse the direction of text, and so show what did not
happen. All such characters are therefore escaped, whether or not the output is a terminal: logs are read on one, too.
"""

import codecs
import json
import re
import sys
from io import TextIOWrapper
from typing import Any

import typer

# Control characters (C0, DEL, C1), separators of lines and paragraphs, characters that change the direction of text,
# and halves of surrogate pairs, which no encoding can write.
_CONTROLS = r"\x00-\x1f\x7f-\x9f"
_OTHERS = r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROLS}{_OTHERS}]")
_UNSAFE_IN_JSON = re.compile(rf"[\x00-\x09\x0b-\x1f\x7f-\x9f{_OTHERS}]")
_NAMES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def line(text: str) -> str:
    """Return text on one line, without characters that a terminal obeys."""
    return _UNSAFE.sub(lambda found: _escaped(found[0]), text)


def block(text: str) -> str:
    """Return text without characters that a terminal obeys; line breaks and tabs are kept."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(line, each.split("\t"))) for each in lines)


def safe(value: Any) -> Any:
    """Return a JSON value with all strings as `line` returns them."""
    match value:
        case str():
            return line(value)
        case dict():
            return {line(name): safe(each) for name, each in value.items()}
        case list():
            return [safe(each) for each in value]
        case _:
            return value


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF:  # noqa: PLR2004
        return _REPLACEMENT
    return _NAMES.get(character) or (f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}")  # noqa: PLR2004


def as_json(value: object, indent: int | None = None) -> str:
    """Return a value as JSON; what a terminal would obey, or no encoding can write, is escaped."""
    separators = (",", ": ") if indent else (",", ":")
    return json_text(json.dumps(value, indent=indent, ensure_ascii=False, separators=separators))


def json_text(text: str) -> str:
    """Return the same JSON with unsafe characters as JSON escapes."""
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def prepare() -> None:
    r"""Write what standard output's encoding lacks as `\uXXXX`, which JSON and people can read."""
    codecs.register_error("sluice", _unencodable)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="sluice")


def _unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    units = text.encode("utf-16-be", "surrogatepass")
    pairs = zip(units[::2], units[1::2], strict=True)
    return "".join(f"\\u{high << 8 | low:04x}" for high, low in pairs), error.end


def say(text: str) -> None:
    """Print a message of one line to standard error."""
    print(line(text), file=sys.stderr, flush=True)


def put(text: str) -> None:
    """Print a result of one line to standard output."""
    print(line(text))


def put_block(text: str) -> None:
    """Print a result of several lines to standard output."""
    print(block(text))


def print_json(value: object) -> None:
    """Print a result as JSON to standard output."""
    print(as_json(value, indent=2))


def confirm(question: str) -> bool:
    """Ask a question on the terminal; return whether the answer is yes."""
    return typer.confirm(line(question), default=False, err=True)


def ask_hidden(question: str) -> str:
    """Ask for a secret on the terminal; return what is entered, which is not shown."""
    answer: str = typer.prompt(
        line(question), default="", hide_input=True, show_default=False, err=True
    )
    return answer


def is_piped() -> bool:
    """Return whether standard output is not a terminal."""
    return not sys.stdout.isatty()


def counted(number: int, thing: str) -> str:
    """Return `1 job`, `2 jobs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
