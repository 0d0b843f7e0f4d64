"""The guard node over real topics: another policy in front, a robot behind, and what can go wrong."""

import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytestmark = pytest.mark.ros

from d4_interfaces.msg import PolicyStatus  # noqa: E402
from geometry_msgs.msg import Twist  # noqa: E402
from policy_rig import PERIOD_S, ROBOT, SLACK_S, TWO_PERIODS_S, PolicyProcess, World  # noqa: E402
from sensor_msgs.msg import Image, Joy  # noqa: E402
from std_msgs.msg import Bool, Empty, Float64MultiArray  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from d4_nodes.ros import qos  # noqa: E402


class GuardProcess(PolicyProcess):
    """The guard node."""

    def __init__(self, folder, *arguments: str) -> None:
        self.folder, self.log = folder, folder / f"guard-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "d4_nodes.ros.guard_node", "--ros-args", "-p", f"contract:={ROBOT}"]
        command += ["-p", f"report_folder:={folder / 'reports'}", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)


class Policy:
    """Another policy: a command every period, both channels or one."""

    def __init__(self, world: World, prefix: str = "policy") -> None:
        self.base = world.node.create_publisher(Twist, f"{prefix}/cmd_vel", qos.EVENT)
        self.arm = world.node.create_publisher(Float64MultiArray, f"{prefix}/arm", qos.sensor())
        self.x, self.pause, self.only_base = 0.25, False, False
        self._world, self._ended = world, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            due += PERIOD_S
            if self.pause:
                continue
            twist = Twist()
            twist.linear.x, twist.linear.y = self.x, 9.0
            self.base.publish(twist)
            if not self.only_base:
                self.arm.publish(Float64MultiArray(data=[0.5]))


@pytest.fixture
def make(tmp_path):
    """Starts a guard, the world around it and a policy in front; ends them."""
    started = []

    def start(*arguments: str, namespace: str = "", simulated: bool = False, prefix: str = "policy"):
        process = GuardProcess(tmp_path, *arguments)
        world = World(namespace, node="guard", simulated=simulated)
        policy = Policy(world, prefix)
        started.append((process, world, policy))
        return process, world, policy

    yield start
    for process, world, policy in started:
        policy.stop()
        world.close()
        if process.process.poll() is None:
            process.end(signal.SIGKILL)
        print(process.said())


@pytest.fixture
def driving(make):
    """A guard that passes commands on."""
    process, world, policy = make()
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    return process, world, policy


def newest(world: World) -> float:
    return world.twists[-1][1]


def test_commands_pass_and_the_safety_action_is_last(driving):
    process, world, _ = driving
    first = len(world.twists)
    time.sleep(1.0)
    assert len(world.twists) - first == pytest.approx(20, abs=3)
    assert {x for _, x, _ in world.twists[first:]} == {0.25}
    assert world.arms[-1][1] == 0.5
    assert world.deactivate()
    time.sleep(0.2)
    assert newest(world) == 0.0
    count = len(world.twists)
    time.sleep(0.2)
    assert len(world.twists) == count  # inactive: it neither passes on nor speaks
    [path] = process.reports()
    report = json.loads(path.read_text())
    assert report["counts"]["commands"] > 20
    assert report["stages_ms"]["relay"]["p50"] < 5
    assert (report["metadata"]["shadow"], report["metadata"]["guard"]) == (False, True)
    assert world.activate()
    world.until_state("driving")


def test_silence_bad_numbers_and_half_commands(driving):
    _, world, policy = driving
    since = time.time_ns()
    policy.pause = True
    assert world.zero_after_s(since) < TWO_PERIODS_S + PERIOD_S + SLACK_S  # one may just have been sent
    status = world.until_state("no_command")
    assert "the last command for" in status.reason
    first = len(world.twists)
    time.sleep(0.6)
    gaps = np.diff([t for t, _, _ in world.twists[first:]]) / 1e9
    assert len(gaps) > 8
    assert gaps.max() < TWO_PERIODS_S + SLACK_S
    policy.pause = False
    world.until_state("driving")
    policy.x = float("nan")
    assert world.until_state("not_finite").reason.startswith("the command is [nan")
    assert newest(world) == 0.0
    policy.x = 50.0
    world.until_state("driving")
    world.until(lambda: newest(world) == 1.0)  # the contract's limit
    policy.only_base = True
    assert "/arm" in world.until_state("no_command").reason


def test_stale_frozen_and_wrongly_stamped_pictures(driving):
    _, world, _ = driving
    world.pause = True
    since = time.time_ns()
    assert world.zero_after_s(since) < 0.075 + PERIOD_S + SLACK_S
    assert "the contract allows 75 ms" in world.until_state("stale").reason
    world.pause = False
    world.until_state("driving")
    world.freeze = True
    assert "same picture" in world.until_state("frozen").reason
    world.freeze = False
    world.until_state("driving")
    world.offset_ns = 10**9
    assert "ahead of the clock" in world.until_state("stale").reason


def test_emergency_stop_by_topic_and_service(driving):
    _, world, _ = driving
    since = time.time_ns()
    world.stop.publish(Bool(data=True))
    assert world.zero_after_s(since) < PERIOD_S + SLACK_S
    world.until_state("emergency_stop")
    assert world.deactivate()
    assert world.activate()
    world.until_state("emergency_stop")  # it stays
    assert world.call(Trigger, "guard/reset_stop", Trigger.Request()).success
    world.until_state("driving")
    assert world.call(Trigger, "guard/stop", Trigger.Request()).success
    assert world.until_state("emergency_stop").reason == "the service stop was called"


def test_the_emergency_stop_is_heard_from_every_kind_of_publisher(driving):
    """A best-effort button was never heard, and nothing said so."""
    _, world, _ = driving
    for number, profile in enumerate((qos.sensor(), qos.EVENT, qos.LATCHED)):
        button = world.node.create_publisher(Bool, "emergency_stop", profile)
        world.until(lambda button=button: button.get_subscription_count() > 0)
        heard = f"heard from {number + 2} publishers"  # the world has one, too
        world.until(lambda heard=heard: world.diagnostics.get("guard: emergency stop") == (0, heard), 5)
        button.publish(Bool(data=True))
        world.until_state("emergency_stop")
        assert world.call(Trigger, "guard/reset_stop", Trigger.Request()).success
        world.until_state("driving")


def test_a_stop_is_not_lost_among_others(driving):
    """The newest message alone does not count: nine more come before anybody looks."""
    _, world, _ = driving
    for _ in range(10):
        for i in range(10):
            world.stop.publish(Bool(data=i == 0))
        world.until_state("emergency_stop")
        assert world.call(Trigger, "guard/reset_stop", Trigger.Request()).success
        world.until_state("driving")


def test_a_stop_that_was_latched_before_the_node_began(make):
    before = World(node="guard")
    before.pause = True
    try:
        button = before.node.create_publisher(Bool, "emergency_stop", qos.LATCHED)
        button.publish(Bool(data=True))
        _, world, _ = make()
        assert world.configure()
        assert world.activate()
        world.until_state("emergency_stop")
    finally:
        before.close()


def test_a_stop_of_another_type_is_said(driving):
    process, world, _ = driving
    other = World(node="guard")
    other.pause = True
    try:
        other.node.create_publisher(Empty, "emergency_stop", qos.EVENT)
        text = "1 of 3 publishers cannot be heard: /world publishes std_msgs/msg/Empty, not std_msgs/msg/Bool"
        world.until(lambda: world.diagnostics.get("guard: emergency stop") == (1, text), 5)
        world.until(lambda: text in process.said(), 5)
    finally:
        other.close()


def test_a_process_that_falls_silent(make):
    """The rule was there, and no parameter to use it."""
    process, world, _ = make("-p", "alive_topic:=policy/status", "-p", "watchdog_ms:=400.0")
    assert world.configure()
    assert world.activate()
    reason = world.until_state("watchdog").reason  # it has never spoken
    assert reason.startswith("the process behind policy/status has shown no life for")
    status = world.node.create_publisher(PolicyStatus, "policy/status", qos.LATCHED)
    timer = world.node.create_timer(0.1, lambda: status.publish(PolicyStatus(state="driving")))
    world.until_state("driving")
    time.sleep(1.0)
    assert world.status[-1].state != "watchdog"
    since = time.time_ns()
    timer.cancel()
    assert world.zero_after_s(since) < 0.4 + TWO_PERIODS_S + SLACK_S
    world.until_state("watchdog")
    assert world.deactivate()
    [path] = process.reports()
    assert json.loads(path.read_text())["guard"]["watchdog"]["count"] > 0


def test_dead_man_switch(make):
    _, world, _ = make("-p", "dead_man_button:=4")
    assert world.configure()
    assert world.activate()
    world.until_state("dead_man")
    world.joy.publish(Joy(buttons=[0, 0, 0, 0, 1]))
    world.until_state("driving")
    assert "last seen" in world.until_state("dead_man").reason  # nothing more was heard of it


def test_shadow_mode(make):
    _, world, policy = make("-p", "shadow:=true")
    assert world.configure()
    assert world.activate()
    assert world.until_state("driving").shadow
    policy.x = float("inf")
    world.until_state("not_finite")
    assert not world.twists
    assert world.deactivate()
    time.sleep(0.1)
    assert not world.twists


def test_a_report_that_could_not_be_written_is_refused_before_the_robot_moves(make):
    """A folder from a file of parameters was not looked at, and the report of the run was lost."""
    _, world, _ = make("-p", "report_folder:=/proc/none")
    assert not world.configure()
    world.until(lambda: world.status and "nothing can be written" in world.status[-1].reason)


def test_what_it_refuses(make):
    process, world, _ = make("-p", "input_prefix:=/")
    assert not world.configure()
    world.until(lambda: world.status and "its own commands" in world.status[-1].reason)
    assert world.set("input_prefix", "policy")[0]
    assert world.configure()
    assert world.activate()
    ok, reason = world.set("shadow", True)
    assert not ok
    assert "while the node is active" in reason
    assert "Traceback" not in process.said()


def test_namespace_prefix_and_who_goes_past_it(make):
    process, world, _ = make(
        "-p", "input_prefix:=raw", "-r", "__ns:=/robot1", namespace="robot1", prefix="raw"
    )
    past = world.node.create_publisher(Twist, "cmd_vel", qos.EVENT)
    assert world.configure()
    world.until(lambda: past.get_subscription_count() > 0)
    assert world.activate()
    world.until_state("driving")
    world.until(lambda: "past the guard" in process.said())


def test_two_that_command_one_robot_are_refused_unless_allowed(driving, tmp_path):
    """They were warned of. One that waits, or only looks, is no rival, and the first is not disturbed."""
    _, world, _ = driving
    other = GuardProcess(tmp_path, "-r", "__node:=second", "-p", "input_prefix:=raw")
    try:
        world.target = "second"
        assert world.configure()
        assert not world.activate()
        world.until(lambda: "/guard commands /cmd_vel, /arm already" in other.said())  # logged by a thread
        world.until_state("driving")
        assert world.set("allow_rivals", True)[0]
        assert world.activate()
        assert world.deactivate()
        assert world.set("allow_rivals", False)[0]
        world.target = "guard"
        assert world.deactivate()
        world.target = "second"
        assert world.activate()  # the first is there, and waits
    finally:
        other.end(signal.SIGKILL)


def test_diagnostics(driving):
    _, world, policy = driving
    names = {f"guard: {name}" for name in ("commands", "eye", "joints", "guard")}
    world.until(lambda: names <= set(world.diagnostics), 5)
    world.until(lambda: world.diagnostics["guard: commands"][0] == 0, 5)
    policy.pause = True
    world.until(lambda: world.diagnostics["guard: commands"][0] == 2, 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_safety_action(driving, number):
    process, world, _ = driving
    assert process.end(number) == 0
    time.sleep(0.1)
    assert newest(world) == 0.0
    assert process.reports()


def test_by_the_clock_of_a_simulation(make):
    process, world, policy = make("-p", "use_sim_time:=true", simulated=True)
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    since = time.time_ns()
    world.offset_ns -= 3600 * 10**9  # the simulation begins again
    assert world.zero_after_s(since) < TWO_PERIODS_S + SLACK_S
    world.until(lambda: "safety action (no_command): the clock jumped" in process.said())
    rested = len(world.twists)
    world.until(lambda: any(x > 0 for _, x, _ in world.twists[rested:]))
    policy.pause = True
    world.until_state("no_command")
    policy.pause = False
    world.until_state("driving")
    assert world.deactivate()
    [path] = process.reports()
    assert json.loads(path.read_text())["reasons"]["the clock jumped"] == 1


def test_the_emergency_stop_outlives_cleanup_and_is_heard_before_configuring(make):
    """The policy node kept a stop, this one forgot it when it was cleaned up."""
    _, world, _ = make()
    assert world.state() == "unconfigured"
    world.until(lambda: world.stop.get_subscription_count() > 0)
    world.stop.publish(Bool(data=True))
    time.sleep(0.3)
    for _ in range(2):
        assert world.configure()
        assert world.activate()
        world.until_state("emergency_stop")
        assert all(x == 0 for _, x, _ in world.twists)
        assert world.deactivate()
        assert world.cleanup()
    assert world.call(Trigger, "guard/reset_stop", Trigger.Request()).success
    assert world.configure()
    assert world.activate()
    world.until_state("driving")


def test_a_camera_that_stops_and_then_dies_is_told_of_once_each(make):
    """Every missed deadline was a warning of its own."""
    process, world, _ = make("-p", "observation_deadline_ms:=300.0")
    world.pause = True
    time.sleep(TWO_PERIODS_S)
    world.node.destroy_publisher(world.eye)  # it offers no deadline
    world.eye = world.node.create_publisher(Image, "eye", qos.sensor(deadline_ms=300))
    assert world.configure()
    world.until(lambda: world.eye.get_subscription_count() > 0)
    world.pause = False
    time.sleep(0.5)
    assert "/eye: deadline missed" not in process.said()
    world.pause = True
    world.until(lambda: "/eye: deadline missed" in process.said(), 5)
    time.sleep(2.0)  # six deadlines
    assert process.said().count("/eye: deadline missed") == 1
    world.node.destroy_publisher(world.eye)
    world.until(lambda: "/eye: a publisher shows no life any more, 0 left" in process.said(), 5)
    time.sleep(0.5)
    assert process.said().count("shows no life any more") == 1


def test_what_the_system_refuses_is_a_warning(make):
    """It was logged as information, which log_level:=warn hides."""
    process, world, _ = make("-p", "cores:=[4000]", "--log-level", "warn")
    assert world.configure()
    assert world.activate()
    world.until(lambda: world.diagnostics.get("guard: real time", (0, ""))[0] == 1, 5)
    text = world.diagnostics["guard: real time"][1]
    assert text.startswith("cannot run on cores 4000 alone")
    world.until(lambda: f"[guard]: {text}" in process.said())
    assert "[INFO]" not in process.said()
    assert world.deactivate()
    report = json.loads(process.reports()[0].read_text())
    assert report["metadata"]["realtime_refused"] == [text]
