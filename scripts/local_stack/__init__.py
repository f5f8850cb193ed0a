"""The whole of Sluice on one machine: template.yaml deployed into an embedded AWS emulator.

Use::

    with LocalStack(claude_url="http://127.0.0.1:8089").running() as ready:
        ready.api_url, ready.client_key, ready.client("sqs")
"""

from scripts.local_stack.emulator import StackError
from scripts.local_stack.stack import DEFAULT_PORT, LocalStack, Ready, emulator_alone, up

__all__ = ["DEFAULT_PORT", "LocalStack", "Ready", "StackError", "emulator_alone", "up"]
