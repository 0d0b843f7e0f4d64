"""The client runs a policy node, says how it ended, and never leaves the robot driving."""

import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("rclpy")
pytestmark = pytest.mark.ros

from d4_interfaces.msg import PolicyStatus  # noqa: E402
from policy_rig import PolicyProcess, Server, World  # noqa: E402
from std_msgs.msg import Bool  # noqa: E402

from d4_datasets.contract import Signal  # noqa: E402
from d4_datasets.errors import UserError  # noqa: E402
from d4_nodes.client import PolicyClient  # noqa: E402
from d4_nodes.ros import qos  # noqa: E402

TASK = "toy"  # the contract has one task, called as the robot


@pytest.fixture
def node(tmp_path):
    """A policy node with its server, and the world around it; on a busy machine it may be too slow."""
    server, world = Server(tmp_path), World()
    process = PolicyProcess(tmp_path, "-p", "allow_slow:=true")
    yield server, process, world
    world.close()
    for child in (process.process, server.process):
        child.kill()
        child.wait()
    print(process.said())


@pytest.fixture
def client():
    with PolicyClient(patience_s=5.0, configure_s=20.0) as client:
        yield client


class Running(threading.Thread):
    """A run in a thread of its own."""

    def __init__(self, client: PolicyClient, **arguments) -> None:
        super().__init__(daemon=True)
        self.client, self.arguments, self.result = client, arguments, None
        self.start()

    def run(self) -> None:
        self.result = self.client.run(TASK, **self.arguments)

    def end(self, timeout_s: float = 15.0):
        self.join(timeout_s)
        assert not self.is_alive()
        return self.result


def test_from_unconfigured_to_the_time_limit_twice(node, client):
    _, _, world = node
    for _ in range(2):
        result = client.run(TASK, timeout_s=1.5)
        assert result.reason == "timeout"
        assert result.seconds == pytest.approx(1.5, abs=0.2)
        assert 10 <= result.commands <= 31
        assert result.missed <= 2
        assert world.state() == "inactive"
        time.sleep(0.1)
        assert world.twists[-1][1:] == (0.0, 0.0)
        assert any(x > 0 for _, x, _ in world.twists)
        world.twists.clear()


def test_a_node_that_was_active_stays_active(node, client):
    _, _, world = node
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    time.sleep(1.0)
    result = client.run("", timeout_s=1.0)
    assert result.reason == "timeout"
    assert result.commands <= 31  # of this run, not since activation
    assert world.state() == "active"


@pytest.mark.parametrize(
    "terminal", ["/terminal", Signal("/terminal", "d4_interfaces/msg/PolicyStatus", "shadow")]
)
def test_the_terminal_topic_ends_it(node, client, terminal):
    _, _, world = node
    is_bool = isinstance(terminal, str)
    publisher = world.node.create_publisher(Bool if is_bool else PolicyStatus, "terminal", qos.EVENT)
    run = Running(client, timeout_s=20.0, terminal=terminal)
    world.until_state("driving")
    for value in (False, True):
        publisher.publish(Bool(data=value) if is_bool else PolicyStatus(shadow=value))
        time.sleep(0.3)
        assert run.is_alive() is not value or run.end().reason == "terminal"
    assert run.end().reason == "terminal"
    assert world.state() == "inactive"


def test_refusals(node, client):
    _, _, world = node
    result = client.run("dance", timeout_s=1.0)
    assert result.reason == "refused"
    assert "'dance' is not among the tasks of the contract: toy" in result.message
    assert world.state() == "inactive"  # it was configured to find that out
    ok, reason = world.set("contract", "/nowhere.yaml")
    assert not ok
    assert reason == "contract cannot change while the node is configured"
    assert world.cleanup()
    assert world.set("contract", "/nowhere.yaml")[0]
    result = client.run(TASK, timeout_s=1.0)
    assert result.reason == "refused"
    assert "cannot be configured: cannot read the contract /nowhere.yaml" in result.message
    assert result.commands == 0


def test_the_server_is_too_slow_to_activate(node, client):
    server, _, world = node
    assert world.configure()
    assert world.set("allow_slow", False)[0]
    server.faults.write_text("sleep 0.06")
    result = client.run(TASK, timeout_s=1.0)
    assert result.reason == "refused"
    assert "cannot be activated: " in result.message
    assert "ms" in result.message


def test_stopped_by_hand_and_released(node, client):
    _, _, world = node
    run = Running(client, timeout_s=20.0)
    world.until_state("driving")
    client.stop()
    result = run.end()
    assert result.reason == "stopped"
    assert "the service stop was called" in result.message
    assert world.state() == "inactive"
    assert client.run(TASK, timeout_s=5.0).reason == "stopped"  # it stays
    client.reset_stop()
    assert client.run(TASK, timeout_s=0.7).reason == "timeout"


def test_deactivated_by_somebody_else(node, client):
    _, _, world = node
    run = Running(client, timeout_s=20.0)
    world.until_state("driving")
    world.until(lambda: client.status().state == "driving")
    assert world.deactivate()
    result = run.end()
    assert result.reason == "stopped"
    assert "no longer active" in result.message


def test_a_node_that_dies_is_lost(node):
    _, process, world = node
    with PolicyClient(patience_s=2.0, configure_s=5.0) as client:
        run = Running(client, timeout_s=60.0)
        world.until_state("driving")
        process.process.kill()
        result = run.end(15.0)
        assert result.reason == "lost"
        assert "was last heard of" in result.message
        with pytest.raises(UserError, match="says nothing"):
            client.status()


def test_a_node_that_never_was():
    with PolicyClient("nobody", "somewhere", patience_s=0.5) as client:
        for act in (client.run, client.stop, client.reset_stop):
            with pytest.raises(UserError, match="the node /somewhere/nobody does not exist"):
                act()
        with pytest.raises(UserError, match="/somewhere/nobody says nothing"):
            client.status()
        with pytest.raises(UserError, match="above 0"):
            client.run(timeout_s=float("nan"))


SCRIPT = """
import sys
if "init" in sys.argv:
    import rclpy
    rclpy.init()  # its signal handlers end every context of the process
from d4_nodes.client import PolicyClient
with PolicyClient(patience_s=5.0, configure_s=20.0) as client:
    client.run("toy", timeout_s=60)
"""


@pytest.mark.parametrize("arguments", [[], ["init"]])
def test_ctrl_c_stops_the_robot_first(node, client, arguments):
    _, _, world = node
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    world.until_state("driving", 20)
    since = time.time_ns()
    script.send_signal(signal.SIGINT)
    _, said = script.communicate(timeout=20)
    print(said)
    assert script.returncode != 0
    assert "KeyboardInterrupt" in said
    assert world.zero_after_s(since) < 3.0
    assert world.state() == "inactive"
    assert client.run(TASK, timeout_s=5.0).reason == "stopped"
