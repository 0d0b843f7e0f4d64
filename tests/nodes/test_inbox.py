"""Samples between threads: what is kept, what is still to be expected."""

from hypothesis import given
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
def test_what_a_regular_stream_still_owes(interval_ms, phase_ms, wanted_ms, count) -> None:
    """Of a stream whose rate is known, exactly the samples that its rate says are waited for."""
    interval, first = interval_ms * MS, 10**9 + phase_ms * MS
    stamps = [first + k * interval for k in range(6 + count)]
    time_ns = stamps[-1] + wanted_ms * MS
    expected = stamps[-1] + interval <= time_ns
    assert filled(stamps).is_on_its_way("joints", time_ns) is (expected and wanted_ms > 0)


def test_a_stream_of_unknown_rate_is_waited_for_but_not_one_that_sleeps() -> None:
    assert Inbox(("joints",)).is_on_its_way("joints", 10**9)
    inbox = filled([10**9])  # said once, as a goal is
    assert inbox.is_on_its_way("joints", 10**9 + 50 * MS)
    assert not inbox.is_on_its_way("joints", 10**9)
    assert not inbox.is_on_its_way("joints", 3 * 10**9)
