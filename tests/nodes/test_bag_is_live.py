"""What a policy sees live is what d4-ingest makes of the same messages, picture for picture.

Recordings of random timings are replayed through the loop in the order in which their messages were received,
under a clock that is turned by hand, and compared with the episodes of the importer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replayed import MS, PERIOD, Event, Live, Seen, encoded, imported, message, replayed, robot

from d4_datasets.bags import BagWriter
from d4_datasets.ingest import ingest
from d4_datasets.windows import Windows

FRAMES = 20
BEGIN = 1000 * MS


def stream(draw, name: str, stamps: list[int], transport_ms: tuple[float, float]) -> list[Event]:
    """Messages of these stamps, each received after a random time, in their order."""
    low, high = (round(1e6 * value) for value in transport_ms)
    took = draw(st.lists(st.integers(low, high), min_size=len(stamps), max_size=len(stamps)))
    receive = np.maximum.accumulate(np.array(stamps) + np.array(took)).tolist()
    return [Event(r, name, s, k + 1) for k, (s, r) in enumerate(zip(stamps, receive, strict=True))]


def camera_stamps(draw, jitter_ms: float, shift_ms: float = 0.0) -> list[int]:
    """Capture times of a camera that runs at the contract's rate, jitters, and loses frames now and then."""
    wide = round(1e6 * jitter_ms)
    jitter = draw(st.lists(st.integers(-wide, wide), min_size=FRAMES, max_size=FRAMES))
    lost = draw(st.lists(st.booleans(), min_size=FRAMES, max_size=FRAMES))
    often = draw(st.sampled_from([0, 1, 3]))  # no losses, single ones, long gaps
    gone = [often and lost[k // often] and k % 4 >= 4 - often for k in range(FRAMES)]
    stamps = [BEGIN + k * PERIOD + round(1e6 * shift_ms) + (jitter[k] if k else 0) for k in range(FRAMES)]
    return [stamp for k, stamp in enumerate(stamps) if k == 0 or not gone[k]]


def vector_stamps(draw, periods_ms: tuple[int, ...] = (7, 20, 33, 80)) -> list[int]:
    """Capture times of joints that are sampled at a rate of their own, from before the first picture on."""
    period = draw(st.sampled_from(periods_ms)) * MS
    begin = BEGIN - period - draw(st.integers(0, 50 * MS))
    return list(range(begin, BEGIN + FRAMES * PERIOD, period))


@st.composite
def timely(draw) -> tuple[int, list[Event]]:
    """Recordings in which everything comes before the loop has to decide without it: pictures within a tenth
    of their period, the second camera's before the first one's; joints a little after them.
    """
    cameras = draw(st.sampled_from([1, 2]))
    events = stream(draw, "eye0", camera_stamps(draw, 8), (0.1, 10))
    if cameras == 2:
        events += stream(draw, "eye1", camera_stamps(draw, 4, shift_ms=-25), (0.1, 8))
    return cameras, events + stream(draw, "joints", vector_stamps(draw), (0.0, 15))


def both(cameras: int, events: list[Event]) -> tuple[dict[int, Seen], Live]:
    contract = robot(cameras)
    with tempfile.TemporaryDirectory() as folder:
        offline = imported(contract, events, Path(folder))
    return offline, replayed(contract, events)


@settings(deadline=None, max_examples=20)
@given(timely())
def test_what_comes_in_time_is_seen_alike(recording) -> None:
    """Gaps, jitter, two cameras, joints at any rate: the same windows, frame for frame."""
    offline, live = both(*recording)
    assert len(offline) > 2
    inside = {time: seen for time, seen in live.seen.items() if time in offline}
    assert inside == offline
    alone = set(live.seen) - set(offline)  # no window has a tick alone, nor one after the last picture's
    for time in alone:
        assert time > max(offline) or not {time - PERIOD, time + PERIOD} & offline.keys()


@st.composite
def untimely(draw) -> tuple[int, list[Event]]:
    """The same with messages that may come long after the moment of decision."""
    cameras = draw(st.sampled_from([1, 2]))
    events = stream(draw, "eye0", camera_stamps(draw, 15), (0.1, 120))
    if cameras == 2:
        events += stream(draw, "eye1", camera_stamps(draw, 15, shift_ms=-25), (0.1, 60))
    return cameras, events + stream(draw, "joints", vector_stamps(draw), (0.0, 90))


def on_the_moment() -> tuple[int, list[Event]]:
    """One that went wrong: joints of a picture are received when it has waited for them as long as it may."""
    events = [Event(BEGIN + k * PERIOD + MS, "eye0", BEGIN + k * PERIOD, k + 1) for k in range(FRAMES)]
    stamps = range(BEGIN - 50 * MS, BEGIN + FRAMES * PERIOD, 20 * MS)
    return 1, events + [Event(stamp + 36 * MS, "joints", stamp, k + 1) for k, stamp in enumerate(stamps)]


@settings(deadline=None, max_examples=20)
@given(untimely())
@example(on_the_moment())
def test_only_what_comes_too_late_is_seen_otherwise(recording) -> None:
    """A tick differs only if something of it came when it had been decided, or the frame it follows did. What
    comes in the very nanosecond of the decision may be in it or not.
    """
    cameras, events = recording
    offline, live = both(cameras, events)
    received = {(event.stream, event.number): event.receive for event in events}
    is_late = False
    for time, seen in sorted(offline.items()):
        if time not in live.decided:
            continue  # passed over while a late picture was waited for
        moment = dict.fromkeys(seen.numbers, live.decided[time]) | {"eye0": live.chosen[time]}
        missed = any(received[name, number] >= moment[name] for name, number in seen.numbers.items())
        # A tick without a picture of its own goes by the one before it, which may have been late.
        is_late = missed or (is_late and not live.ticks[time].is_fresh)
        if time in live.seen and live.seen[time].numbers != seen.numbers:
            assert is_late
    assert all(
        received["eye0", seen.numbers["eye0"]] <= live.chosen[time] for time, seen in live.seen.items()
    )


@st.composite
def one_camera(draw) -> list[Event]:
    events = stream(draw, "eye0", camera_stamps(draw, 8), (0.1, 10))
    return events + stream(draw, "joints", vector_stamps(draw, (7, 20, 33)), (0.0, 15))


@settings(deadline=None, max_examples=20)
@given(one_camera())
def test_the_tokenizer_node_gives_pictures_the_samples_of_the_importer(events) -> None:
    """Latents are recorded with their picture's stamp; what they were made of must be what belongs to it."""
    contract = robot()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        offline = imported(contract, events, Path(folder))
        live = {seen.numbers["eye0"]: seen for seen in encoded(contract, events, patch)}
    began = {seen.numbers["eye0"] for seen in offline.values() if seen.is_first}
    seen_once: set[int] = set()
    for _, seen in sorted(offline.items()):
        number = seen.numbers["eye0"]
        if number in seen_once:
            continue  # a tick that repeats a picture has the joints of its own moment
        seen_once.add(number)
        assert live[number].numbers == seen.numbers
        assert live[number].is_first == (number in began)


def test_windows_hold_the_pixels_that_the_policy_saw(tmp_path) -> None:
    """Through files and video: d4-ingest, and what was in the server's memory."""
    rng, contract = np.random.default_rng(3), robot(2)
    events = []
    for name, shift in (("eye0", 0), ("eye1", -20 * MS)):
        for k in range(FRAMES):
            stamp = BEGIN + k * PERIOD + shift + int(rng.integers(0, 5 * MS)) * (k > 0)
            if k % 7 != 5:
                events.append(Event(stamp + int(rng.integers(MS, 8 * MS)), name, stamp, k + 1))
    joints = range(BEGIN - 50 * MS, BEGIN + FRAMES * PERIOD, 10 * MS)
    events += [Event(stamp + 3 * MS, "joints", stamp, k + 1) for k, stamp in enumerate(joints)]
    types = {s.name: (s.topic, s.type) for s in contract.observations}
    with BagWriter(tmp_path / "bag") as writer:
        for event in sorted(events):
            writer.write(*types[event.stream], 1_700_000_000_000 * MS + event.receive, message(event))
    ingest([tmp_path / "bag"], contract, tmp_path / "data")
    windows, live = Windows(tmp_path / "data"), replayed(contract, events)
    ticks = [seen for _, seen in sorted(live.seen.items())][: windows.num_frames]
    assert windows.num_frames >= FRAMES - 2
    for name in ("eye0", "eye1"):
        low, high = (windows.images[name][:, 0, 0, part].astype(int) for part in (0, 1))
        numbers = low + 256 * high
        assert numbers.tolist() == [seen.numbers[name] for seen in ticks]
    assert windows.vectors["joints"][:, 0].tolist() == [seen.numbers["joints"] for seen in ticks]
    firsts = [k for k, seen in enumerate(ticks) if seen.is_first]
    assert firsts == windows.episode_start.tolist()


# ---- where the two once differed


def even(cameras: int, late_ms: float = 0.0, vector_ms: int = 10) -> list[Event]:
    """A camera without jitter, received after 2 ms; the second one captured with it, received later."""
    events = []
    for n in range(cameras):
        for k in range(FRAMES):
            stamp = BEGIN + k * PERIOD
            events.append(Event(stamp + 2 * MS + n * round(1e6 * late_ms), f"eye{n}", stamp, k + 1))
    stamps = range(BEGIN - 50 * MS, BEGIN + FRAMES * PERIOD, vector_ms * MS)
    return events + [Event(stamp + MS, "joints", stamp, k + 1) for k, stamp in enumerate(stamps)]


def differing(cameras: int, events: list[Event]) -> list[int]:
    offline, live = both(cameras, events)
    return [time for time, seen in offline.items() if live.seen.get(time) != seen]


def test_a_second_camera_that_comes_first_is_seen_alike() -> None:
    assert differing(2, even(2, late_ms=-1)) == []


def test_a_second_camera_captured_with_the_first_is_waited_for() -> None:
    """Of one that comes 1 ms later every picture was one tick old."""
    assert differing(2, even(2, late_ms=1)) == []


def test_samples_that_overtake_each_other_are_put_in_order() -> None:
    """What came after a newer sample was refused as a stamp that goes back, though it came in time."""
    events = even(1, vector_ms=10)
    swapped = []
    for event in events:
        wait = 0
        if event.stream == "joints":  # of the two before each picture, the second one comes first
            phase = (event.stamp - BEGIN) % PERIOD
            wait = {0: -1 * MS, 90 * MS: 10 * MS + MS // 2}.get(phase, 0)
            # and the picture is captured between the two
        else:
            event = Event(event.receive, event.stream, event.stamp - 5 * MS, event.number)
        swapped.append(Event(event.receive + wait, event.stream, event.stamp, event.number))
    assert differing(1, swapped) == []


def test_a_tick_with_a_picture_is_asked_for_although_the_camera_jitters() -> None:
    """A camera that jitters by a third of its period: a short interval made it look faster than it is, and
    ticks were not asked for at all, while a better picture was waited for.
    """
    shifts = [0, 0, 30, -30, 0, 0, 0, 0, 30, -30, 0, 0, 0, -30, 30, 0, 0, 0, 0, 0]
    events = [
        Event(event.receive + shifts[event.number - 1] * MS, event.stream,
              event.stamp + shifts[event.number - 1] * MS, event.number) if event.stream == "eye0" else event
        for event in even(1)
    ]  # fmt: skip
    offline, live = both(1, events)
    own = [time for time in offline if live.ticks[time].is_fresh]
    assert [time for time in own if time not in live.seen] == []


def test_joints_that_jitter_are_waited_for() -> None:
    """None was expected sooner than after the shortest of the last intervals."""
    events = []
    for event in even(1, vector_ms=20):
        # Every other one before a picture is captured 1.5 ms sooner than all intervals before would have it.
        early = (event.stamp - BEGIN) % PERIOD == 10 * MS and event.number % 2
        if event.stream == "joints":
            stamp = event.stamp - 10 * MS + MS - (3 * MS // 2 if early else 0)
            event = Event(stamp + 6 * MS, "joints", stamp, event.number)
        events.append(event)
    assert differing(1, events) == []


def test_the_tokenizer_node_begins_a_stream_where_the_importer_begins_an_episode(
    monkeypatch, tmp_path
) -> None:
    """One picture is lost, and the one before it was 5 ms early: 155 ms old at its second tick. It was not
    seen as a gap, because it was shorter than tolerance and period.
    """
    contract = robot()
    events = [event for event in even(1) if (event.stream, event.number) != ("eye0", 8)]
    events = [
        Event(event.receive - 5 * MS, event.stream, event.stamp - 5 * MS, event.number)
        if (event.stream, event.number) == ("eye0", 7) else event
        for event in events
    ]  # fmt: skip
    offline = imported(contract, events, tmp_path)
    (again,) = [seen for time, seen in offline.items() if seen.is_first and time > min(offline)]
    assert again.numbers["eye0"] == 9
    live = {seen.numbers["eye0"]: seen for seen in encoded(contract, events, monkeypatch)}
    assert live[9].is_first
