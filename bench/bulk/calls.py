"""The AWS calls of a local stack's functions, counted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.local_stack.recording.recorder import EVERY_CALL_VARIABLE


@contextmanager
def counting() -> Iterator[Callable[[str], Counter[str]]]:
    """Count the calls of stacks that are started inside; yield a function that returns those of one function."""
    with TemporaryDirectory() as folder:

        def calls_of(function: str) -> Counter[str]:
            lines = (
                json.loads(line)
                for file in Path(folder).glob("*.jsonl")
                for line in file.read_text(encoding="utf-8").splitlines()
            )
            # Names of functions have logical ids and random suffixes.
            start = f"sluice-local-{function}function"
            return Counter(
                line["operation"]
                for line in lines
                if line["function"].lower().startswith(start)
                and "Missing" not in line["operation"]  # a permission, not a call
            )

        os.environ[EVERY_CALL_VARIABLE] = folder
        try:
            yield calls_of
        finally:
            del os.environ[EVERY_CALL_VARIABLE]
