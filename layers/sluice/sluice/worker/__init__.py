"""Running jobs and rows: taking them, waiting for the limits, calling Claude, recording the result."""
