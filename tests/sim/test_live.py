"""A world by the clock: on time it is the lockstep world, late commands take hold late."""

import numpy as np
import pytest

from d4_sim.live import LiveWorld
from d4_sim.world import make_world

MS = 1_000_000


def drive(live: LiveWorld, actions: np.ndarray, delay_ms: float) -> list[np.ndarray]:
    """Commands that arrive `delay_ms` after each frame; the clock goes on in odd little steps."""
    frame, frames = live.begin(7, 1, 5_000 * MS), []
    now, waiting = frame.stamp_ns, [(frame.stamp_ns + delay_ms * MS, actions[0])]
    while True:
        now += 3 * MS + 137
        while waiting and waiting[0][0] <= now:
            time_ns, values = waiting.pop(0)
            live.command(values, int(time_ns))
        frame = live.advance(now)
        if frame is None:
            continue
        frames.append(frame)
        if frame.is_last:
            return frames
        waiting.append((frame.stamp_ns + delay_ms * MS, actions[frame.number]))


@pytest.mark.parametrize("name", ["yard", "arm"])
def test_a_command_on_time_gives_the_lockstep_world(name):
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32)
    live, world = LiveWorld(name), make_world(name)
    frames = drive(live, actions, 41.0)  # a little later than the contract's 40 ms, as a topic takes
    world.reset(7, 1)
    for k, frame in enumerate(frames):
        observation, reward, terminal, _ = world.step(actions[k])
        np.testing.assert_array_equal(frame.observation.image, observation.image)
        np.testing.assert_array_equal(frame.rewards, reward)
        assert frame.stamp_ns == (5_000 + 100 * (k + 1)) * MS
        assert frame.is_terminal == terminal
    assert live.outcomes[0].success == world.success()
    assert live.outcomes[0].frames == len(frames) + 1


def test_a_late_command_is_late():
    actions = np.ones((40, 2), np.float32)
    on_time, late = (drive(LiveWorld("arm"), actions, ms) for ms in (40.0, 90.0))
    assert np.abs(on_time[0].probes["tip"] - late[0].probes["tip"]).max() > 0.01
