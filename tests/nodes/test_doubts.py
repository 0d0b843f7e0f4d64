"""What was wrong a moment ago is not trusted at once, and what is too old is never sent."""

import os
import signal
import threading
import time

PERIOD_S = 0.05


def commands_since(rig, since_ns: int) -> list:
    return [command for command in rig.motors.commands if command[0] >= since_ns]


def test_a_command_whose_time_is_over_is_never_sent(rig) -> None:
    """After a second and a half without the processor the loop sent the command from before, as if fresh."""
    real = rig.loop._round

    def stuck() -> None:
        rig.loop._round = real
        time.sleep(0.6)

    time.sleep(0.2)
    rig.loop._round = stuck
    time.sleep(0.3)
    since = time.time_ns()
    rig.until_driving()
    time.sleep(0.5)
    after = commands_since(rig, since)
    assert [is_safe for _, is_safe, _ in after[:4]] == [True] * 4
    assert rig.report.stages["lateness"].largest < 1e9 * PERIOD_S
    assert rig.report.reasons["the loop stood still"] == 1


def test_a_loop_held_up_between_verdict_and_sending_sends_nothing(rig) -> None:
    check, held_up = rig.guard.check, []

    def slow(values, now_ns):
        verdict = check(values, now_ns)
        if not held_up and values is not None:
            held_up.append(now_ns)
            time.sleep(0.2)
        return verdict

    rig.guard.check = slow
    rig.until(lambda: held_up, 2)
    rig.until(lambda: rig.motors.commands[-1][1], 2)
    rig.until_driving()
    assert rig.report.stages["lateness"].largest < 1e9 * PERIOD_S
    assert not any(t - held_up[0] < 2e8 and not is_safe for t, is_safe, _ in commands_since(rig, held_up[0]))


def test_a_loop_that_goes_round_and_sends_nothing_is_replaced_too(rig) -> None:
    since = time.time_ns()
    rig.loop._publish = lambda due: None
    rig.loop._silent_until = lambda: None
    rig.until(lambda: rig.watchdog.count > 0, 2)
    assert all(is_safe for t, is_safe, _ in commands_since(rig, since + 50_000_000))
    del rig.loop._publish, rig.loop._silent_until
    rig.until_driving()


def test_an_episode_that_begins_clears_no_doubt(rig) -> None:
    """A start at every other tick kept a robot with a frozen camera driving."""
    rig.camera.freeze = True
    assert rig.until_safe() == "frozen"
    since = time.time_ns()
    for _ in range(8):
        rig.loop.begin(time.time_ns())
        time.sleep(0.12)
    assert all(is_safe for _, is_safe, _ in commands_since(rig, since))
    rig.camera.freeze = False
    rig.until_driving()


def test_what_comes_and_goes_does_not_drive_in_between(rig) -> None:
    """NaN at every other tick made the robot drive and stop ten times a second."""
    rig.faults.write_text("nan now and then")
    rig.until_safe()
    since = time.time_ns()
    time.sleep(0.6)
    assert all(is_safe for _, is_safe, _ in commands_since(rig, since))
    rig.faults.unlink()
    rig.until_driving()


def test_after_nan_the_model_begins_anew(rig) -> None:
    """It may look back on what made the NaN for as long as its memory reaches."""
    before = rig.report.counts["times the past was forgotten"]
    rig.faults.write_text("nan")
    rig.until_safe()
    rig.until(lambda: rig.report.counts["times the past was forgotten"] > before, 2)
    rig.faults.unlink()
    rig.until_driving()


def test_a_server_that_stops_right_after_an_answer_is_noticed_within_two_periods(rig) -> None:
    """That is the worst moment: the next answer is not due for a period and the latency."""
    took = []
    for _ in range(3):
        count = rig.report.stages["answer"].count
        rig.until(lambda n=count: rig.report.stages["answer"].count > n, 2)
        since = time.time_ns()
        os.kill(rig.server.process.pid, signal.SIGSTOP)
        rig.until(lambda: rig.motors.commands[-1][1], 2)
        took.append(rig.safe_after_s(since))
        os.kill(rig.server.process.pid, signal.SIGCONT)
        rig.until_driving()
    assert min(took) < 2 * PERIOD_S  # the machine may be busy, but not three times


class _Eager:
    """A lock at whose release another thread is already there."""

    def __init__(self, act) -> None:
        self._lock, self._act, self._depth = threading.RLock(), act, 0

    def acquire(self, timeout: float = -1) -> bool:
        self._depth += 1
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._act()
        self._lock.release()

    __enter__ = acquire

    def __exit__(self, *_) -> None:
        self.release()


def test_a_loop_that_wakes_up_as_it_is_abandoned_sends_nothing(rig) -> None:
    """The lock was free for a moment between the last safety action and the end of all sending."""
    loop = rig.loop
    loop.stop()
    rig.until(lambda: not rig._thread.is_alive(), 2)
    verdict = rig.guard.check(None, time.time_ns())
    loop.lock = _Eager(lambda: loop._send(verdict, 0))
    count = len(rig.motors.commands)
    assert loop.abandon(1.0)
    assert len(rig.motors.commands) == count + 1


def test_a_model_that_is_slow_for_three_seconds(rig) -> None:
    """Two late answers are bridged by the plan; then nothing is, however long it lasts."""
    rig.faults.write_text("sleep 0.2")
    since = time.time_ns()
    time.sleep(3.0)
    rig.faults.unlink()
    during = [is_safe for t, is_safe, _ in commands_since(rig, since)]
    assert all(during[during.index(True) :])
    assert during.index(True) <= 3
    rig.until_driving()


def test_stopping_with_a_request_at_the_server_waits_for_no_answer(rig) -> None:
    rig.faults.write_text("sleep 1.5")
    rig.until(lambda: rig.loop._link is not None and rig.loop._link.is_busy, 2)
    time.sleep(0.1)
    since = time.monotonic()
    rig.loop.stop()
    rig.until(lambda: not rig._thread.is_alive(), 2)
    assert time.monotonic() - since < 1.0
    assert rig.motors.commands[-1][1]


def test_a_camera_that_has_not_come_yet_is_no_reason_for_doubt(standing) -> None:
    """The first commands of a robot that was switched on after its policy were safety actions."""
    standing.camera.pause = True
    unpause = threading.Timer(1.0, setattr, (standing.camera, "pause", False))
    unpause.start()
    standing.start()
    assert "stale" not in standing.report.reasons
    acted = {rules for _, is_safe, rules in standing.motors.commands if is_safe}
    assert {("stale",)} <= acted <= {("stale",), ("no_command",)}
    standing.camera.pause = True
    assert standing.until_safe() == "stale"  # but one that went away is
    frames = standing.report.counts["frames"]
    standing.camera.pause = False
    standing.until_driving()
    assert standing.report.counts["frames"] - frames >= 5
