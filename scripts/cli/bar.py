"""Progress on a terminal: a bar and the counts below it, redrawn in place."""

from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scripts.cli import terminal
from scripts.cli.progress import Snapshot


class LiveBar:
    """Progress for a terminal: a bar and the counts below it, redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, refresh_per_second=8, redirect_stdout=False)

    def __enter__(self) -> Self:
        """Start to draw on the last lines of the terminal."""
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; the last counts stay visible."""
        self._live.stop()

    def show(self, snapshot: Snapshot, now: float) -> None:  # noqa: ARG002 - redraws as it likes
        """Redraw the bar."""
        self._live.update(self._drawn(snapshot))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(terminal.line(text), style="yellow", markup=False, highlight=False)

    @staticmethod
    def _drawn(snapshot: Snapshot) -> Group:
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(ratio=1)
        line.add_column(justify="right", no_wrap=True)
        total = max(1, snapshot.total)
        percent = 100 * snapshot.done // total
        line.add_row(
            ProgressBar(total=total, completed=snapshot.done),
            Text(f"{snapshot.done}/{snapshot.total} done  {percent}%", style="bold"),
        )
        return Group(line, Text(snapshot.text(), style="red" if snapshot.failed else "default"))
