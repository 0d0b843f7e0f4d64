"""What lifecycle nodes share beyond `shell`: refusals in one sentence, warnings without floods, findings."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from d4_datasets.errors import sentence
from d4_nodes.health import Finding
from d4_nodes.wire import WireError

_Transition = Callable[[Any, LifecycleState], TransitionCallbackReturn]


def told(transition: _Transition) -> _Transition:
    """rclpy swallows what a transition raises: here a refusal is one sentence, kept as `refusal` of the node,
    and a bug has its traceback.
    """

    @functools.wraps(transition)
    def run(self: Any, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(self, state)
        except Exception as error:
            text = str(error) if isinstance(error, WireError) else sentence(error)
            self.refusal = text or repr(error)
            self.get_logger().error(text or traceback.format_exc())
            return TransitionCallbackReturn.ERROR if text is None else TransitionCallbackReturn.FAILURE

    return run


class Complaints:
    """Warns, about one thing at most every 5 s: a flood of warnings costs more than what it warns of."""

    def __init__(self, warn: Callable[[str], Any]) -> None:
        self._warn = warn
        self._said: dict[str, float] = {}

    def __call__(self, text: str) -> None:
        """Warn, unless the same was said just now; from any thread."""
        key, now = text[:60], time.monotonic()
        if now - self._said.get(key, -1e9) > 5.0:
            self._said[key] = now
            self._warn(text)


def diagnostics(findings: Iterable[Finding], node: str, hardware: str, stamp: Any) -> DiagnosticArray:
    """Findings as a message of /diagnostics; `stamp` is a builtin_interfaces/Time."""
    array = DiagnosticArray()
    array.header.stamp = stamp
    for finding in findings:
        status = DiagnosticStatus(
            level=bytes([finding.level]), name=f"{node}: {finding.name}", message=finding.message
        )
        status.hardware_id = hardware
        status.values = [KeyValue(key=key, value=value) for key, value in finding.values.items()]
        array.status.append(status)
    return array
