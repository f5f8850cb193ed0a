"""Python imports this at its start where PYTHONPATH names this folder: functions' processes record their AWS calls."""

import os
from pathlib import Path

if "AWS_LAMBDA_FUNCTION_NAME" in os.environ and "SLUICE_RECORD_CALLS" in os.environ:
    import recorder  # type: ignore[import-not-found]  # in the same folder

    recorder.install(
        Path(os.environ["SLUICE_RECORD_CALLS"]), lambda: os.environ["AWS_LAMBDA_FUNCTION_NAME"]
    )
