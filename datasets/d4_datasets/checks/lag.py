"""Does the picture change when the command does?

The label of frame t is the command in force at its capture plus the contract's latency, so its effect is to
be seen from `latency / period` frames on. Whether it is can be measured: for every lag k the motion of the
picture from frame t to t+1 is predicted from the command of frame t-k, and the lag that predicts best is the
answer. If that is less than the latency, pictures react to commands that were not given yet: stamps are
wrong.

What keeps the answer honest: every lag is tried on the same frames; a prediction counts by what it explains
of stretches that it was not fitted to, so noise explains nothing; and the answer is asked again of stretches
drawn at random (a bootstrap), which gives an interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from d4_datasets.checks.base import Part, Verdict, ok, warn
from d4_datasets.contract import Contract

AHEAD = 4  # frames by which a picture may come before its command
_SPAN = 128  # frames of a stretch
_FRAMES = 20_000  # enough to estimate a lag; more would only cost time
_LEAST = 200  # usable frames below which nothing is said
_GROUPS, _FOLDS, _DRAWS = 100, 5, 400
_RIDGE = 1e-3
_RELATED = 0.2  # correlation below which the two have nothing to do with each other
_LATE = 2  # frames by which a robot may be slower than the contract's latency
_SIDE = 32  # pixels of the shorter side, for the flow
_CLASSES, _WIDE = 16, 16  # more classes are taken as a number; more components get no squares


@dataclass(frozen=True)
class Estimate:
    """By how many frames the picture follows the command.

    Attributes:
        frames: the lag that predicts best.
        low, high: where 90 % of the draws lie.
        confidence: share of the draws within one frame of `frames`.
        correlation: between the motion and what is predicted of it, on stretches not fitted to.
        curve: correlation by lag.
        used: frames that it rests on.
    """

    frames: int
    low: int
    high: int
    confidence: float
    correlation: float
    curve: dict[int, float]
    used: int


@dataclass(frozen=True)
class Stretch:
    """Neighbouring frames of one episode: motion [n, q] from each to the next, and the actions
    [lags, n, A] of the frames `lags` before.
    """

    motion: np.ndarray
    action: np.ndarray


def lags_of(contract: Contract) -> range:
    """The lags that are tried: from a few frames too early to half a second later than the contract says."""
    slow = int(np.clip(0.5 * contract.rate_hz, 6, 12))
    return range(-AHEAD, expected(contract) + slow + 1)


def expected(contract: Contract) -> int:
    """The lag that the contract's latency makes, in frames."""
    return int(contract.latency_ms * contract.rate_hz / 1000 + 0.5)


class Lag:
    """Collects stretches of labelled frames, chosen at random over the whole dataset, and estimates per
    camera.

    Args: lengths, labelled: frames and labelled frames of each episode, int [E].
    """

    def __init__(
        self, contract: Contract, cameras: list[str], lengths: np.ndarray, labelled: np.ndarray
    ) -> None:
        self.contract, self.lags = contract, lags_of(contract)
        self.stretches: dict[str, list[Stretch]] = {name: [] for name in cameras}
        self.labelled = int(labelled.sum())
        counts = np.where(labelled > 0, -(-lengths // _SPAN), 0)
        episode = np.repeat(np.arange(len(lengths)), counts)
        begin = (np.arange(len(episode)) - np.repeat(np.cumsum(counts) - counts, counts)) * _SPAN
        frames = np.minimum(lengths[episode] - begin, _SPAN)
        order = np.random.default_rng(0).permutation(len(episode))
        chosen = order[np.cumsum(frames[order]) - frames[order] < _FRAMES]
        self._spans: dict[int, list[int]] = {}
        for place in np.sort(chosen):
            self._spans.setdefault(int(episode[place]), []).append(int(begin[place]))

    def add(self, part: Part) -> None:
        """Take what is wanted of one episode."""
        known = part.mask & np.isfinite(part.action).all(1)
        for begin in self._spans.get(part.number, ()):
            t = np.arange(begin, min(begin + _SPAN, part.frames - 1))
            source = t[None] - np.array(self.lags)[:, None]  # [lags, n]
            inside = (source >= 0) & (source < part.frames)
            use = (inside & known[np.clip(source, 0, part.frames - 1)]).all(0)
            if use.sum() < 2:
                continue
            action = part.action[source[:, use]]
            for name, seen in part.looks.items():
                flow = affine_flow(_small(part.images[name][begin : t[-1] + 2]))
                motion = np.concatenate([seen.motion[t, None], flow], 1)[use]
                self.stretches[name].append(Stretch(motion, action))

    def estimates(self) -> dict[str, Estimate | str]:
        """Per camera the estimate, or in words why there is none."""
        if not self.contract.actions or not self.labelled:
            return dict.fromkeys(self.stretches, "no frame has a known action")
        return {
            name: estimate(stretches, self.lags, self.contract) for name, stretches in self.stretches.items()
        }

    def table(self) -> dict[str, Any]:
        """Plain data: `expected` frames, and per camera the estimate or a `reason` why there is none."""
        cameras: dict[str, dict[str, Any]] = {}
        for name, found in self.estimates().items():
            if isinstance(found, str):
                cameras[name] = {"frames": None, "reason": found}
                continue
            curve = {str(lag): round(value, 4) for lag, value in found.curve.items()}
            cameras[name] = {**vars(found), "curve": curve}
        return {"expected": expected(self.contract), "cameras": cameras}


def verdicts(table: dict[str, Any], rate_hz: float) -> Iterator[Verdict]:
    """Judge the table of `Lag`: pictures before their commands, or long after them."""
    wanted = table["expected"]
    for name, c in table["cameras"].items():
        if c["frames"] is None:
            yield ok("lag", f"camera {name}: when commands show cannot be measured: {c['reason']}")
            continue
        text = f"camera {name} {_when(c['frames'], rate_hz)} (90% interval {c['low']} to {c['high']}, "
        text += f"correlation {c['correlation']:.2f}); the contract's latency makes {wanted}"
        if c["high"] < wanted:
            hint = "labels come too late, or pictures are stamped too early: check `timeline` and latency_ms"
            yield warn("lag", text, hint)
        elif c["low"] > wanted + _LATE:
            hint = "labels come too early, or the robot is slow to react: check `timeline` and latency_ms"
            yield warn("lag", text, hint)
        else:
            yield ok("lag", text)
    known = {name: c for name, c in table["cameras"].items() if c["frames"] is not None}
    first = min(known, key=lambda name: known[name]["high"], default=None)
    last = max(known, key=lambda name: known[name]["low"], default=None)
    if first is not None and last is not None and known[last]["low"] > known[first]["high"] + 1:
        text = f"camera {last} is behind camera {first} by about "
        text += f"{_frames(known[last]['frames'] - known[first]['frames'], rate_hz)}"
        yield warn("lag", text, "check the stamps of both: a robot's cameras must show the same moment")


def _when(lag: int, rate_hz: float) -> str:
    if lag < 0:
        return f"moves {_frames(-lag, rate_hz)} before its commands"
    return f"shows commands after {_frames(lag, rate_hz)}"


def _frames(count: int, rate_hz: float) -> str:
    return f"{count} frame{'s' * (abs(count) != 1)} ({1000 * count / rate_hz:.0f} ms)"


# ---- how a picture moves


def _small(frames: np.ndarray) -> np.ndarray:
    """Frames [n, H, W, 3] in grey and small, float32 [n, h, w]."""
    height, width = frames.shape[1:3]
    scale = min(1.0, _SIDE / min(height, width))
    size = max(2, round(width * scale)), max(2, round(height * scale))
    grey = [
        cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for f in frames
    ]
    # Blurred, so that a step of more than a pixel still has a slope to be seen on.
    return np.stack([cv2.GaussianBlur(g, (5, 5), 1.2) for g in grey]).astype(np.float32)


def affine_flow(grey: np.ndarray) -> np.ndarray:
    """Motion of the whole picture from each frame to the next as a shift that varies linearly over it.

    Least squares on the brightness constancy equation. Of a picture in which only a part moves it is a
    weakened motion of that part, with the right sign, which is all that a correlation needs.

    Args:
        grey: float32 [n, h, w].

    Returns:
        float32 [n - 1, 6]: to the right, and how that grows to the right and downwards; the same for down.
    """
    n, height, width = grey.shape
    mean = (grey[1:] + grey[:-1]) / 2
    down, right = (np.gradient(mean, axis=axis).reshape(n - 1, -1) for axis in (1, 2))
    y, x = (
        v.ravel() for v in np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    )
    slopes = np.stack([right, right * x, right * y, down, down * x, down * y], 2)
    normal = slopes.transpose(0, 2, 1) @ slopes
    change = np.einsum("npi,np->ni", slopes, (grey[:-1] - grey[1:]).reshape(n - 1, -1))
    weight = 1e-2 * np.trace(normal, axis1=1, axis2=2)[:, None, None] / 6 + 1e-3
    flow = np.linalg.solve(normal + weight * np.eye(6), change[..., None])[..., 0]
    return flow.astype(np.float32)


# ---- the estimate


def estimate(stretches: list[Stretch], lags: range, contract: Contract) -> Estimate | str:
    """Find the lag at which commands predict motion best, or say in words why it cannot be found."""
    used = sum(len(s.motion) for s in stretches)
    if used < _LEAST:
        return f"{used} frames have known actions all around them, {_LEAST} are needed"
    motion, scale = _standardised(np.concatenate([s.motion for s in stretches]).astype(np.float64))
    if not scale.any():
        return "the picture never changes"
    group = np.concatenate([np.full(len(s.motion), i % _GROUPS) for i, s in enumerate(stretches)])
    if len(stretches) < 2 * _FOLDS:  # few long ones: cut them finer, so that something can be held out
        group = np.arange(used) * 2 * _FOLDS // used
    explained = []
    for index in range(len(lags)):
        features, spread = _standardised(
            _features(np.concatenate([s.action[index] for s in stretches], 0), contract)
        )
        if not spread.any():
            return "the commands never change"
        explained.append(_explained(features[:, spread > 0], motion, group))
    total = np.array([(motion[group == g] ** 2).sum(0) for g in range(group.max() + 1)])
    return _judge(np.array(explained), total, lags, used)


def _standardised(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns [n, p] with mean 0 and deviation 1, and their deviations [p]; rare extremes are cut off."""
    low, high = np.quantile(values, [0.005, 0.995], axis=0)
    values = np.where(high > low, np.clip(values, low, high), values)  # of a rare class nothing is cut
    values = values - values.mean(0)
    spread = values.std(0)
    spread = np.where(spread > 1e-9, spread, 0.0)
    return values / np.where(spread > 0, spread, 1.0), spread


def _features(action: np.ndarray, contract: Contract) -> np.ndarray:
    """What of the actions [n, A] may show in a picture: themselves and their squares, or which class."""
    columns = []
    kinds = [channel for channel in contract.actions for _ in channel.select]
    for i, channel in enumerate(kinds):
        value = action[:, i].astype(np.float64)
        if channel.kind == "categorical" and (channel.classes or 0) <= _CLASSES:
            columns += [value == c for c in range(channel.classes or 0)]
            continue
        columns.append(value)
        if channel.kind != "binary" and len(kinds) <= _WIDE:
            columns.append((value - (contract.action_low[i] + contract.action_high[i]) / 2) ** 2)
    return np.stack(columns, 1).astype(np.float64)


def _explained(features: np.ndarray, motion: np.ndarray, group: np.ndarray) -> np.ndarray:
    """How much of the squared motion [n, q] of each group is explained by a fit to other groups, [G, q].

    Less than nothing is possible: a fit to noise makes it worse.
    """
    groups = range(group.max() + 1)
    square = np.array([features[group == g].T @ features[group == g] for g in groups])  # [G, p, p]
    cross = np.array([features[group == g].T @ motion[group == g] for g in groups])  # [G, p, q]
    count = np.bincount(group)
    out = np.zeros(cross.shape[::2])
    for fold in range(_FOLDS):
        held = np.arange(len(cross)) % _FOLDS == fold
        ridge = _RIDGE * count[~held].sum() * np.eye(features.shape[1])
        fit = np.linalg.solve(square[~held].sum(0) + ridge, cross[~held].sum(0))
        out[held] = 2 * (fit * cross[held]).sum(1) - (fit * (square[held] @ fit)).sum(1)
    return out


def _judge(explained: np.ndarray, total: np.ndarray, lags: range, used: int) -> Estimate | str:
    """From explained [lags, G, q] and total [G, q] squared motion to an estimate."""
    share = explained.sum(1) / np.maximum(total.sum(0), 1e-12)  # [lags, q]
    weight = np.maximum(share.max(0), 0.0)  # what commands say nothing about has no voice
    related = float(np.sqrt(weight.max(initial=0.0)))
    if related < _RELATED:
        return f"the motion of the picture does not follow the commands (correlation {related:.2f})"
    score = (explained / np.maximum(total.sum(0), 1e-12)) @ weight / weight.sum()  # [lags, G]
    groups = score.shape[1]
    draws = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), _DRAWS)
    answers = np.array(lags)[(score @ draws.T).argmax(0)]
    curve = dict(zip(lags, np.sqrt(np.maximum(score.sum(1), 0)).tolist(), strict=True))
    best = max(curve, key=lambda lag: curve[lag])
    low, high = np.quantile(answers, [0.05, 0.95], method="inverted_cdf")
    return Estimate(
        frames=best, low=min(int(low), best), high=max(int(high), best),
        confidence=float((abs(answers - best) <= 1).mean()), correlation=curve[best], curve=curve, used=used,
    )  # fmt: skip
