"""Coverage: in which frames is the action known?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from d4_datasets.checks.base import Part, Verdict, longest_run, ok, warn
from d4_datasets.contract import Contract

_HOLES = 0.05  # share of the frames


class Labels:
    """Running counts of known actions.

    "Labelled" episodes have at least one frame with a known action; what they lack are holes.
    """

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.frames = self.known = self.episodes = self.labelled = self.labelled_frames = 0
        self.longest = self.longest_episode = self.longest_begin = 0
        self.recordings: dict[str, bool] = {}  # by name: does it hold any command?

    def add(self, part: Part) -> int:
        """Take in one episode; returns its longest stretch without a known action, frames."""
        known = int(part.mask.sum())
        self.frames += part.frames
        self.known += known
        self.episodes += 1
        source = str(part.origin.get("source", ""))
        self.recordings[source] = self.recordings.get(source, False) or known > 0
        run, begin = longest_run(~part.mask)
        if known:
            self.labelled += 1
            self.labelled_frames += part.frames
            if run > self.longest:
                self.longest, self.longest_episode, self.longest_begin = run, part.number, begin
        return run

    def table(self) -> dict[str, Any]:
        """Shares of frames and episodes; `longest_hole` is the longest one in a labelled episode."""
        return {
            "frames": self.known / max(self.frames, 1), "episodes": self.labelled / max(self.episodes, 1),
            "recordings": sum(self.recordings.values()) / max(len(self.recordings), 1),
            "holes": 1 - self.known / self.labelled_frames if self.labelled_frames else 0.0,
            "longest_hole": self.longest, "longest_hole_episode": self.longest_episode,
            "longest_hole_begin": self.longest_begin,
        }  # fmt: skip

    def verdicts(self) -> Iterator[Verdict]:
        """Nothing known at all; holes where something is."""
        t = self.table()
        if not self.known:
            text = "no frame has a known action: tokenizer and dynamics can train, the agent phase cannot"
            topics = ", ".join(channel.topic for channel in self.contract.actions)
            hint = f"add labelled recordings, or check the action topic ({topics}) and its tolerance"
            yield warn("labels", text, hint)
            return
        text = f"actions known in {t['frames']:.1%} of the frames, {t['episodes']:.1%} of the episodes"
        without = sum(not held for held in self.recordings.values())
        if without:
            text += f"; {without} of {len(self.recordings)} recordings hold no command"
        yield ok("labels", text)
        if t["holes"] > _HOLES:
            seconds = self.longest / self.contract.rate_hz
            text = f"episodes with commands lack them in {t['holes']:.1%} of their frames, at most for "
            text += f"{self.longest} frames ({seconds:.1f} s), from frame {self.longest_begin} of episode "
            text += f"{self.longest_episode} on"
            yield warn(
                "labels", text, "the command topic pauses longer than its tolerance_ms, or lost messages"
            )
