"""Commands: do they lie within the contract, and do they use what it allows?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from d4_datasets.checks.base import SHORT, Part, Verdict, error, longest_run, ok, warn
from d4_datasets.contract import Contract

BINS = 24  # of the histogram of a continuous component
_UNUSED = 0.05  # share of the range
_SATURATED = 0.25  # share of the frames
_TOO_FAST = 0.01
_IDLE = 0.1  # share of the episodes
_MANY = 64  # classes; of more only the number that is used is kept


class Actions:
    """Running statistics of the labelled actions, one entry per component (A)."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        dim = contract.action_dim
        self.low, self.high = (v.astype(np.float64) for v in (contract.action_low, contract.action_high))
        self.slack = 1e-4 * (self.high - self.low)  # float32 and unit conversions
        channels = [c for c in contract.actions for _ in c.select]
        self.discrete = np.array([c.kind != "continuous" for c in channels])
        self.max_rate = np.array(
            [r for c in contract.actions for r in (c.max_rate or (np.inf,) * c.dim)], np.float64
        )
        self.bins = [BINS if c.kind == "continuous" else (c.classes or 2) for c in channels]
        self.histogram = [np.zeros(bins, np.int64) for bins in self.bins]
        self.minimum, self.maximum = np.full(dim, np.inf), np.full(dim, -np.inf)
        self.sum, self.square = np.zeros(dim), np.zeros(dim)
        self.outside, self.at_limit, self.too_fast, self.held = (np.zeros(dim, np.int64) for _ in range(4))
        self.count = self.steps = self.longest_hold = 0
        self.labelled_episodes = self.idle_episodes = 0

    def add(self, part: Part) -> None:
        """Take in the actions of one episode."""
        action, known = part.action, part.mask & np.isfinite(part.action).all(1)
        step = np.abs(np.diff(action, axis=0)) * self.contract.rate_hz
        both = known[1:] & known[:-1]
        self.too_fast += (step[both] > 1.001 * self.max_rate).sum(0)
        self.held += (step[both] == 0).sum(0)
        self.steps += int(both.sum())
        hold, _ = longest_run(both & (step == 0).all(1))
        self.longest_hold = max(self.longest_hold, hold + 1 if hold else 0)
        value = action[known].astype(np.float64)
        if not len(value):
            return
        if len(value) >= SHORT:
            self.labelled_episodes += 1
            self.idle_episodes += bool((np.ptp(value, axis=0) <= self.slack).all())
        self._count(value)

    def _count(self, value: np.ndarray) -> None:
        """Take in known commands [n, A]."""
        self.count += len(value)
        self.minimum = np.minimum(self.minimum, value.min(0))
        self.maximum = np.maximum(self.maximum, value.max(0))
        self.sum += value.sum(0)
        self.square += (value**2).sum(0)
        bad = (value < self.low - self.slack) | (value > self.high + self.slack)
        bad |= self.discrete & (value != np.round(value))
        self.outside += bad.sum(0)
        self.at_limit += ((value <= self.low + self.slack) | (value >= self.high - self.slack)).sum(0)
        for i, bins in enumerate(self.bins):
            if self.discrete[i]:
                place = value[:, i]
            else:
                place = (value[:, i] - self.low[i]) / (self.high[i] - self.low[i]) * bins
            index = np.clip(place, 0, bins - 1).astype(np.int64)
            self.histogram[i] += np.bincount(index, minlength=bins)

    def table(self) -> dict[str, dict[str, Any]]:
        """Per component name; shares are of the labelled frames or of the steps between two of them."""
        if not self.count:
            return {}
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.square / self.count - mean**2, 0.0))
        steps = max(self.steps, 1)
        return {
            name: {
                "min": float(self.minimum[i]), "max": float(self.maximum[i]),
                "mean": float(mean[i]), "std": float(std[i]),
                "low": float(self.low[i]), "high": float(self.high[i]),
                "used": self._used(i), "outside": int(self.outside[i]),
                "at_limit": float(self.at_limit[i] / self.count),
                "held": float(self.held[i] / steps), "over_max_rate": float(self.too_fast[i] / steps),
                "constant": bool(self.maximum[i] - self.minimum[i] <= self.slack[i]),
                "discrete": bool(self.discrete[i]), "histogram": self.histogram[i][:_MANY].tolist(),
                "classes": self.bins[i] if self.discrete[i] else 0,
                "unused_classes": self._unused(i) if self.discrete[i] else [],
            }
            for i, name in enumerate(self.contract.action_names)
        }  # fmt: skip

    def _used(self, i: int) -> float:
        """Share of the contract's range between the smallest and the largest command."""
        low, high = np.clip([self.minimum[i], self.maximum[i]], self.low[i], self.high[i])
        return float((high - low) / max(self.high[i] - self.low[i], 1e-12))

    def _unused(self, i: int) -> list[int]:
        return np.flatnonzero(self.histogram[i] == 0).tolist()

    def verdicts(self) -> Iterator[Verdict]:
        """Limits, dead and saturated components, unused classes, episodes in which nothing is done."""
        table = self.table()
        if not table:
            return
        found = [*self._limits(table), *self._dead(table), *self._idle()]
        for name, a in table.items():
            found += self._range(name, a)
        yield from found or [ok("actions", "all within the contract, all used")]

    def _limits(self, table: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
        for name, a in table.items():
            if a["outside"]:
                text = (
                    f"{name} is outside its contract in {a['outside']} frames: "
                    f"{a['min']:.4g} to {a['max']:.4g}, allowed {a['low']:.4g} to {a['high']:.4g}"
                )
                yield error(
                    "actions", text, "check units and field path, or widen low/high, and ingest again"
                )

    def _dead(self, table: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
        constant = [name for name, a in table.items() if a["constant"]]
        if len(constant) == len(table):
            text = "all actions are constant: nothing can be learned from them"
            yield error("actions", text, "check the field paths under actions/select in the contract")
        elif constant:
            text = f"{', '.join(constant)} never changes"
            yield warn("actions", text, "leave it out of the contract if the robot does not use it")

    def _idle(self) -> Iterator[Verdict]:
        idle, all_ = self.idle_episodes, self.labelled_episodes
        if _IDLE * all_ < idle < all_:
            text = f"in {idle} of {all_} labelled episodes the command never changes"
            yield warn(
                "actions", text, "was the robot driven by another topic, or left alone? leave them out"
            )

    def _range(self, name: str, a: dict[str, Any]) -> Iterator[Verdict]:
        """How a component that is not constant uses its range."""
        if a["constant"]:
            return
        if a["used"] < _UNUSED and not a["discrete"]:
            text = f"{name} uses {a['used']:.1%} of its range"
            yield warn("actions", text, "check its units; or narrow low/high to what the robot does")
        if a["at_limit"] > _SATURATED and not a["discrete"]:
            text = f"{name} is saturated: at a limit in {a['at_limit']:.1%} of the frames"
            hint = "clipped commands: widen low/high and ingest again; a driver at full power: fine"
            yield warn("actions", text, hint)
        if a["unused_classes"]:
            names = ", ".join(map(str, a["unused_classes"][:8]))
            more = f" and {len(a['unused_classes']) - 8} more" if len(a["unused_classes"]) > 8 else ""
            text = f"{name} never takes {names}{more} of its {a['classes']} classes"
            hint = "the policy cannot learn them: record them, or lower `classes` if you chose it"
            yield warn("actions", text, hint)
        if a["over_max_rate"] > _TOO_FAST:
            text = f"{name} changes faster than max_rate in {a['over_max_rate']:.1%} of the steps"
            yield warn("actions", text, "raise max_rate, or the guard will slow the policy down")
