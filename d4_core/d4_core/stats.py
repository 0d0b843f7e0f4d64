"""Means with honest intervals: percentile bootstrap, and what it cannot know of few values or of none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float, float]  # mean, low, high

_FEW = 20  # values, below which a bootstrap is not to be trusted
_Z = 1.959964  # of a 95 % interval
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # the same of 1 to 9 degrees of freedom


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, seed: int = 0, n: int = 2000
) -> tuple[float, float, float]:
    """Mean of `values` and its 95 % interval from `n` resamples, as (mean, low, high).

    The same values and seed give the same interval. One value has an interval of width zero.

    Raises:
        ValueError: there are no values, or they are not one-dimensional.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a non-empty list of numbers, got shape {array.shape}")
    rng = np.random.default_rng(seed)
    # one resample at a time: memory does not grow with n, and thousands of values stay fast
    means = [array[rng.integers(0, array.size, array.size)].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Interval:
    """Mean of a - b and its 95 % interval (`few_mean`), where a[i] and b[i] share their start.

    Pairing removes what both share (easy and hard starts), so it is sharper than comparing two intervals.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, got {first.shape} and {second.shape}")
    return few_mean(first - second)


def nested_mean(
    groups: Sequence[Sequence[float] | np.ndarray], seed: int = 0, n: int = 2000
) -> tuple[float, float, float]:
    """Mean of the groups' means and its 95 % interval, as (mean, low, high); resamples groups, then members.

    For episodes within training seeds: the seeds are a sample, too, and with few of them they set the width.

    Raises:
        ValueError: there are no groups, or one of them is empty.
    """
    arrays = [np.asarray(group, np.float64) for group in groups]
    if not arrays or not all(array.size for array in arrays):
        raise ValueError("expected at least one group, and values in every group")
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n):
        picked = (arrays[i] for i in rng.integers(0, len(arrays), len(arrays)))
        means.append(np.mean([a[rng.integers(0, a.size, a.size)].mean() for a in picked]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean([a.mean() for a in arrays])), float(low), float(high)


def crossed_mean(
    groups: Sequence[Sequence[float] | np.ndarray], seed: int = 0, n: int = 2000
) -> tuple[float, float, float]:
    """Mean of groups that share their members and its 95 % interval, as (mean, low, high).

    For training seeds that drove the same starts, groups[s][i] being seed s on start i: seeds and starts are
    resampled, each start for all seeds at once. `nested_mean` would count a start as many as there are seeds.
    Starts that not all seeds have driven yet, the last ones, are left out. Of 2 to 19 starts it is at least
    as wide as their t interval: resamples of few are too alike.

    Raises:
        ValueError: there are no groups, or one of them is empty.
    """
    count = min(map(len, groups), default=0)
    if not count:
        raise ValueError("expected at least one group, and values in every group")
    array = np.array([group[:count] for group in groups], np.float64)
    seeds, starts = resampled(array.shape[0], array.shape[1], seed, n)
    low, high = np.percentile(((seeds @ array) * starts).sum(1), [2.5, 97.5])
    found = float(array.mean()), float(low), float(high)
    return widest(found, student(array.mean(0))) if 1 < count < _FEW else found


def resampled(seeds: int, starts: int, seed: int = 0, n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Weights of seeds (n, seeds) and of starts (n, starts) in `n` resamples of both; each row sums to 1."""
    rng = np.random.default_rng(seed)
    weights = [rng.multinomial(k, np.full(k, 1 / k), n) / k for k in (seeds, starts)]
    return weights[0], weights[1]


def wilson(successes: int, trials: int) -> Interval:
    """Share of successes and its 95 % interval (Wilson 1927); without trials anything is possible."""
    if trials == 0:
        return 0.0, 0.0, 1.0
    p, n = successes / trials, trials
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return p, max(0.0, middle - half), min(1.0, middle + half)


def crossed_rate(groups: Sequence[Sequence[float] | np.ndarray], seed: int = 0, n: int = 2000) -> Interval:
    """`crossed_mean` of zeros and ones, at least as wide as `wilson` over the shared members, within 0 to 1.

    Where none or all of them succeed every resample is alike, which is no reason to be certain.

    Raises:
        ValueError: as `crossed_mean`.
    """
    mean, low, high = crossed_mean(groups, seed, n)
    count = min(map(len, groups))
    _, least, most = wilson(round(mean * count), count)
    return within((mean, min(low, least), max(high, most)), 0.0, 1.0)


def student(means: Sequence[float] | np.ndarray) -> Interval:
    """Mean of a few independent values and its 95 % t interval.

    Of training seeds this is the one to judge by: a bootstrap of three of them is too narrow.

    Raises:
        ValueError: fewer than two values.
    """
    values = np.asarray(means, np.float64)
    if values.size < 2:
        raise ValueError(f"an interval of {values.size} value(s) is not defined")
    df = values.size - 1
    # beyond the table the first terms of the expansion in 1 / df, right to three digits there
    quantile = _T[df - 1] if df <= len(_T) else _Z + 2.372 / df + 2.822 / df**2
    half = quantile * float(values.std(ddof=1)) / math.sqrt(values.size)
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def widest(*intervals: Interval) -> Interval:
    """The first one's mean, with the lowest and the highest end of all of them."""
    return intervals[0][0], min(low for _, low, _ in intervals), max(high for *_, high in intervals)


def within(value: Interval, least: float, most: float) -> Interval:
    """(mean, low, high) with low at least `least` and high at most `most`; the mean as it is."""
    return value[0], max(least, value[1]), min(most, value[2])


def rate_difference(found: Interval, trials: int) -> Interval:
    """A difference of two rates over shared trials, to either side at least as wide as what so many leave
    possible where none makes a difference (`wilson`): with few that do, resamples are too alike.
    """
    mean, left = found[0], wilson(0, trials)[2]
    return within(widest(found, (mean, mean - left, mean + left)), -1.0, 1.0)


def few_mean(values: Sequence[float] | np.ndarray) -> Interval:
    """`bootstrap_mean`, of 2 to 19 values at least as wide as the t interval: resamples of few are too alike.

    Raises:
        ValueError: there are no values, or they are not one-dimensional.
    """
    mean = bootstrap_mean(values)
    return widest(mean, student(values)) if 1 < len(values) < _FEW else mean
