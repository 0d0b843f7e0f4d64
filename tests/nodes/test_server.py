"""The inference server with a real, untrained policy: what it answers is what the session says."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from untrained_run import save

from d4_core.models import load
from d4_core.session import PolicySession
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.messages import decode, look
from d4_nodes import activation, memory
from d4_nodes.bench import ServerProcess
from d4_nodes.link import Link
from d4_nodes.memory import Memory
from d4_nodes.server import PolicyBrain

FRAMES = 9  # more than the attention windows hold
ROBOT = Path(__file__).with_name("robot.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder with an untrained policy for the test robot."""
    return save(Contract.load(ROBOT), tmp_path_factory.mktemp("run"))


@pytest.fixture
def pictures(rng) -> np.ndarray:
    return rng.integers(0, 256, (FRAMES, 8, 12, 3), np.uint8)


def through_memory(brain: PolicyBrain, pictures: np.ndarray, previous=None) -> np.ndarray:
    shared = Memory(memory.layout(brain.contract, brain.leads))
    plans = []
    for number, picture in enumerate(pictures):
        shared["camera.eye"][:], shared["reset"][...] = picture, number == 0
        if plans:
            shared["previous"][:], shared["previous_known"][...] = plans[-1][0], 1
        if previous is not None and plans:
            shared["previous"][:] = previous
        brain.decide(shared)
        plans.append(shared["plan"].copy())
    shared.close()
    return np.stack(plans)


def test_the_server_answers_what_the_session_says(folder, pictures) -> None:
    session = PolicySession(load(folder / "imagination"), 1, seed=3)
    session.reset(1, np.zeros(1, np.int64))
    vectors = {"joints": np.zeros((1, 2), np.float32)}
    wanted = np.stack([session.act(p[None], vectors, np.ones(1, bool))[0] for p in pictures])
    brain = PolicyBrain(folder, seed=3, device="cpu")
    for _ in range(2):  # the second episode begins where the first one did
        plans = through_memory(brain, pictures)
        np.testing.assert_array_equal(plans[:, 0], wanted)
    assert plans.shape == (FRAMES, 3, 3)


def test_what_was_really_done_reaches_the_model(folder, pictures) -> None:
    brain = PolicyBrain(folder, seed=3, device="cpu")
    usual = through_memory(brain, pictures)
    tokens = brain.session.features.clone()
    other = through_memory(brain, pictures, previous=np.array([0.9, -1.9, 2.9], np.float32))
    np.testing.assert_array_equal(usual[0], other[0])
    assert not np.allclose(tokens.numpy(), brain.session.features.numpy())


def test_a_reset_allocates_nothing(folder, pictures) -> None:
    brain = PolicyBrain(folder, device="cpu")
    places = [t.data_ptr() for t in (brain.session.dream.cache.keys, brain.session.cache.keys)]
    through_memory(brain, pictures)
    through_memory(brain, pictures)
    assert places == [t.data_ptr() for t in (brain.session.dream.cache.keys, brain.session.cache.keys)]


def test_the_command_serves_until_it_is_told_to_stop(folder, tmp_path) -> None:
    path = tmp_path / "d4.sock"
    command = [sys.executable, "-m", "d4_nodes.server", str(folder), "--socket", str(path), "--threads", "1"]
    with ServerProcess(command) as server:
        contract = Contract.load(ROBOT)
        link = Link(path, contract)
        assert link.card["leads"] == 3
        assert link.card["weights"] == server.ready["weights"]
        assert link.card["step"] == server.ready["step"] == "plain, on a CPU"
        taken = []
        pictures = {"eye": lambda: taken.append(1) or np.zeros((90, 160, 3), np.uint8)}
        measured = activation.measure(link, contract, pictures, transport_ms=2.0, count=10)
        assert len(taken) > 10
        assert 0 < measured.p50 <= measured.p99
        assert measured.budget == contract.latency_ms - 2.0
        time.sleep(0.05)
        assert link.heartbeat_age_s() < 0.5
        link.close()
        again = Link(path, contract)  # a robot that comes back is welcome
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        again.close()
    assert not path.exists()


def test_a_folder_without_a_policy_is_one_sentence(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "d4_nodes.server", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_too_slow_is_refused_with_the_figure(contract) -> None:
    slow = activation.Measured(20.0, 35.5, 30.0)
    with pytest.raises(UserError, match=r"35\.5 ms \(p99\).*5\.5 ms too few"):
        activation.require(slow, allow_slow=False)
    assert "allow_slow" in activation.require(slow, allow_slow=True)
    assert "too" not in activation.require(slow._replace(p99=29.0), allow_slow=False)


def test_a_depth_picture_is_measured_as_the_loop_sees_it(contract) -> None:
    """It was decoded without the camera's range, which is refused: no robot with such a camera activated."""
    eye = replace(contract.images[0], depth_m=(0.5, 4.5))
    others = tuple(o for o in contract.observations if o.name != "eye")
    robot = replace(contract, observations=(eye, *others))
    metres = np.full((16, 24), 2.5, np.float32)
    msg = SimpleNamespace(height=16, width=24, encoding="32FC1", is_bigendian=0, step=96)
    msg.data = metres.tobytes()
    pictures = activation.sources(robot, {"eye": msg}, decode)
    np.testing.assert_array_equal(pictures["eye"](), look(msg, (8, 12), (0.5, 4.5)))
    assert pictures["eye"]().shape == (8, 12, 3)
    assert activation.sources(robot, {}, decode) == {}


def test_memory_of_another_size_is_refused(contract) -> None:
    import os

    small = Memory(memory.layout(contract, 1))
    large = memory.layout(replace(contract, observations=contract.observations), 4000)
    with pytest.raises(ValueError, match="are needed"):
        Memory(large, os.dup(small.descriptor))
    small.close()


def test_the_fields_do_not_overlap(contract) -> None:
    fields = memory.layout(contract, 4)
    for before, after in pairwise(fields):
        assert before.offset + before.size <= after.offset
        assert after.offset % 64 == 0
    assert json.loads(json.dumps(fields))[0][0] == "heartbeat"
