"""The rules of time against a reference that walks tick by tick and message by message."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_datasets import align
from d4_datasets.align import Grid
from d4_datasets.contract import Align

PERIOD = 10
stamps = st.lists(st.integers(0, 120), max_size=25).map(lambda v: np.array(sorted(v), np.int64))
some = st.lists(st.integers(0, 120), min_size=1, max_size=25).map(lambda v: np.array(sorted(v), np.int64))
starts = st.one_of(
    st.none(), st.lists(st.integers(0, 120), max_size=5).map(lambda v: np.array(sorted(v), np.int64))
)
aligns = st.builds(
    Align,
    st.sampled_from(["hold", "asof", "drop"]),
    st.just("header"),
    st.one_of(st.none(), st.integers(1, 40).map(lambda ticks: ticks / 1e6)),
)


def ref_grid(first, last, starts):
    """[(time, group)] by stepping."""
    if starts is None:
        starts = [first + PERIOD // 2]
    ticks = []
    for group, start in enumerate(starts):
        stop = starts[group + 1] if group + 1 < len(starts) else float("inf")
        t = start
        while t < stop and t < last + PERIOD:
            ticks.append((t, group))
            t += PERIOD
    return ticks


def ref_sample(stamps, t, how):
    """Index of the last sample that may serve time `t`, -1 for none."""
    best = -1
    for i, stamp in enumerate(stamps):
        if stamp <= t:
            best = i
    if best < 0:
        return -1
    age = t - stamps[best]
    too_old = how.tolerance_ns is not None and age > how.tolerance_ns
    return -1 if too_old or (how.strategy == "drop" and age >= PERIOD) else best


def ref_arrival(stamp, ticks, after_start):
    """The tick whose interval (tick - 1, tick] holds the message, -1 for none."""
    for k, (t, group) in enumerate(ticks):
        is_first = k == 0 or ticks[k - 1][1] != group
        begin = t - 1 if is_first and after_start else t - PERIOD
        begin = max(begin, ticks[k - 1][0]) if k else begin
        if begin < stamp <= t:
            return k
    return -1


def ref_terminals(stamps, ticks, after_start):
    flags = [False] * len(ticks)
    for stamp in stamps:
        k = ref_arrival(stamp, ticks, after_start)
        if k < 0:
            before = [i for i, (t, _) in enumerate(ticks) if t < stamp < t + PERIOD]
            k = before[-1] if before else -1
        if k >= 0:
            flags[k] = True
    return flags


def ref_segments(valid, terminal, ticks):
    runs, run, over = [], [], False
    for k, (_, group) in enumerate(ticks):
        if k and ticks[k - 1][1] != group:
            runs.append(run)
            run, over = [], False
        if over or not valid[k]:
            runs.append(run)
            run = []
        else:
            run.append(k)
        over = over or terminal[k]
    runs.append(run)
    return [[run[0], run[-1] + 1] for run in runs if len(run) >= align.MIN_TICKS]


def as_grid(ticks):
    array = np.array(ticks, np.int64).reshape(-1, 2)
    return Grid(array[:, 0], array[:, 1])


@given(some, starts)
def test_grid(frames, starts):
    ticks = align.grid(frames[0], frames[-1], PERIOD, starts)
    assert list(zip(*ticks, strict=True)) == ref_grid(frames[0], frames[-1], starts)
    first = [k == 0 or ticks.group[k - 1] != ticks.group[k] for k in range(len(ticks.time))]
    assert ticks.first.tolist() == first


@given(stamps, stamps, aligns)
def test_sample(stamps, times, how):
    expected = [ref_sample(stamps, t, how) for t in times]
    assert align.sample(stamps, times, how, PERIOD).tolist() == expected


@given(some, starts, stamps)
def test_arrivals_and_terminals(frames, starts, messages):
    ticks = ref_grid(frames[0], frames[-1], starts)
    after = starts is not None
    found = align.arrivals(messages, as_grid(ticks), PERIOD, after_start=after)
    assert found.tolist() == [ref_arrival(stamp, ticks, after) for stamp in messages]
    flags = align.terminals(messages, as_grid(ticks), PERIOD, after_start=after)
    assert flags.tolist() == ref_terminals(messages, ticks, after)


@given(some, starts, st.data())
def test_segments(frames, starts, data):
    ticks = ref_grid(frames[0], frames[-1], starts)
    bools = st.lists(st.booleans(), min_size=len(ticks), max_size=len(ticks)).map(lambda v: np.array(v, bool))
    valid, terminal = data.draw(bools), data.draw(bools)
    assert align.segments(valid, terminal, as_grid(ticks)).tolist() == ref_segments(valid, terminal, ticks)


@given(some, starts, stamps)
def test_latest(frames, starts, messages):
    ticks = ref_grid(frames[0], frames[-1], starts)
    found = align.latest(messages, as_grid(ticks), PERIOD)
    for k, (t, group) in enumerate(ticks):
        is_first = k == 0 or ticks[k - 1][1] != group
        assert found[k] == sum(stamp <= (t + PERIOD if is_first else t) for stamp in messages) - 1


HOLD = Align("hold", "header", 15 / 1e6)


@settings(max_examples=50)
@given(st.lists(st.integers(-4, 4), min_size=3, max_size=40))
def test_jitter_of_less_than_half_a_period_loses_and_repeats_no_frame(jitter):
    frames = np.arange(len(jitter)) * PERIOD + np.array(jitter)
    frames -= frames[
        0
    ]  # the first frame starts the clock, so others may be early or late by twice the jitter
    if np.abs(frames - np.arange(len(frames)) * PERIOD).max() >= PERIOD // 2:
        return
    ticks = align.grid(frames[0], frames[-1], PERIOD)
    assert align.sample(frames, ticks.time, HOLD, PERIOD)[: len(frames)].tolist() == list(range(len(frames)))


def test_a_gap_splits_and_a_terminal_ends():
    frames = np.array([0, 10, 20, 30, 70, 80, 90, 100])
    ticks = align.grid(0, 100, PERIOD, np.array([0]))
    valid = align.sample(frames, ticks.time, HOLD, PERIOD) >= 0
    terminal = align.terminals(np.array([88]), ticks, PERIOD, after_start=True)
    assert align.segments(valid, terminal, ticks).tolist() == [[0, 5], [7, 10]]  # tick 9 is the terminal one


def test_the_label_is_the_command_in_force_after_the_latency():
    ticks, commands = np.array([0, 10, 20]), np.array([4, 14, 17])
    label = align.sample(commands, ticks + 4, Align("hold", "receive", 9 / 1e6), PERIOD)
    assert label.tolist() == [0, 1, 2]
    late = align.sample(commands + 1, ticks + 4, Align("hold", "receive", 9 / 1e6), PERIOD)
    assert late.tolist() == [-1, 0, 2]


def test_long_episodes_are_cut_into_even_pieces_and_keep_their_terminal():
    ticks = align.grid(0, 600, PERIOD, np.array([0, 300]))
    valid, terminal = np.ones(61, bool), np.zeros(61, bool)
    terminal[[24, 60]] = True  # 25 ticks and 31, where pieces of 10 would leave a single tick over
    pieces = align.segments(valid, terminal, ticks, longest=10)
    assert pieces.tolist() == [[0, 8], [8, 16], [16, 25], [30, 37], [37, 45], [45, 53], [53, 61]]
    assert align.segments(valid, terminal, ticks, longest=31).tolist() == [[0, 25], [30, 61]]
    assert align.segments(np.zeros(61, bool), terminal, ticks, longest=10).shape == (0, 2)


def test_a_terminal_after_the_last_frame_is_not_lost_and_none_leaks_into_the_next_episode():
    ticks = align.grid(0, 45, PERIOD, np.array([0, 26]))
    assert ticks.time.tolist() == [0, 10, 20, 26, 36, 46]
    for stamp, tick in ((24, 2), (26, 3), (27, 4), (50, 5)):
        flags = align.terminals(np.array([stamp]), ticks, PERIOD, after_start=True)
        assert np.flatnonzero(flags).tolist() == [tick]


def test_a_million_ticks_take_well_under_a_second():
    frames = np.arange(1_000_000) * PERIOD
    began = time.process_time()
    ticks = align.grid(0, int(frames[-1]), PERIOD, frames[::50])
    valid = align.sample(frames, ticks.time, HOLD, PERIOD) >= 0
    terminal = align.terminals(frames[49::50], ticks, PERIOD, after_start=True)
    assert len(align.segments(valid, terminal, ticks)) == 20_000
    assert time.process_time() - began < 2


def test_anchors_are_captures_and_go_on_at_the_period_where_a_frame_lacks():
    stamps = np.array([0, 103, 298, 400]) * 1_000_000
    ticks = align.grid(int(stamps[0]), int(stamps[-1]), 100_000_000)
    index = align.sample(stamps, ticks.time, Align("hold", "header", 150.0), 100_000_000)
    assert index.tolist() == [0, 1, 1, 2, 3]
    anchors = align.anchors(stamps, index, ticks, 100_000_000)
    assert (anchors // 1_000_000).tolist() == [0, 103, 203, 298, 400]


def test_a_new_episode_begins_with_an_anchor_of_its_own():
    ticks = align.Grid(np.array([0, 100, 130, 230]), np.array([0, 0, 1, 1]))
    anchors = align.anchors(np.array([-5, 228]), np.array([0, 0, 0, 1]), ticks, 100)
    assert anchors.tolist() == [-5, 95, -5, 228]


def test_a_tick_without_any_frame_is_its_own_anchor():
    ticks = align.Grid(np.array([0, 100]), np.array([0, 0]))
    assert align.anchors(np.array([50]), np.array([-1, 0]), ticks, 100).tolist() == [0, 50]
    assert align.anchors(np.zeros(0, np.int64), np.array([-1, -1]), ticks, 100).tolist() == [0, 100]
