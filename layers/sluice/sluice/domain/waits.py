"""The waits that a test or a benchmark may shorten, so that hours of an outage pass in minutes.

No promise depends on their length: they only trade receives and calls for delay. A deployment keeps the defaults.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final, Self


@dataclass(frozen=True, slots=True)
class Waits:
    """All in milliseconds."""

    hold_ms: int = 300_000
    """How long a message may wait inside an invocation for its start; beyond that it waits better in the queue.

    An invocation that makes calls is paid anyway, so holding costs nothing more, while a return costs a receive. As
    long as an invocation takes new messages: so the fewest workers there may be (2) hold what a limit of 20 a minute
    can start.
    """
    linger_ms: int = 15_000
    """Maximum lifetime of an invocation that cannot start any job."""
    rest_ms: int = 10_000
    """A wait up to this long is spent inside the invocation."""
    breaker_pause_ms: int = 5_000
    """The first pause of an open breaker; each further failure doubles it."""
    breaker_pause_cap_ms: int = 60_000
    overload_base_ms: int = 1_000
    """The ceiling of the first snooze after a 529; each further snooze doubles it."""
    overload_cap_ms: int = 300_000

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `{"hold_ms": 1000, ...}`; raises ValueError. What is not named keeps its default.

        Shorter only: the visibility of messages, the lease and the time of an invocation were chosen for the defaults.
        """
        given = json.loads(text)
        if not isinstance(given, dict):
            message = "not a JSON object"
            raise ValueError(message)  # noqa: TRY004 - about the text, as all of these
        longest: dict[str, int] = asdict(cls())
        for name, value in given.items():
            if name not in longest:
                message = f"no wait is called {name!r}; there are {', '.join(longest)}"
                raise ValueError(message)
            if type(value) is not int or not 0 <= value <= longest[name]:
                message = f"{name} must be milliseconds from 0 to {longest[name]}, got {value!r}"
                raise ValueError(message)
        return cls(**given)


USUAL: Final = Waits()
