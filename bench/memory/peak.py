"""The peak memory of a process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_mb(process: int | None = None) -> int:
    """Return the peak memory in megabytes of a process, by default of this one."""
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="ascii")
    except OSError:
        # On macOS, in bytes. On Linux this value may be that of the parent process.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10
