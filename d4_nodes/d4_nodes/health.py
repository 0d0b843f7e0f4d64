"""How a running loop is, as /diagnostics says it: commands, inference server, every stream, the guard.

Knows no ROS; levels are those of diagnostic_msgs/DiagnosticStatus.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import NamedTuple

from d4_nodes.guard import RULES
from d4_nodes.loop import Loop

OK, WARN, ERROR, STALE = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When to warn: shares of ticks since the last look, and of the contract's rate."""

    missed_warn: float = 0.01
    missed_error: float = 0.1
    rate_warn: float = 0.9


class Finding(NamedTuple):
    """One line of diagnostics."""

    name: str
    level: int
    message: str
    values: dict[str, str]


class Examiner:
    """Looks at a loop now and then; rates and shares are those since the last look."""

    def __init__(self, loop: Loop, thresholds: Thresholds = Thresholds()) -> None:
        self.loop, self.thresholds = loop, thresholds
        self._counts: Counter[str] = Counter()
        self._arrivals: Counter[str] = Counter()
        self._acts: Counter[str] = Counter()
        self._looked_ns = loop.now()

    def look(self) -> list[Finding]:
        """All findings now."""
        now = self.loop.now()
        seconds = max(1e-9, (now - self._looked_ns) / 1e9)
        self._looked_ns = now
        return [
            self._commands(),
            self._server(),
            *(self._stream(name, now, seconds) for name in self.loop.inbox.names),
            self._guard(),
        ]

    def _commands(self) -> Finding:
        loop, counts = self.loop, Counter(self.loop.report.counts)
        fresh = counts - self._counts
        self._counts = counts
        missed = fresh["missed"] / max(1, fresh["commands"])
        level, text = OK, loop.state
        if loop.state in RULES:
            level, text = ERROR, f"safety action ({loop.state}): {loop.guard.tally[loop.state].reason}"
        elif missed >= self.thresholds.missed_error:
            level, text = ERROR, f"{missed:.0%} of the answers came too late"
        elif missed >= self.thresholds.missed_warn:
            level, text = WARN, f"{missed:.0%} of the answers came too late"
        lateness = loop.report.stages["lateness"]
        values = {name: str(counts[name]) for name in ("commands", "missed", "safe", "commands left out")}
        values |= {"rate_hz": f"{loop.report.achieved_hz:.2f}"}
        values |= {f"lateness_p{q:g}_ms": f"{lateness.quantile_ms(q / 100):.3f}" for q in (50, 99, 99.9)}
        return Finding("commands", level, text, values)

    def _server(self) -> Finding:
        loop, answer = self.loop, self.loop.report.stages["answer"]
        values = {f"answer_p{q:g}_ms": f"{answer.quantile_ms(q / 100):.2f}" for q in (50, 99, 99.9)}
        values |= {str(k): str(v) for k, v in loop.report.about.items() if isinstance(v, (str, int, float))}
        if not loop.is_connected:
            return Finding("inference server", ERROR, "not connected", values)
        if answer.count and answer.quantile_ms(0.99) > loop.contract.latency_ms:
            return Finding("inference server", WARN, "slower than the contract's latency_ms", values)
        return Finding("inference server", OK, "answers", values)

    def _stream(self, name: str, now: int, seconds: float) -> Finding:
        inbox, contract = self.loop.inbox, self.loop.contract
        stream = next(s for s in contract.observations if s.name == name)
        arrived = inbox.accepted[name] - self._arrivals[name]
        self._arrivals[name] = inbox.accepted[name]
        newest = inbox.newest(name)
        rate = arrived / seconds
        values = {"topic": stream.topic, "rate_hz": f"{rate:.2f}", "accepted": str(inbox.accepted[name])}
        if newest is None:
            return Finding(name, ERROR, "nothing has come", values)
        age = now - newest.stamp_ns
        values["age_ms"] = f"{age / 1e6:.1f}"
        tolerance = stream.align.tolerance_ns
        if tolerance is not None and age > tolerance:
            return Finding(name, ERROR, f"stale: {age / 1e6:.0f} ms old", values)
        if stream.is_image and rate < self.thresholds.rate_warn * contract.rate_hz:
            return Finding(name, WARN, f"{rate:.1f} Hz, the contract has {contract.rate_hz:g} Hz", values)
        return Finding(name, OK, f"{rate:.1f} Hz", values)

    def _guard(self) -> Finding:
        guard = self.loop.guard
        acts = Counter({name: tally.count for name, tally in guard.tally.items()})
        fresh = acts - self._acts
        self._acts = acts
        now = self.loop.now()
        values = {
            name: f"{tally.count}, last {(now - tally.last_ns) / 1e9:.1f} s ago" if tally.count else "0"
            for name, tally in guard.tally.items()
        }
        if guard.is_stopped:
            return Finding("guard", ERROR, "emergency stop is latched", values)
        if not guard.config.enabled:
            return Finding("guard", WARN, "switched off", values)
        if fresh:
            said = "; ".join(f"{name} {count} times" for name, count in fresh.items())
            return Finding("guard", WARN, f"acted since the last look: {said}", values)
        shadow = "" if guard.config.send else "; shadow mode, nothing is sent"
        return Finding("guard", OK, f"has not acted{shadow}", values)
