"""Bootstrap intervals: cover, shrink, repeat, and pairing helps."""

import numpy as np
import pytest

from d4_core.stats import (
    bootstrap_mean,
    crossed_mean,
    crossed_rate,
    few_mean,
    nested_mean,
    paired_difference,
    rate_difference,
    student,
    widest,
    wilson,
)


def test_interval_is_that_of_the_normal_theory_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = bootstrap_mean(values)
    error = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.1 * error)


def test_interval_covers_the_truth_about_95_percent_of_the_time():
    rng = np.random.default_rng(2)
    intervals = [bootstrap_mean(rng.exponential(1.0, 60), n=300)[1:] for _ in range(200)]
    assert 0.88 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.99


def test_same_seed_same_interval_and_another_seed_another():
    values = [0.0, 1.0, 4.0, 2.0]
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(np.random.default_rng(0).normal(size=50)) != bootstrap_mean(
        np.random.default_rng(0).normal(size=50), seed=1
    )


def test_few_values_are_not_more_certain_than_they_are() -> None:
    """Of two values the resamples say [5, 25], which covers the mean half of the time."""
    rng = np.random.default_rng(3)
    for count in (2, 5):
        found = [few_mean(rng.normal(10, 5, count))[1:] for _ in range(200)]
        assert np.mean([low <= 10 <= high for low, high in found]) >= 0.9
    many = rng.normal(10, 5, 40)
    assert few_mean(many) == bootstrap_mean(many)
    assert few_mean([2.5]) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize("starts", [3, 5])
def test_few_starts_that_seeds_share_are_not_more_certain_than_they_are(starts: int) -> None:
    """Three chains with five starts of a planner judged one claim in eight that should not have been."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(200):
        gains = rng.normal(0, 12, starts) + rng.normal(0, 4, (3, starts)) + rng.normal(0, 1, (3, 1))
        found = widest(crossed_mean(gains, n=400), student(gains.mean(1)))
        wrong += not found[1] <= 0 <= found[2]
    assert wrong / 200 <= 0.09
    rate = crossed_rate([[0, 1, 0], [0, 1, 1]])
    assert 0 <= rate[1] < rate[2] <= 1


def test_one_value_has_no_width():
    assert bootstrap_mean([2.5]) == (2.5, 2.5, 2.5)


def test_pairing_sees_a_small_gain_among_very_different_episodes():
    rng = np.random.default_rng(3)
    start = rng.normal(0.0, 10.0, 50)
    better, worse = start + 0.5 + rng.normal(0, 0.1, 50), start
    mean, low, high = paired_difference(better, worse)
    assert 0.4 < low < mean < high < 0.6
    assert bootstrap_mean(better)[1] < bootstrap_mean(worse)[2]  # unpaired intervals overlap
    assert paired_difference(worse, better)[0] == pytest.approx(-mean)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_no_values_is_an_error(values):
    with pytest.raises(ValueError, match="non-empty list"):
        bootstrap_mean(values)


def test_pairs_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1.0, 2.0], [1.0])


def test_seeds_that_disagree_widen_a_nested_interval_however_many_episodes_they_have():
    rng = np.random.default_rng(4)
    alike = nested_mean([rng.normal(1.0, 1.0, 400) for _ in range(3)])
    apart = nested_mean([rng.normal(m, 1.0, 400) for m in (0.0, 1.0, 2.0)])
    assert alike[2] - alike[1] < 0.3
    assert apart[2] - apart[1] > 1.0
    assert apart[1] < apart[0] < apart[2]


def test_one_group_gives_the_plain_interval_and_groups_count_alike():
    values = np.random.default_rng(5).normal(size=80)
    assert nested_mean([values]) == pytest.approx(bootstrap_mean(values), abs=0.05)
    assert nested_mean([[0.0] * 100, [1.0]])[0] == 0.5


def test_starts_that_all_seeds_share_do_not_count_as_many_as_there_are_seeds():
    starts = np.random.default_rng(6).normal(size=100)
    plain = bootstrap_mean(starts)
    assert crossed_mean([starts] * 3) == pytest.approx(plain, abs=0.03)
    narrow = nested_mean([starts] * 3)
    assert narrow[2] - narrow[1] < 0.75 * (plain[2] - plain[1])


def test_a_crossed_interval_covers_the_mean_as_often_as_it_says():
    """Seeds, starts and noise, each drawn anew; few seeds make any bootstrap a little too narrow."""
    rng, covered = np.random.default_rng(7), 0
    for _ in range(200):
        levels, starts = rng.normal(0, 0.3, (10, 1)), rng.normal(0, 1, 60)
        _, low, high = crossed_mean(levels + starts + rng.normal(0, 0.5, (10, 60)), n=400)
        covered += low < 0 < high
    assert 176 <= covered <= 200


def test_starts_that_a_seed_has_not_driven_yet_are_left_out():
    """A page that is written while a larger evaluation goes on raised instead."""
    assert crossed_mean([[1.0, 3.0], [1.0, 3.0, 99.0]])[0] == 2.0


@pytest.mark.parametrize("mean", [nested_mean, crossed_mean])
@pytest.mark.parametrize("groups", [[], [[1.0], []]])
def test_groups_without_values_are_refused(groups, mean):
    with pytest.raises(ValueError, match="at least one group"):
        mean(groups)


def test_the_t_interval_is_the_textbook_one() -> None:
    mean, low, high = student([1.0, 2.0, 3.0])
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, 4.303 / 3**0.5, 4.303 / 3**0.5))
    with pytest.raises(ValueError, match="1 value"):
        student([1.0])


@pytest.mark.parametrize(("count", "quantile"), [(11, 2.228), (16, 2.131), (31, 2.042), (121, 1.980)])
def test_many_seeds_have_a_t_interval_too(count: int, quantile: float) -> None:
    """Eleven of them ended in a KeyError, after all the work."""
    values = np.arange(count, dtype=float)
    _, low, high = student(values)
    assert (high - low) / 2 == pytest.approx(quantile * values.std(ddof=1) / count**0.5, rel=2e-3)


def test_none_of_a_hundred_is_not_never() -> None:
    """The interval was [0, 0]."""
    mean, low, high = crossed_rate([[0.0] * 100] * 3)
    assert (mean, low) == (0.0, 0.0)
    assert high == pytest.approx(0.037, abs=0.001)
    assert crossed_rate([[1.0] * 100])[1:] == pytest.approx((0.963, 1.0), abs=0.001)
    rng = np.random.default_rng(0)
    groups = (rng.random((3, 100)) < 0.4).astype(float)
    assert crossed_rate(groups)[1] <= crossed_mean(groups)[1]


def test_equal_rates_are_no_certainty() -> None:
    """Paired successes of which none differed printed as +0.00, without an interval."""
    assert rate_difference((0.0, 0.0, 0.0), 100) == pytest.approx((0.0, -0.037, 0.037), abs=1e-3)
    assert rate_difference((1.0, 1.0, 1.0), 100) == pytest.approx((1.0, 0.963, 1.0), abs=1e-3)
    assert rate_difference((-0.2, -0.4, 0.1), 100) == (-0.2, -0.4, 0.1)


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 0.0, 1.0)
    share, low, high = wilson(0, 10)
    assert (share, low) == (0.0, 0.0)
    assert high == pytest.approx(0.2775, abs=1e-3)
    assert wilson(10, 10)[1] == pytest.approx(1 - high)
    share, low, high = wilson(7, 1000)
    assert low < 0.007 < high < 0.0145
