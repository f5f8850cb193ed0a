"""A function's process as it is when it starts."""

import sys


def forget_what_is_wired() -> None:
    """Forget everything the functions keep between invocations, as a new execution environment does."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sluice.wiring."):
            for made in vars(module).values():
                if hasattr(made, "cache_clear"):
                    made.cache_clear()
