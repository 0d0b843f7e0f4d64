"""Pictures: are there new ones, and is something to be seen on them?"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from d4_datasets.checks.base import SHORT, Look, Part, Verdict, error, longest_run, ok, warn
from d4_datasets.contract import Contract

DARK, BRIGHT = 10.0, 245.0  # mean of 255: below or above nothing is to be seen
FLAT = 3.0  # standard deviation of 255: one colour with a little noise
LEVELS = 32  # bins of the histogram of brightness
_BLANK_SHARE = 0.01
_REPEATED_SHARE = 0.2
_EXAMPLES = 8  # frames kept to be shown
_CHUNK_BYTES = 16_000_000


def look(frames: np.ndarray) -> Look:
    """Look at the frames [L, H, W, 3] of an episode, which may be mapped from a file larger than memory."""
    length, size = len(frames), frames[0].size
    motion, brightness, contrast = (np.zeros(n, np.float32) for n in (length - 1, length, length))
    chunk, sums = max(1, _CHUNK_BYTES // size), 0
    for begin in range(0, length, chunk):
        # One more frame, so that the chunks' ends are compared too.
        pictures = np.ascontiguousarray(frames[begin : begin + chunk + 1])
        own = pictures[:chunk]
        sums = zlib.crc32(own.data, sums)
        for number, picture in enumerate(own, begin):
            mean, std = cv2.meanStdDev(picture.reshape(1, -1))
            brightness[number], contrast[number] = mean[0, 0], std[0, 0]
        for number in range(len(pictures) - 1):
            motion[begin + number] = cv2.norm(pictures[number + 1], pictures[number], cv2.NORM_L1) / size
    return Look(motion, brightness, contrast, sums)


class Camera:
    """Running statistics of one camera."""

    def __init__(self) -> None:
        self.frames = self.pairs = self.repeated = self.longest = self.longest_at = 0
        self.blank = dict.fromkeys(("dark", "flat", "bright"), 0)
        self.examples: dict[str, list[int]] = {name: [] for name in self.blank}
        self.longest_blank = 0
        self.episodes, self.frozen = 0, []  # type: int, list[int]
        self.levels = np.zeros(LEVELS, np.int64)
        self.motion = 0.0

    def add(self, seen: Look, number: int, first: int) -> dict[str, int]:
        """Take in one episode; returns its counts of repeated, longest_repeat, dark and flat frames."""
        still = seen.motion == 0
        run, begin = longest_run(still)
        if run + 1 > max(self.longest, 1):
            self.longest, self.longest_at = run + 1, first + begin
        self.frames += len(seen.brightness)
        self.pairs += len(still)
        self.repeated += int(still.sum())
        self.motion += float(seen.motion.sum(dtype=np.float64))
        if len(seen.brightness) >= SHORT:
            self.episodes += 1
            self.frozen += [number] * bool(still.all())
        self.levels += np.bincount((seen.brightness * LEVELS / 256).astype(np.int64), minlength=LEVELS)
        counts = self._blank(seen, first)
        return {"repeated": int(still.sum()), "longest_repeat": run + 1 if run else 0, **counts}

    def _blank(self, seen: Look, first: int) -> dict[str, int]:
        dark, bright = seen.brightness < DARK, seen.brightness > BRIGHT
        flags = {"dark": dark, "bright": bright, "flat": (seen.contrast < FLAT) & ~dark & ~bright}
        for name, flag in flags.items():
            self.blank[name] += int(flag.sum())
            room = _EXAMPLES - len(self.examples[name])
            self.examples[name] += (first + np.flatnonzero(flag)[:room]).tolist()
        run, _ = longest_run(dark | bright | flags["flat"])
        self.longest_blank = max(self.longest_blank, run)
        return {"dark": int(dark.sum()), "flat": int((flags["flat"] | bright).sum())}

    def table(self, rate: float) -> dict[str, Any]:
        """Plain data; shares are of the frames, or of the pairs of neighbours for repeated ones."""
        share = self.repeated / max(self.pairs, 1)
        return {
            "repeated": share, "pairs": self.pairs, "longest_repeat": self.longest,
            "longest_repeat_at": self.longest_at, "distinct_hz": rate * (1 - share),
            "frozen_episodes": len(self.frozen), "first_frozen": self.frozen[:_EXAMPLES],
            **{name: count / max(self.frames, 1) for name, count in self.blank.items()},
            "longest_blank": self.longest_blank, "examples": self.examples,
            "motion": self.motion / max(self.pairs, 1), "brightness_histogram": self.levels.tolist(),
        }  # fmt: skip


class Cameras:
    """All cameras of a dataset."""

    def __init__(self, contract: Contract, names: list[str]) -> None:
        self.rate = contract.rate_hz
        self.cameras = {name: Camera() for name in names}

    def add(self, part: Part) -> dict[str, int]:
        """Take in one episode; returns its counts, of the worst camera each."""
        counts = [self.cameras[name].add(seen, part.number, part.first) for name, seen in part.looks.items()]
        keys = ("repeated", "longest_repeat", "dark", "flat")
        return {key: max((count[key] for count in counts), default=0) for key in keys}

    def table(self) -> dict[str, dict[str, Any]]:
        """Per camera."""
        return {name: camera.table(self.rate) for name, camera in self.cameras.items()}

    def verdicts(self) -> Iterator[Verdict]:
        """Frozen, slow, stalled; dark, overexposed, empty."""
        for name, c in self.table().items():
            found = [*self._repeats(name, c), *self._blank(name, c)]
            text = f"camera {name}: {c['repeated']:.1%} of the frames repeat the one before"
            yield from found or [ok("camera", text)]

    def _repeats(self, name: str, c: dict[str, Any]) -> Iterator[Verdict]:
        rate, longest = self.rate, c["longest_repeat"]
        if c["pairs"] and c["repeated"] == 1.0:
            text = f"camera {name} is frozen: in every episode all frames are the same"
            yield error("camera", text, "check the camera topic and its driver, and record again")
            return
        if c["repeated"] > _REPEATED_SHARE and longest <= max(rate / 2, 3):
            text = f"camera {name} repeats {c['repeated']:.1%} of its frames: it delivers about "
            text += f"{c['distinct_hz']:.1f} Hz, the contract asks for {rate:g}"
            yield warn("camera", text, "lower rate_hz in the contract, or use a faster camera")
        elif longest > 2 * rate or c["repeated"] > _REPEATED_SHARE:
            text = f"camera {name}: {c['repeated']:.1%} of the frames repeat the one before, longest run "
            text += f"{longest} frames ({longest / rate:.1f} s)"
            yield warn("camera", text, "either nothing moved or the camera stalled: look at the sheet")
        if c["frozen_episodes"]:
            first = ", ".join(map(str, c["first_frozen"]))
            text = f"camera {name} shows one picture throughout {c['frozen_episodes']} episodes: {first}"
            text += " ..." * (c["frozen_episodes"] > len(c["first_frozen"]))
            yield warn("camera", text, "leave them out: they teach that commands do nothing")

    def _blank(self, name: str, c: dict[str, Any]) -> Iterator[Verdict]:
        what = {"dark": "are dark", "bright": "are overexposed", "flat": "show a single colour"}
        hint = "check exposure and lens cap, or leave these recordings out"
        for key, text in what.items():
            if c[key] > _BLANK_SHARE or (c[key] and c["longest_blank"] > self.rate):
                yield warn("camera", f"camera {name}: {c[key]:.1%} of the frames {text}", hint)
