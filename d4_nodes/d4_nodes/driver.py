"""What loop and relay have in common: a thread that sends, and what other threads may do about it."""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable
from typing import ClassVar

from d4_datasets.contract import Contract
from d4_nodes.guard import DOUBTS, Guard, Verdict
from d4_nodes.inbox import Inbox
from d4_nodes.report import Report

# more than this in one look is a jump: of a clock against monotonic time, forwards or back, or of a simulated
# one forwards, as how fast that runs is not known; back it goes only where its messages overtake each other
_JUMP_NS, _LEAP_NS = 100_000_000, 10_000_000_000


# what acts as long as something that is watched is not there
_NOT_YET = ("stale", "watchdog")


class Driver(abc.ABC):
    """Sends commands from the thread that calls `run`.

    Args:
        contract: the robot.
        guard: asked about every command; shared with other threads under `lock`.
        inbox: where samples come in.
        send: moves the robot: (verdict, time of `clock`). Called under `lock`.
        clock: dates frames, ns.
        report: collects measurements.

    Attributes:
        kind: what people call it.
        state: for people: `driving`, `waiting`, or the guard's rule that acts.
        lock: guards `guard` and `send` against other threads.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        contract: Contract,
        guard: Guard,
        inbox: Inbox,
        send: Callable[[Verdict, int], None],
        clock: Callable[[], int],
        report: Report,
    ) -> None:
        self.contract, self.guard, self.inbox, self.report = contract, guard, inbox, report
        self.lock = threading.RLock()
        self.state = "waiting"
        self._send, self._clock = send, clock
        self._stop, self._is_over = threading.Event(), False
        self._beat_ns = self._spoke_ns = time.monotonic_ns()  # last went round, last sent anything
        self._has_driven = False
        self._stood_still = ""  # what the safety action was sent for in this thread's place
        self._looked_ns = (0, 0)  # when the clock was looked at last, by itself and monotonic

    @abc.abstractmethod
    def run(self) -> None:
        """Go round until `stop`; then send the safety action, last of all."""

    @abc.abstractmethod
    def _rest_for(self, reason: str) -> None:
        """Send the safety action now, and say why. Called under `lock`."""

    @property
    @abc.abstractmethod
    def keeps_real_time(self) -> bool:
        """Whether its periods are those of the monotonic clock; a simulator may stand still."""

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.set()
        self.inbox.wake()

    def rest_from_outside(self, timeout_s: float) -> bool:
        """Send the safety action in place of a thread that stands still; False if it holds the lock."""
        if not self.lock.acquire(timeout=timeout_s):
            return False
        try:
            # what it was about to send must not follow the safety action
            self._stood_still = f"the {self.kind} had sent nothing for {self.silence_s():.3f} s"
            self._rest_for(self._stood_still)
        finally:
            self.lock.release()
        return True

    def abandon(self, timeout_s: float) -> bool:
        """`rest_from_outside` for the last time: what is sent if the thread wakes up later goes nowhere."""
        is_ours = self.lock.acquire(timeout=timeout_s)
        try:
            return is_ours and self.rest_from_outside(timeout_s)
        finally:
            self._send = lambda verdict, now_ns: None
            if is_ours:
                self.lock.release()

    def tell(self, act: Callable[[Guard], None]) -> None:
        """Tell the guard something; what it forbids by that stops at once."""
        with self.lock:
            act(self.guard)
        self.inbox.wake()

    def _is_doubtful(self, verdict: Verdict) -> bool:
        """Whether a verdict is a reason not to trust at once what comes next. What is not there before
        anything was driven, is none."""
        if not verdict.is_safe:
            self._has_driven = True
            return False
        rule = verdict.rules[0]
        return rule in DOUBTS and (self._has_driven or rule not in _NOT_YET)

    def _jump_ns(self) -> int:
        """By how much the clock has jumped since this was asked last; 0 if it has not. The first answer means
        nothing."""
        now, monotonic = self._clock(), time.monotonic_ns()
        step, elapsed = now - self._looked_ns[0], monotonic - self._looked_ns[1]
        self._looked_ns = (now, monotonic)
        if self.keeps_real_time:
            return step - elapsed if abs(step - elapsed) > _JUMP_NS else 0
        return step if step < -self.contract.period_ns or step > _LEAP_NS else 0

    def now(self) -> int:
        """The clock that dates frames, ns."""
        return self._clock()

    def beat_age_s(self) -> float:
        """Seconds since it last went round, 0 once it has ended as it was asked to."""
        return 0.0 if self._is_over else (time.monotonic_ns() - self._beat_ns) / 1e9

    def silence_s(self) -> float:
        """Seconds since anything was sent."""
        return (time.monotonic_ns() - self._spoke_ns) / 1e9
