"""Samples between threads: what is kept, what is still to be expected."""

from hypothesis import example, given
from hypothesis import strategies as st

from d4_nodes.inbox import Inbox, Sample

MS = 1_000_000


def filled(stamps) -> Inbox:
    inbox = Inbox(("eye", "joints"), cameras=("eye",))
    for stamp in stamps:
        inbox.keep("joints", Sample(stamp, stamp, None))
    return inbox


def test_of_a_camera_few_pictures_are_kept() -> None:
    inbox = Inbox(("eye", "joints"), cameras=("eye",))
    for stamp in range(1, 101):
        for name in inbox.names:
            inbox.keep(name, Sample(stamp, stamp, None))
    assert len(inbox.since("eye", 0)) == 8
    assert len(inbox.since("joints", 0)) == 64
    assert inbox.accepted["eye"] == 100


@given(st.integers(1, 50), st.integers(0, 49), st.integers(0, 200), st.integers(0, 40))
@example(10, 0, 9, 0)
@example(10, 0, 8, 0)
@example(50, 0, 48, 0)
@example(50, 0, 47, 0)
def test_what_a_regular_stream_still_owes(interval_ms, phase_ms, wanted_ms, count) -> None:
    """Of a stream whose rate is known, exactly the samples that its rate says are waited for, be they early
    by a tenth of their interval, and at most by 2 ms.
    """
    interval, first = interval_ms * MS, 10**9 + phase_ms * MS
    stamps = [first + k * interval for k in range(6 + count)]
    time_ns = stamps[-1] + wanted_ms * MS
    expected = stamps[-1] + interval - min(interval // 10, 2 * MS) <= time_ns
    assert filled(stamps).is_on_its_way("joints", time_ns) is (expected and wanted_ms > 0)


def test_a_stream_of_unknown_rate_is_waited_for_but_not_one_that_sleeps() -> None:
    assert Inbox(("joints",)).is_on_its_way("joints", 10**9)
    inbox = filled([10**9])  # said once, as a goal is
    assert inbox.is_on_its_way("joints", 10**9 + 50 * MS)
    assert not inbox.is_on_its_way("joints", 10**9)
    assert not inbox.is_on_its_way("joints", 3 * 10**9)


@given(st.permutations(range(30)))
def test_samples_that_overtake_each_other_a_little_are_in_order(numbers) -> None:
    inbox, newest = Inbox(("joints",), reorder_ns=5 * MS), -1
    stamps = [10**9 + (k - k % 6 + j % 6) * MS for k, j in enumerate(numbers)]  # within blocks of six
    for stamp in stamps:
        sample = Sample(stamp, stamp, stamp)
        assert inbox.is_overtaken("joints", sample) is (stamp < newest)
        inbox.keep("joints", sample)
        newest = max(newest, stamp)
    assert inbox.since("joints", 0) == sorted(stamps)
    assert all(inbox.at("joints", stamp).message == stamp for stamp in stamps)


def test_of_samples_in_order_the_oldest_are_let_go() -> None:
    inbox = Inbox(("eye",), cameras=("eye",), reorder_ns=10 * MS)
    for stamp in (*range(100, 108), 110, 109, 103):
        inbox.keep("eye", Sample(stamp * MS, stamp * MS, None))
    kept = [stamp // MS for stamp in inbox.since("eye", 0)]
    assert kept == [103, 103, 104, 105, 106, 107, 109, 110]


def test_samples_of_a_clock_that_was_set_back_follow_the_others() -> None:
    """Put in order they would lie before all that is kept, and never be seen."""
    inbox = Inbox(("joints",), reorder_ns=5 * MS)
    for stamp in (100, 101, 20, 22, 21):
        assert inbox.is_overtaken("joints", Sample(stamp * MS, 0, None)) is (stamp == 21)
        inbox.keep("joints", Sample(stamp * MS, 0, None))
    assert [inbox.at("joints", time * MS).stamp_ns // MS for time in (21, 23)] == [21, 22]
