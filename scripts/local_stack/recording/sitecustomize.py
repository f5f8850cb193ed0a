"""Python imports this at its start where PYTHONPATH names this folder: functions' processes record their AWS calls."""

import os
from pathlib import Path

VARIABLES = {"SLUICE_RECORD_CALLS": False, "SLUICE_RECORD_EVERY_CALL": True}
"""Each names a folder, and whether every call is recorded there."""

for variable, every_call in VARIABLES.items():
    if "AWS_LAMBDA_FUNCTION_NAME" in os.environ and variable in os.environ:
        import recorder  # type: ignore[import-not-found]  # in the same folder

        recorder.install(
            Path(os.environ[variable]),
            lambda: os.environ["AWS_LAMBDA_FUNCTION_NAME"],
            every_call=every_call,
        )
