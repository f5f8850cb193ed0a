"""An output file is complete or untouched, private, and never the input."""

import ast
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import cli
from scripts.cli.errors import CommandFailed, InvalidUsage
from scripts.cli.files import refuse_inputs, writing

OLD, NEW = b"results of yesterday\n", b"results of today\n"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    file = tmp_path / "results.jsonl"
    file.write_bytes(OLD)
    file.chmod(0o644)
    return file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_file_is_replaced_when_all_is_written_and_not_before(old: Path) -> None:
    with writing(old) as output:
        output.write(NEW)
        meanwhile = old.read_bytes()

    assert (OLD, NEW) == (meanwhile, old.read_bytes())
    assert {old.name} == names(old.parent)


@pytest.mark.parametrize("reason", [CommandFailed, KeyboardInterrupt, SystemExit, ValueError])
def test_what_goes_wrong_half_way_leaves_the_old_file_and_nothing_else(
    old: Path, reason: type[BaseException]
) -> None:
    with pytest.raises(reason), writing(old) as output:  # noqa: PT012 - the block is what is tested
        output.write(NEW)
        raise reason

    assert OLD == old.read_bytes()
    assert 0o644 == mode(old)
    assert {old.name} == names(old.parent)


def test_nothing_to_write_leaves_the_old_file(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with writing(old) as output:
        output.write(b"")

    assert OLD == old.read_bytes()
    assert {old.name} == names(old.parent)
    assert f"no results; {old} was not written" in capsys.readouterr().err


def test_an_empty_result_that_is_complete_is_written(old: Path) -> None:
    with writing(old, even_if_empty=True):
        pass

    assert b"" == old.read_bytes()


@pytest.mark.parametrize("umask", [0, 0o022, 0o777], ids=oct)
def test_only_the_owner_can_read_the_file_and_what_becomes_it(old: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with writing(old) as output:
            output.write(NEW)
            (temporary,) = (path for path in old.parent.iterdir() if path != old)
            meanwhile = mode(temporary)
    finally:
        os.umask(before)

    assert (0o600, 0o600) == (meanwhile, mode(old))


def test_a_symbolic_link_stays_one_and_its_target_is_replaced(old: Path) -> None:
    link = old.with_name("link")
    link.symlink_to(old.name)

    with writing(link) as output:
        output.write(NEW)

    assert link.is_symlink()
    assert NEW == old.read_bytes()


def test_a_link_to_a_file_that_is_missing_makes_that_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("new.jsonl")

    with writing(link) as output:
        output.write(NEW)

    assert link.is_symlink()
    assert NEW == (tmp_path / "new.jsonl").read_bytes()


def test_a_pipe_is_written_as_it_goes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()

    with writing(pipe) as output:
        output.write(NEW)
    reader.join()

    assert [NEW] == read
    assert {"pipe"} == names(tmp_path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_and_a_missing_folder_are_refused_at_once(tmp_path: Path) -> None:
    reached = []
    for place in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(CommandFailed, match="cannot be written"), writing(place):
            reached.append(place)

    assert [] == reached
    assert set() == names(tmp_path)


def test_a_file_that_may_not_be_written_is_kept(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write every file, so the test replaces the answer of the system instead of the mode."""
    monkeypatch.setattr(os, "access", lambda *_: False)

    with pytest.raises(CommandFailed, match="Permission denied"), writing(old):
        pass

    assert OLD == old.read_bytes()


def test_results_that_cannot_take_their_place_are_kept_beside_it(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a file that is mounted on its own."""

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(CommandFailed) as failed, writing(old) as output:
        output.write(NEW)

    (kept,) = (path for path in old.parent.iterdir() if path != old)
    assert OLD == old.read_bytes()
    assert NEW == kept.read_bytes()
    assert str(kept) in str(failed.value)


def test_a_full_disk_is_one_line_and_keeps_the_old_file(old: Path) -> None:
    """/dev/full is a disk that is always full."""
    with (  # noqa: PT012 - the block is what is tested
        pytest.raises(CommandFailed, match="/dev/full cannot be written: No space left"),
        writing(old) as whole,
        writing(Path("/dev/full")) as full,
    ):
        whole.write(NEW)
        full.write(NEW)

    assert OLD == old.read_bytes()


# ---------------------------------------------------------------- never the input


@pytest.fixture(params=["itself", "symbolic link", "hard link", "roundabout path"])
def same(request: pytest.FixtureRequest, old: Path) -> Path:
    other = old.with_name("other")
    match request.param:
        case "symbolic link":
            other.symlink_to(old)
        case "hard link":
            other.hardlink_to(old)
        case "roundabout path":
            return old.parent / ".." / old.parent.name / old.name
        case _:
            return old
    return other


def test_an_output_that_is_the_input_is_refused_under_every_name(old: Path, same: Path) -> None:
    with pytest.raises(InvalidUsage, match=r"is also the input"), writing(same, inputs=[old]):
        pass

    assert OLD == old.read_bytes()


def test_standard_streams_are_files_too(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with old.open("r+", encoding="utf-8") as opened:
        monkeypatch.setattr(sys, "stdin", opened)
        with pytest.raises(InvalidUsage, match=r"is also the input -"):
            refuse_inputs(old, [Path("-")])
        monkeypatch.setattr(sys, "stdout", opened)
        for standard in (None, Path("-"), Path("/dev/stdout")):
            with pytest.raises(InvalidUsage, match=r"is also the input"):
                refuse_inputs(standard, [old])


def test_another_file_and_a_device_are_no_input(old: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(OLD)

    refuse_inputs(other, [old, None, tmp_path / "missing"])
    refuse_inputs(tmp_path / "missing", [tmp_path / "missing"])
    refuse_inputs(Path(os.devnull), [Path(os.devnull)])


# ---------------------------------------------------------------- everywhere

COMMAND_LINE = sorted(Path(cli.__file__).parent.glob("*.py"))
WRITES = {"write_text", "write_bytes", "mkstemp", "touch", "copyfile", "NamedTemporaryFile"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_files_are_written_in_one_module() -> None:
    writing = set()
    for path in COMMAND_LINE:
        for name, call in calls(path):
            last = name.rpartition(".")[2]
            given = {each.value for each in call.args if isinstance(each, ast.Constant)}
            opens = last == "open" and any(set("wax+") & set(str(each)) for each in given)
            if opens or last in WRITES or name in {"os.open", "os.write"}:
                writing.add(path.name)

    assert {"files.py"} == writing


def test_text_is_printed_in_one_module() -> None:
    """Beside it: progress writes lines, the bar and tables draw, each with text that is escaped first."""
    prints = {"print", "echo", "secho", "confirm", "prompt"}
    printing = {
        (path.name, name)
        for path in COMMAND_LINE
        for name, _ in calls(path)
        if name.rpartition(".")[2] in prints or name.startswith(("sys.stdout.w", "sys.stderr.w"))
    }

    assert {
        ("bar.py", "self._console.print"),
        ("files.py", "sys.stdout.write"),
        ("progress.py", "print"),
        ("stack.py", "terminal.confirm"),
        ("letters.py", "terminal.confirm"),
        ("tables.py", "console.print"),
    } == {each for each in printing if each[0] != "terminal.py"}
