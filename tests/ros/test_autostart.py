"""A launched node drives by itself once; what somebody asks of it later is done, and no more."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytestmark = pytest.mark.ros

from lifecycle_msgs.msg import TransitionEvent  # noqa: E402
from policy_rig import ROBOT, World  # noqa: E402

from d4_nodes.ros import qos  # noqa: E402


class Launched:
    """`ros2 launch` of the guard node, and what became of the node."""

    def __init__(self, log: Path, world: World, *arguments: str) -> None:
        self.log, self.states = log, []
        world.node.create_subscription(TransitionEvent, "guard/transition_event", self._note, qos.EVENT)
        command = ["ros2", "launch", "d4_bringup", "guard.launch.py", f"contract:={ROBOT}", *arguments]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def _note(self, event: TransitionEvent) -> None:
        self.states.append(event.goal_state.label)

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)


@pytest.fixture
def launched(tmp_path):
    started = []

    def start(*arguments: str) -> tuple[Launched, World]:
        world = World(node="guard")
        started.append((Launched(tmp_path / "launch.log", world, *arguments), world))
        return started[-1]

    yield start
    for launch, world in started:
        world.close()
        launch.end()
        print(launch.log.read_text())


def stays_inactive(launch: Launched, world: World) -> None:
    """For as long as the launch needed to activate it, and longer."""
    time.sleep(3.0)
    assert world.state() == "inactive"
    assert "activating" not in launch.states


def test_configuring_it_again_does_not_make_it_drive(launched):
    """Two seconds after somebody had only configured the node again, the launch had activated it."""
    launch, world = launched()
    world.until(lambda: "active" in launch.states, 30)
    assert world.deactivate()
    assert world.cleanup()
    world.until(lambda: launch.states[-1] == "unconfigured")
    launch.states.clear()
    assert world.configure()
    stays_inactive(launch, world)
    assert world.activate()


def test_configuring_it_after_a_refusal_does_not_make_it_drive(launched):
    """And the launch says what it leaves to be done."""
    launch, world = launched("input_prefix:=/")
    world.until(lambda: "not configured" in launch.log.read_text(), 30)
    assert "`ros2 lifecycle set /guard configure`, and `activate` when it is" in launch.log.read_text()
    assert world.set("input_prefix", "policy")[0]
    launch.states.clear()
    assert world.configure()
    stays_inactive(launch, world)
    assert world.activate()
