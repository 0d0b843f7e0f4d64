"""What a run of the loop was like: latencies, misses, rules of the guard, as text and as JSON.

Memory is fixed however long the run: durations go into histograms whose bins are 2 % wide. Field names of the
JSON are those of ros2_benchmark where it has one for the thing.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import whole

_GROWTH = 1.02
_SMALLEST_NS = 1_000.0
_BINS = 1 + math.ceil(math.log(1e12 / _SMALLEST_NS, _GROWTH))  # up to 1000 s
_MINUTES = 24 * 60
_BY_MINUTE = ("answer", "lateness", "relay")  # stages whose quantiles are kept for every minute

STAGES = {
    "transport": "capture to arrival",
    "prepare": "decode, resize, copy",
    "answer": "submit to reply",
    "encode": "of that, the session: tokenizer, dynamics, policy",
    "plan": "of that, the later leads",
    "relay": "arrival of another policy's command to handing it over",
    "guard": "the verdict",
    "publish": "handing the command over",
    "age": "age of the observation when the decision was there",
    "latency": "capture to command",
    "lateness": "command against capture + latency_ms",
}


class Histogram:
    """Durations in ns, 1 us to 1000 s, in bins 2 % wide; quantiles are right to 2 %, extremes exact."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, np.int64)
        self.count, self._sum, self._squares = 0, 0.0, 0.0
        self.smallest, self.largest = math.inf, -math.inf

    def add(self, value_ns: float) -> None:
        """Count one; what is shorter than 1 us counts as that."""
        bin_ = 0 if value_ns <= _SMALLEST_NS else math.ceil(math.log(value_ns / _SMALLEST_NS, _GROWTH))
        self._counts[min(bin_, _BINS - 1)] += 1
        self.count += 1
        self._sum += value_ns
        self._squares += value_ns * value_ns
        self.smallest, self.largest = min(self.smallest, value_ns), max(self.largest, value_ns)

    def quantile_ms(self, q: float) -> float:
        """The q-quantile in ms, NaN without values."""
        if not self.count:
            return math.nan
        bin_ = int(np.searchsorted(np.cumsum(self._counts), math.ceil(q * self.count)))
        return min(_SMALLEST_NS * _GROWTH**bin_, self.largest) / 1e6

    def summary_ms(self) -> dict[str, float]:
        """Mean, standard deviation, p50, p99, p99.9 and extremes, in ms."""
        if not self.count:
            return {"count": 0}
        mean = self._sum / self.count
        std = math.sqrt(max(0.0, self._squares / self.count - mean * mean))
        quantiles = {f"p{100 * q:g}": self.quantile_ms(q) for q in (0.5, 0.99, 0.999)}
        ends = {"min": self.smallest / 1e6, "max": self.largest / 1e6}
        return {"count": self.count, "mean": mean / 1e6, "std": std / 1e6, **quantiles, **ends}


class Report:
    """Collects what happens and says it at the end.

    Args:
        rate_hz, latency_ms: of the contract.
        about: facts about what ran (checkpoint, contract, machine), for the JSON.
    """

    def __init__(self, rate_hz: float, latency_ms: float, about: dict[str, Any] | None = None) -> None:
        self.rate_hz, self.latency_ms, self.about = rate_hz, latency_ms, dict(about or {})
        self.stages = {name: Histogram() for name in STAGES}
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.minutes: list[dict[str, float]] = []
        self._minute = {name: Histogram() for name in _BY_MINUTE}  # of the minute at hand
        self._began, self._minute_began = time.monotonic(), time.monotonic()
        self._cpu = time.process_time()
        self._first_ns = self._last_ns = 0

    def add(self, stage: str, ns: float) -> None:
        """One duration of a stage."""
        self.stages[stage].add(ns)
        if stage in self._minute:
            self._minute[stage].add(abs(ns))

    def command(self, time_ns: int) -> None:
        """A command of a tick was sent at a time of the loop's clock."""
        self._first_ns = self._first_ns or time_ns
        self._last_ns = time_ns
        self.counts["commands"] += 1
        self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._minute_began < 60 or len(self.minutes) >= _MINUTES:
            return
        seen = {name: histogram for name, histogram in self._minute.items() if histogram.count}
        self.minutes.append({
            **{f"{name}_p50_ms": histogram.quantile_ms(0.5) for name, histogram in seen.items()},
            **{f"{name}_p99_ms": histogram.quantile_ms(0.99) for name, histogram in seen.items()},
            "rss_mb": rss_mb(),
        })  # fmt: skip
        self._minute, self._minute_began = {name: Histogram() for name in _BY_MINUTE}, now

    @property
    def achieved_hz(self) -> float:
        """Commands per second between the first and the last."""
        span = (self._last_ns - self._first_ns) / 1e9
        return (self.counts["commands"] - 1) / span if span > 0 else 0.0

    def to_dict(self, rules: dict[str, Any] | None = None) -> dict[str, Any]:
        """Everything as JSON values; `rules` are the guard's tallies."""
        wall = time.monotonic() - self._began
        lateness = self.stages["lateness"]
        jitter = lateness.summary_ms()
        return {
            "MEAN_FRAME_RATE": self.achieved_hz,
            "NUM_MISSED_FRAMES": self.counts["missed"],
            "MAX_JITTER": jitter.get("max"), "MIN_JITTER": jitter.get("min"),
            "MEAN_JITTER": jitter.get("mean"), "STD_DEV_JITTER": jitter.get("std"),
            "MEAN_OVERALL_CPU_UTILIZATION": 100 * (time.process_time() - self._cpu) / wall if wall else 0.0,
            "seconds": wall, "rate_hz": self.rate_hz, "latency_ms": self.latency_ms,
            "counts": dict(self.counts), "reasons": dict(self.reasons),
            "stages_ms": {name: histogram.summary_ms() for name, histogram in self.stages.items()},
            "guard": rules or {}, "minutes": self.minutes, "rss_mb": rss_mb(),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "metadata": {
                "machine": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version(),
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **self.about,
            },
        }  # fmt: skip

    def text(self, rules: dict[str, Any] | None = None) -> str:
        """The same for people."""
        counts = self.counts
        lines = [
            f"{counts['commands']} commands at {self.achieved_hz:.3f} Hz (contract {self.rate_hz:g} Hz), "
            f"{counts['missed']} missed, {counts['safe']} safety actions",
            f"{'ms':<10}{'p50':>9}{'p99':>9}{'p99.9':>9}{'max':>9}",
        ]
        for name, meaning in STAGES.items():
            s = self.stages[name].summary_ms()
            if s["count"]:
                columns = "".join(f"{s[key]:9.3f}" for key in ("p50", "p99", "p99.9", "max"))
                lines.append(f"{name:<10}{columns}  {meaning}")
        for rule, tally in (rules or {}).items():
            if tally["count"]:
                lines.append(f"guard: {rule} acted {tally['count']} times, last: {tally['reason']}")
        return "\n".join(lines)

    def write(self, path: Path, rules: dict[str, Any] | None = None) -> None:
        """Write the JSON, whole or not at all."""
        write_json(path, self.to_dict(rules))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a report's values as JSON, whole or not at all; NaN and infinity as null, which JSON knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write(path, json.dumps(_finite(data), indent=1) + "\n")


def can_write(folder: Path) -> bool:
    """Whether a folder takes files, or could be made; nothing stays behind."""
    path = folder.absolute()
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises where it may not look
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path):  # permissions tell root nothing
            return True
    except OSError:
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rss_mb() -> float:
    """Resident memory of this process now, MB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return pages * resource.getpagesize() / 2**20
