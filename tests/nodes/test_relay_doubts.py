"""What was wrong a moment ago: the relay passes nothing on until enough good commands have come."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_bench import MS, Bench, recover, still


def test_after_silence_a_number_of_commands_must_come(bench) -> None:
    bench.drive(100)
    bench.spend(200)
    assert bench.relay.state == "no_command"
    recover(bench)
    assert not bench.command(0.1, 0.0, 0.5).is_safe


def test_silence_of_one_channel_is_silence(bench) -> None:
    """While the others went on, its first command after any time passed at once."""
    bench.drive(200)
    for _ in range(6):
        bench.base(0.1, 0.0)
        bench.spend(50)
    assert bench.last.rules == ("no_command",)
    recover(bench)


def test_a_channel_that_comes_every_fourth_time_never_drives_again(bench) -> None:
    """The robot drove in jerks for as long as that lasted."""
    bench.drive(200)
    bench.spend(200)
    count = len(bench.sent)
    for k in range(40):
        if k % 4 == 0:
            bench.arm(0.5)
        bench.base(0.1, 0.0)
        bench.spend(50)
    assert all(verdict.is_safe for _, verdict in bench.sent[count:])


def test_a_command_that_came_in_time_and_is_seen_late_is_no_silence(bench) -> None:
    """A relay that was held up for some milliseconds made the policy pay for it."""
    bench.drive(200)
    bench.spend(20)  # 70 ms after the last command
    bench.base(0.1, 0.0)
    bench.arm(0.5)
    bench.mono += 15 * MS
    bench.relay.round()
    assert not bench.last.is_safe
    assert bench.relay.state == "driving"


@pytest.mark.parametrize("held_up", [76, 85, 300, 2000])
def test_silence_behind_a_command_that_waited_is_silence(bench, held_up) -> None:
    """Only the oldest message that waited was looked at, and what came after the silence drove at once."""
    bench.drive(200)
    bench.base(0.1, 0.0)
    bench.arm(0.5)
    bench.mono += held_up * MS
    bench.see()
    recover(bench)


def test_a_command_that_comes_while_the_relay_reads_is_sent_at_once(bench) -> None:
    """It counted as one of the future, and waited until the relay looked again."""
    bench.drive(200)
    drain = bench.relay.inbox.drain

    def late():
        bench.mono += MS
        bench.base(0.1, 0.0)
        bench.arm(0.5)
        return drain()

    bench.relay.inbox.drain = late
    count = len(bench.sent)
    bench.relay.round()
    assert len(bench.sent) == count + 1


def test_regular_commands_that_are_seen_late_are_no_silence(bench) -> None:
    bench.drive(200)
    for _ in range(4):
        bench.base(0.1, 0.0)
        bench.arm(0.5)
        bench.mono += 50 * MS
    bench.see()
    assert not bench.command(0.1, 0.0, 0.5).is_safe


def test_a_bad_command_that_is_overtaken_is_bad(bench) -> None:
    bench.drive(200)
    for x in (np.nan, 0.1):
        bench.base(x, 0.0)
        bench.arm(0.5)
        bench.mono += 50 * MS
    bench.see()
    recover(bench)


@pytest.mark.parametrize("held_up", [85, 100, 120, 2000])
def test_half_a_command_and_a_relay_that_was_held_up_is_silence(bench, held_up) -> None:
    """The safety action went out for silence, and the next command drove again."""
    bench.drive(200)
    bench.base(0.1, 0.0)
    bench.mono += held_up * MS
    bench.see()
    bench.relay.round()
    assert bench.last.rules == ("no_command",)
    recover(bench)


def test_the_first_command_passes_however_long_it_took(bench) -> None:
    bench.spend(500)
    assert not bench.command(0.1, 0.0, 0.5).is_safe


def test_a_camera_that_has_not_come_yet_is_no_reason_for_doubt(bench) -> None:
    bench.sees = False
    bench.spend(100)  # streams count as fresh at the beginning
    bench.drive(400)
    assert bench.last.rules == ("stale",)
    bench.sees = True
    bench.see()
    assert not bench.command(0.1, 0.0, 0.5).is_safe


@pytest.mark.parametrize("bad", ["nan", "frozen"])
def test_what_came_and_was_bad_before_anything_drove_is_one(bench, bad) -> None:
    """Only what had not come yet was meant, and all of them passed at the next good command."""
    if bad == "nan":
        assert bench.command(np.nan, 0.0, 0.5).is_safe
    else:
        bench.moves = False
        for _ in range(10):
            bench.base(np.nan, 0.0)
            bench.spend(50)
        bench.moves = True
        bench.spend(60)
    bench.spend(50)
    recover(bench)


def test_a_policy_that_is_late_every_other_time_never_drives_again(bench) -> None:
    bench.drive(100)
    count = len(bench.sent)
    for _ in range(20):
        bench.spend(35)  # 85 ms between two commands, 75 are allowed
        bench.command(0.1, 0.0, 0.5)
        bench.spend(50)
        bench.command(0.1, 0.0, 0.5)
        bench.spend(50)
    assert all(verdict.is_safe for _, verdict in bench.sent[count:])


@pytest.mark.parametrize("bad", ["nan", "stale", "frozen"])
def test_what_is_bad_again_while_it_recovers_begins_anew(bench, bad) -> None:
    bench.drive(200)
    bench.spend(200)
    for _ in range(4):
        assert bench.command(0.1, 0.0, 0.5).is_safe
        bench.spend(50)
    if bad == "nan":
        assert bench.command(np.nan, 0.0, 0.5).is_safe
    else:
        name = "sees" if bad == "stale" else "moves"
        setattr(bench, name, False)
        bench.spend(150)
        assert bench.last.rules == (bad,)
        setattr(bench, name, True)
    bench.spend(50)
    recover(bench)


def test_how_many_commands_it_takes_is_up_to_the_user(monkeypatch) -> None:
    bench = Bench(recover_after=1)
    still(monkeypatch, bench)
    bench.drive(100)
    bench.spend(200)
    recover(bench, 1)


def test_a_fast_simulation_is_no_jump() -> None:
    """Its clock went 200 ms further between two looks; that was a jump, again and again."""
    bench = Bench(is_simulated=True)
    for _ in range(20):
        bench.see()
        bench.command(0.1, 0.0, 0.5)
        bench.mono += 200 * MS
    assert not bench.relay.report.reasons


def test_a_relay_held_up_before_it_sends_does_not_send_an_old_command(bench) -> None:
    """The watchdog sent the safety action in its place, and the command of before came after that."""
    bench.drive(200)
    recover_ = bench.relay._recover

    def stall(values, now):
        bench.relay._recover = recover_
        bench.mono += 2000 * MS
        assert bench.relay.rest_from_outside(1)
        recover_(values, now)

    bench.relay._recover = stall
    count = len(bench.sent)
    bench.base(0.3, 0.0)
    bench.arm(0.5)
    bench.relay.round()
    assert len(bench.sent) > count
    assert all(verdict.is_safe for _, verdict in bench.sent[count:])
    bench.see()
    bench.spend(1)
    recover(bench)


def test_a_relay_that_stood_still_waits_for_good_commands(bench) -> None:
    bench.drive(200)
    bench.mono += 300 * MS
    bench.relay.rest_from_outside(1)
    bench.see()
    recover(bench)


def test_a_burst_is_not_a_number_of_good_commands(bench) -> None:
    """A process that was stopped says everything at once when it goes on."""
    bench.drive(200)
    bench.spend(1000)
    for _ in range(10):
        assert bench.command(0.1, 0.0, 0.5).is_safe
        bench.spend(1)
    bench.spend(40)
    recover(bench, 4)


def test_many_commands_and_a_camera_that_comes_and_goes_never_drive(bench) -> None:
    bench.drive(200)
    bench.sees = False
    bench.spend(200)
    count = len(bench.sent)
    for k in range(400):
        if k % 80 == 0:
            bench.see()
        bench.command(0.1, 0.0, 0.5)
        bench.spend(5)
    assert all(verdict.is_safe for _, verdict in bench.sent[count:])


def test_silence_while_it_recovers_is_named(bench) -> None:
    """The reason of before stood there for as long as nothing came."""
    bench.drive(200)
    bench.spend(200)
    bench.command(0.1, 0.0, 0.5)
    bench.spend(1000)
    assert bench.last.rules == ("no_command",)
    assert float(re.search(r"came (\d+) ms ago", bench.last.reason)[1]) > 900


@settings(max_examples=150, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(1, 160), st.integers(0, 40), st.booleans()), min_size=4, max_size=14),
    holds=st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 400)), min_size=1, max_size=3),
)
def test_a_relay_that_is_held_up_doubts_whatever_one_that_is_not_doubts(gaps, holds) -> None:
    """Commands of two channels, some of them without the second, at any times."""
    arrivals: dict[int, list[str]] = {}
    at = 0
    for gap, apart, is_whole in gaps:
        at += gap
        arrivals.setdefault(at, []).append("base")
        if is_whole:
            arrivals.setdefault(at + apart, []).append("arm")
    asleep = {ms for begin, length in holds for ms in range(begin, begin + length)}
    owed = []
    for is_held_up in (False, True):
        bench = Bench(is_simulated=True)
        bench.see()
        bench.command(0.1, 0.0, 0.5)
        for ms in range(1, at + 60):
            bench.mono += MS
            if ms % 50 == 0:
                bench.see()
            for topic in arrivals.get(ms, ()):
                bench.base(0.1, 0.0) if topic == "base" else bench.arm(0.5)
            if not (is_held_up and ms in asleep):
                bench.relay.round()
        bench.relay.round()
        owed.append(bench.relay._owed)
    assert owed[1] >= owed[0]
