"""Live ticks are those of the importer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import align
from d4_datasets.contract import Align
from d4_nodes.ticks import Ticker

MS = 1_000_000
PERIOD = 100 * MS


def play(stamps, transport, start=None, until=None, grace=20 * MS, step=MS):
    """All ticks that a ticker hands out while frames arrive and time passes in steps."""
    ticker, out = Ticker(PERIOD, grace), []
    ticker.begin(start)
    arrivals = sorted((s + t, s) for s, t in zip(stamps, transport, strict=True))
    until = until or max(a for a, _ in arrivals) + 1
    now = arrivals[0][0]
    while now < until:
        while arrivals and arrivals[0][0] <= now:
            ticker.frame(arrivals.pop(0)[1])
            while (tick := ticker.next(now)) is not None:
                out.append((now, tick))
        while (tick := ticker.next(now)) is not None:
            out.append((now, tick))
        now += step
    return ticker, out


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.05), st.integers(0, 8))
def test_live_equals_the_importer_for_a_jittering_camera(seed, jitter, transport_ms) -> None:
    rng = np.random.default_rng(seed)
    stamps = np.arange(30) * PERIOD + (jitter * PERIOD * rng.uniform(-1, 1, 30)).astype(np.int64) + PERIOD
    stamps[0] = PERIOD
    transport = rng.integers(0, transport_ms * MS + 1, 30)
    _, live = play(stamps.tolist(), transport.tolist())
    grid = align.grid(int(stamps[0]), int(stamps[-1]), PERIOD)
    index = align.sample(stamps, grid.time, Align("hold", "header", 150.0), PERIOD)
    for _, tick in live:
        assert tick.time_ns == grid.time[tick.number]
        assert tick.stamp_ns == stamps[index[tick.number]]
    anchors = align.anchors(stamps, index, grid, PERIOD)
    assert [tick.anchor_ns for _, tick in live] == anchors[: len(live)].tolist()
    assert [tick.number for _, tick in live] == list(range(len(live)))
    assert len(live) >= 29


@given(st.integers(0, 18), st.integers(0, 2**32 - 1))
def test_live_equals_the_importer_for_a_start_event(transport_ms, seed) -> None:
    start, rng = 5 * PERIOD, np.random.default_rng(seed)
    stamps = start + np.arange(20) * PERIOD
    transport = rng.integers(0, transport_ms * MS + 1, 20)
    _, live = play(stamps.tolist(), transport.tolist(), start)
    assert [t.stamp_ns for _, t in live] == stamps[: len(live)].tolist()
    assert all(t.is_fresh and t.time_ns == t.stamp_ns for _, t in live)


def test_work_begins_when_the_frame_arrives() -> None:
    stamps = [k * PERIOD for k in range(1, 10)]
    _, live = play(stamps, [7 * MS] * 9)
    assert all(now == tick.stamp_ns + 7 * MS for now, tick in live)


def test_a_faster_camera_serves_each_tick_with_its_newest_frame() -> None:
    stamps = [PERIOD + k * PERIOD // 3 for k in range(60)]
    _, live = play(stamps, [2 * MS] * 60)
    grid = align.grid(stamps[0], stamps[-1], PERIOD)
    index = align.sample(np.array(stamps), grid.time, Align("hold", "header", 150.0), PERIOD)
    later = [tick for _, tick in live if tick.number >= 3]  # by then the camera's rate is known
    assert len(later) > 12
    assert all(tick.stamp_ns == stamps[index[tick.number]] for tick in later)


def test_a_fast_camera_that_stops_costs_no_tick() -> None:
    """The better frame that does not come is waited for no longer than leaves time to decide on the last."""
    stamps = [PERIOD + k * 10 * MS for k in range(102)]  # the last one 40 ms before its tick
    _, live = play(stamps, [2 * MS] * len(stamps), until=stamps[-1] + 60 * MS)
    now, tick = live[-1]
    assert tick.is_fresh
    assert tick.stamp_ns == stamps[-1]
    assert tick.stamp_ns + 20 * MS < now <= tick.stamp_ns + 21 * MS + MS  # 20 ms: what `play` grants


def test_a_missing_frame_makes_a_tick_with_the_last_one() -> None:
    stamps = [k * PERIOD for k in range(1, 10) if k != 5]
    ticker, live = play(stamps, [MS] * len(stamps))
    grid = align.grid(stamps[0], stamps[-1], PERIOD)
    index = align.sample(np.array(stamps), grid.time, Align("hold", "header", 150.0), PERIOD)
    anchors = align.anchors(np.array(stamps), index, grid, PERIOD)
    assert [tick.anchor_ns for _, tick in live] == anchors[: len(live)].tolist()
    stale = [tick for _, tick in live if not tick.is_fresh]
    assert [t.number for t in stale] == [4]
    assert stale[0].stamp_ns == 4 * PERIOD
    assert stale[0].anchor_ns == 5 * PERIOD  # where its frame would have been
    assert ticker.skipped == 0


def test_after_a_standstill_ticks_are_skipped_and_counted() -> None:
    ticker = Ticker(PERIOD)
    ticker.frame(PERIOD)
    assert ticker.next(PERIOD).number == 0
    tick = ticker.next(PERIOD + 10 * PERIOD)
    assert (tick.number, ticker.skipped) == (10, 9)
    assert tick.anchor_ns + PERIOD >= tick.time_ns  # not where it would have been long ago
    assert ticker.next(PERIOD + 10 * PERIOD) is None


@pytest.mark.parametrize("drift", [-1e-3, 1e-3])
def test_a_drifting_camera_keeps_its_pace(drift) -> None:
    """Against the nominal rate a slow camera lacks a frame now and then, a fast one has one too many."""
    stamps = [round(PERIOD + k * PERIOD * (1 + drift)) for k in range(700)]
    ticker, live = play(stamps, [2 * MS] * len(stamps), step=MS)
    assert ticker.skipped <= 1
    assert len(live) >= 698
    assert all(tick.is_fresh and now - tick.stamp_ns <= 3 * MS for now, tick in live)
