"""Tasks, rewards and how episodes end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from d4_datasets.checks.base import Part, Verdict, error, ok, warn
from d4_datasets.contract import Contract

_TOP = 64  # largest rewards kept per task, among which outliers are looked for
_OUTLIER = 10.0  # times what every other frame pays


class Rewards:
    """Running statistics per task (K)."""

    def __init__(self, contract: Contract, width: int) -> None:
        self.contract, self.width = contract, width
        self.names = contract.task_names
        self.task_frames, self.task_episodes = (np.zeros(len(self.names), np.int64) for _ in range(2))
        self.unknown_frames = self.frames = self.episodes = self.terminals = self.early_terminals = 0
        self.minimum, self.maximum = np.full(width, np.inf), np.full(width, -np.inf)
        self.sum = np.zeros(width)
        self.paid, self.rewarded = np.zeros(width, np.int64), np.zeros(width, np.int64)
        self.top = np.zeros((0, width))  # magnitudes
        self.returns: list[list[float]] = []

    def add(self, part: Part) -> tuple[list[str], list[float]]:
        """Take in one episode; returns the names of its tasks and its return per task."""
        reward = np.nan_to_num(part.reward).astype(np.float64)
        self.frames += len(reward)
        self.episodes += 1
        self.minimum = np.minimum(self.minimum, reward.min(0))
        self.maximum = np.maximum(self.maximum, reward.max(0))
        self.sum += reward.sum(0)
        self.paid += (reward != 0).sum(0)
        self.top = -np.sort(-np.concatenate([self.top, np.abs(reward)]), axis=0)[:_TOP]
        total = [round(float(r), 6) for r in reward.sum(0)]
        self.rewarded += np.array(total) != 0
        self.returns.append(total)
        self.terminals += bool(part.terminal.any())
        self.early_terminals += bool(part.terminal[:-1].any())
        return self._tasks(part.task), total

    def _tasks(self, task: np.ndarray) -> list[str]:
        known = (task >= 0) & (task < len(self.names))
        self.unknown_frames += int((~known).sum())
        counts = np.bincount(task[known], minlength=len(self.names))
        self.task_frames += counts
        self.task_episodes += counts > 0
        return [self.names[i] for i in np.flatnonzero(counts)]

    def table(self) -> dict[str, dict[str, Any]]:
        """Per task name; `outliers` frames pay more than 10 times what all others pay."""
        return {
            name: {
                "episodes": int(self.task_episodes[i]), "frames": int(self.task_frames[i]),
                **(self._reward(i) if i < self.width else {"rewarded_episodes": 0}),
            }
            for i, name in enumerate(self.names)
        }  # fmt: skip

    def _reward(self, i: int) -> dict[str, Any]:
        returns = np.array([total[i] for total in self.returns])
        number, value = self._outliers(i)
        return {
            "rewarded_episodes": int(self.rewarded[i]), "paid": float(self.paid[i] / max(self.frames, 1)),
            "min": float(self.minimum[i]), "max": float(self.maximum[i]),
            "mean": float(self.sum[i] / max(self.frames, 1)),
            "constant": bool(self.minimum[i] == self.maximum[i] != 0),
            "outliers": number, "largest_other": value,
            "return_min": float(returns.min()), "return_median": float(np.median(returns)),
            "return_max": float(returns.max()),
        }  # fmt: skip

    def _outliers(self, i: int) -> tuple[int, float]:
        """(number of frames that pay far more than all others, what those pay at most).

        They must be few against the episodes too: what a success pays is no outlier.
        """
        top = self.top[:, i]
        most = min(max(1, self.episodes // 100), len(top) - 1)
        for number in range(1, most + 1):
            if top[number] > 0 and top[number - 1] > _OUTLIER * top[number]:
                return number, float(top[number])
        return 0, 0.0

    def verdicts(self) -> Iterator[Verdict]:
        """Tasks that are never used or never rewarded, odd rewards, episodes without an end."""
        if self.width != len(self.names):
            text = f"reward has {self.width} columns, the contract names {len(self.names)} tasks"
            yield error("tasks", text, "write the dataset again with this contract")
        if self.unknown_frames:
            text = f"{self.unknown_frames} frames have a task the contract does not name"
            yield error("tasks", text, "complete tasks/names in the contract and ingest again")
        table = self.table()
        missing = [name for name in self.names if not table[name]["frames"]]
        unpaid = [name for name in self.names if not table[name]["rewarded_episodes"]]
        if missing:
            text = f"no frames of {', '.join(missing)}"
            yield warn("tasks", text, "record it, or take it out of the contract")
        if unpaid:
            text = f"no reward in any episode for {', '.join(unpaid)}: imitation works, imagination does not"
            yield warn("tasks", text, "name the reward topic in the contract, or record successes")
        if not missing and not unpaid:
            yield ok("tasks", f"{len(self.names)} tasks, all recorded and rewarded")
        for name, t in table.items():
            yield from self._odd(name, t)
        yield from self._ends()

    def _odd(self, name: str, t: dict[str, Any]) -> Iterator[Verdict]:
        if t.get("constant"):
            text = (
                f"the reward for {name} is {t['max']:g} in every frame: no behaviour is better than another"
            )
            yield warn("reward", text, "check the reward topic and its field path")
        if t.get("outliers"):
            text = f"the reward for {name} reaches {max(t['max'], t['min'], key=abs):g} in {t['outliers']} "
            text += f"frames, and at most {t['largest_other']:g} in all others"
            yield warn("reward", text, "check the publisher: a few wrong frames would decide what is learned")

    def _ends(self) -> Iterator[Verdict]:
        signal = self.contract.episode.terminal
        if signal is not None and not self.terminals:
            text = f"no episode ends in a terminal, although the contract takes them from {signal.topic}"
            yield warn("terminals", text, "check the topic: without ends every failure seems to go on")
        if self.early_terminals:
            text = f"{self.early_terminals} episodes go on after a terminal frame"
            yield warn("terminals", text, "write the dataset again with one episode per terminal")
