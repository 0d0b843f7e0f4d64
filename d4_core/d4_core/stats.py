"""Means with honest intervals: percentile bootstrap, no assumption about the distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0, n: int = 2000
) -> tuple[float, float, float]:
    """Mean of a - b and its 95 % interval, as (mean, low, high), where a[i] and b[i] share their start.

    Pairing removes what both share (easy and hard starts), so it is sharper than comparing two intervals.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, got {first.shape} and {second.shape}")
    return bootstrap_mean(first - second, seed, n)


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
    Starts that not all seeds have driven yet, the last ones, are left out.

    Raises:
        ValueError: there are no groups, or one of them is empty.
    """
    count = min(map(len, groups), default=0)
    if not count:
        raise ValueError("expected at least one group, and values in every group")
    array = np.array([group[:count] for group in groups], np.float64)
    seeds, starts = resampled(array.shape[0], array.shape[1], seed, n)
    low, high = np.percentile(((seeds @ array) * starts).sum(1), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def resampled(seeds: int, starts: int, seed: int = 0, n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Weights of seeds (n, seeds) and of starts (n, starts) in `n` resamples of both; each row sums to 1."""
    rng = np.random.default_rng(seed)
    weights = [rng.multinomial(k, np.full(k, 1 / k), n) / k for k in (seeds, starts)]
    return weights[0], weights[1]
