"""The policy node over real topics: lifecycle, commands, services, parameters, faults."""

import json
import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytestmark = pytest.mark.ros

from d4_interfaces.srv import SetTask  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState  # noqa: E402
from policy_rig import ROBOT, SLACK_S, TWO_PERIODS_S, PolicyProcess, Server, World  # noqa: E402
from sensor_msgs.msg import JointState, Joy  # noqa: E402
from std_msgs.msg import Bool  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from d4_nodes.ros import qos  # noqa: E402


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def make(tmp_path, server):
    """Starts a policy node and the world around it; ends both."""
    started = []

    def start(*arguments: str, namespace: str = "", simulated: bool = False):
        process = PolicyProcess(tmp_path, *arguments)
        world = World(namespace, simulated=simulated)
        started.append((process, world))
        return process, world

    yield start
    for process, world in started:
        world.close()
        if process.process.poll() is None:
            process.end(signal.SIGKILL)
        print(process.said())


@pytest.fixture
def driving(make):
    """A node that drives."""
    process, world = make()
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    return process, world


def test_from_unconfigured_to_driving_and_back_twice(make):
    process, world = make()
    assert world.state() == "unconfigured"
    for round_ in range(2):
        assert world.configure()
        assert world.state() == "inactive"
        assert world.activate()
        world.until_state("driving")
        first = len(world.twists)
        time.sleep(1.0)
        commands = world.twists[first:]
        assert len(commands) == pytest.approx(20, abs=3)
        assert all(x > 0 for _, x, _ in commands)  # the script counts up
        assert world.arms[-1][1] > 0
        assert world.deactivate()
        time.sleep(0.2)
        assert world.twists[-1][1:] == (0.0, 0.0)  # safety: zeros
        assert world.arms[-1][1] > 0  # safety: hold
        count = len(world.twists)
        time.sleep(0.2)
        assert len(world.twists) == count
        report = json.loads(process.reports()[round_].read_text())
        assert report["counts"]["commands"] >= 20
        assert report["NUM_MISSED_FRAMES"] <= 3
        assert report["metadata"]["weights"] == "w0"
        assert (report["metadata"]["shadow"], report["metadata"]["guard"]) == (False, True)
        assert world.cleanup()
    assert process.end() == 0


def test_interrupt_sends_the_safety_action_last_and_writes_the_report(driving):
    process, world = driving
    assert process.end(signal.SIGINT) == 0
    time.sleep(0.2)
    assert world.twists[-1][1:] == (0.0, 0.0)
    assert len(process.reports()) == 1
    assert "commands at" in process.said()


def test_emergency_stop_by_topic_and_service(driving):
    _, world = driving
    since = time.time_ns()
    world.stop.publish(Bool(data=True))
    assert world.zero_after_s(since) < TWO_PERIODS_S + SLACK_S
    assert "emergency_stop" in world.until_state("emergency_stop").state
    world.stop.publish(Bool(data=False))  # a released button does not release the stop
    time.sleep(0.3)
    assert world.status[-1].state == "emergency_stop"
    assert world.call(Trigger, "policy/reset_stop", Trigger.Request()).success
    world.until_state("driving")
    since = time.time_ns()
    assert world.call(Trigger, "policy/stop", Trigger.Request()).success
    assert world.zero_after_s(since) < TWO_PERIODS_S + SLACK_S
    world.until(lambda: world.diagnostics.get("policy: guard", (0,))[0] == 2)


def test_a_stop_before_activation_holds(make):
    _, world = make()
    assert world.configure()
    assert world.call(Trigger, "policy/stop", Trigger.Request()).success
    assert world.activate()
    world.until_state("emergency_stop")
    assert all(x == 0 for _, x, _ in world.twists)


def test_server_killed_and_started_again(driving, server, tmp_path):
    _, world = driving
    since = time.time_ns()
    server.kill()
    assert world.zero_after_s(since) < TWO_PERIODS_S + SLACK_S
    world.until(lambda: world.status[-1].state in ("fault", "watchdog"))
    again = Server(tmp_path)
    try:
        world.until_state("driving")
    finally:
        again.kill()


def test_another_policy_after_a_restart_is_refused(driving, server, tmp_path):
    """The checkpoint on disk was replaced, and the server came back with it: nobody measured that one."""
    _, world = driving
    server.kill()
    other = Server(tmp_path, weights="w1")
    try:
        world.until(lambda: "another policy" in world.status[-1].reason)
        since = len(world.twists)
        time.sleep(0.5)
        assert all(x == 0 for _, x, _ in world.twists[since:])
        assert world.deactivate()
        assert world.activate()  # asked by name, measured anew
        world.until_state("driving")
    finally:
        other.kill()


@pytest.mark.parametrize("fault", ["nan", "raise", "sleep 0.3"])
def test_model_faults(driving, server, fault):
    _, world = driving
    since = time.time_ns()
    server.faults.write_text(fault)
    # the next request has it, at most a period later; a slow one is covered by the plan for one tick more
    assert world.zero_after_s(since) < 2 * TWO_PERIODS_S + SLACK_S
    if fault == "nan":  # for one tick it is not_finite, then a fault that says the same
        world.until(lambda: world.status[-1].state in ("not_finite", "fault"))
        assert "nan" in world.status[-1].reason
    else:
        assert world.until_state("fault").reason
    server.faults.unlink()
    world.until_state("driving")
    world.until(lambda: world.twists[-1][1] > 0)


def test_commands_beyond_the_limits_are_cut(driving, server):
    process, world = driving
    server.faults.write_text("huge")
    world.until(lambda: world.twists[-1][1:] == (1.0, 2.0))
    assert all(abs(x) <= 1.0 and abs(z) <= 2.0 for _, x, z in world.twists)
    assert world.deactivate()
    [path] = process.reports()
    assert json.loads(path.read_text())["guard"]["limit"]["count"] > 0


def test_a_server_that_stands_still_and_goes_on(driving, server):
    _, world = driving
    since = time.time_ns()
    server.kill(signal.SIGSTOP)
    assert world.zero_after_s(since) < 2 * TWO_PERIODS_S + SLACK_S
    assert "no life" in world.until_state("watchdog").reason
    server.kill(signal.SIGCONT)
    world.until_state("driving")


def test_deactivated_while_the_server_computes(driving, server):
    process, world = driving
    server.faults.write_text("sleep 3")
    world.until_state("fault")  # the request whose answer is late is still at the server
    server.faults.unlink()
    began = time.monotonic()
    assert world.deactivate()
    assert time.monotonic() - began < 1.5
    time.sleep(0.2)
    assert world.twists[-1][1:] == (0.0, 0.0)
    count = len(world.twists)
    time.sleep(0.2)
    assert len(world.twists) == count
    assert len(process.reports()) == 1
    assert world.activate()  # once the server has finished what nobody waits for any more
    world.until_state("driving")


def test_a_node_that_dies_leaves_the_server_to_the_next(driving, server, tmp_path):
    """Killed with a request at the server, which then has nobody to answer."""
    process, world = driving
    server.faults.write_text("sleep 1")
    world.until_state("fault")
    process.end(signal.SIGKILL)
    server.faults.unlink()
    second, world_of_second = PolicyProcess(tmp_path, "-r", "__node:=second"), World(node="second")
    try:
        world.pause = True  # one camera is enough
        assert world_of_second.configure(), second.said()
        assert world_of_second.activate(), second.said()
        world_of_second.until_state("driving")
    finally:
        world_of_second.close()
        second.end(signal.SIGKILL)


@pytest.mark.parametrize("fault", ["pause", "freeze", "encoding", "size", "ahead", "back"])
def test_camera_faults(driving, fault):
    _, world = driving
    changes = {
        "pause": ("pause", True), "freeze": ("freeze", True), "encoding": ("encoding", "nonsense"),
        "size": ("size", (0, 0)), "ahead": ("offset_ns", 500_000_000), "back": ("offset_ns", -500_000_000),
    }  # fmt: skip
    name, value = changes[fault]
    before = getattr(world, name)
    since = time.time_ns()
    setattr(world, name, value)
    # a frozen camera is known after two repeats, a stale one after its tolerance of 75 ms
    assert world.zero_after_s(since) < TWO_PERIODS_S + 0.1 + SLACK_S
    world.until(lambda: world.status[-1].state in ("stale", "frozen", "fault"))
    assert world.status[-1].reason
    setattr(world, name, before)
    world.until_state("driving")


def test_contract_mismatch_is_refused_with_the_reason(make, tmp_path):
    from policy_rig import ROBOT

    other = tmp_path / "other.yaml"
    other.write_text(ROBOT.read_text().replace("rate_hz: 20", "rate_hz: 21"))
    process, world = make("-p", f"contract:={other}")
    assert not world.configure()
    assert world.state() == "unconfigured"
    world.until(lambda: world.status and "contract" in world.status[-1].reason)
    assert "Traceback" not in process.said()


def test_a_second_node_of_the_same_name_does_not_drive(make, tmp_path):
    _, world = make()
    assert world.configure()
    second = PolicyProcess(tmp_path)
    try:
        world.until(lambda: world.node.get_node_names().count("policy") == 2)
        time.sleep(1.0)  # until they know of each other, too
        assert not world.activate()  # whichever of the two has answered
        sentence = "another node is called /policy too: start one of them only"
        world.until(lambda: any(s.reason == sentence for s in world.status))
        assert not any(x for _, x, _ in world.twists)
    finally:
        second.end(signal.SIGKILL)


def test_tasks_and_parameters(driving):
    _, world = driving
    answer = world.call(SetTask, "policy/set_task", SetTask.Request(task="fly"))
    assert not answer.success
    assert "toy" in answer.message
    assert world.call(SetTask, "policy/set_task", SetTask.Request(task="toy")).success
    assert world.set("task", "fly") == (False, "task 'fly' is not among the tasks of the contract: toy")
    refusal = "report_folder: nothing can be written in /proc/none"
    assert world.set("report_folder", "/proc/none") == (False, refusal)
    good, reason = world.set("max_misses", 3)
    assert not good
    assert "active" in reason
    assert world.deactivate()
    assert world.set("max_misses", 3)[0]
    assert not world.set("max_misses", 0)[0]  # out of its range
    assert not world.set("watchdog_ms", -1.0)[0]


def test_dead_man(make):
    _, world = make("-p", "dead_man_button:=1")
    assert world.configure()
    assert world.activate()
    world.until_state("dead_man")
    assert all(x == 0 for _, x, _ in world.twists)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        world.joy.publish(Joy(buttons=[0, 1]))
        time.sleep(0.05)
    assert world.twists[-1][1] > 0
    since = time.time_ns()
    world.joy.publish(Joy(buttons=[0, 0]))
    assert world.zero_after_s(since) < TWO_PERIODS_S + SLACK_S


def test_shadow_mode_sends_nothing_and_counts(make):
    process, world = make("-p", "shadow:=true", "-p", "guard:=false")
    assert world.configure()
    assert world.activate()
    status = world.until_state("driving")
    assert status.shadow
    world.until(lambda: world.status[-1].commands > 5)
    assert not world.twists
    assert world.deactivate()
    [path] = process.reports()
    metadata = json.loads(path.read_text())["metadata"]
    assert (metadata["shadow"], metadata["guard"]) == (True, False)


def test_commands_between_ticks(make):
    _, world = make("-p", "commands_per_tick:=3")
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    first = len(world.twists)
    time.sleep(1.0)
    commands = world.twists[first:]
    assert len(commands) == pytest.approx(60, abs=9)
    values = np.array([x for _, x, _ in commands])
    assert (np.diff(values) >= -1e-9).mean() > 0.8  # rises evenly, as the script's plan does


def test_namespace_and_remapping(make):
    _, world = make("-r", "__ns:=/left", "-r", "cmd_vel:=cmd_vel_raw", namespace="/left")
    heard = []
    from geometry_msgs.msg import Twist

    world.node.create_subscription(Twist, "cmd_vel_raw", heard.append, 10)
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    world.until(lambda: len(heard) > 3)
    assert not world.twists


def test_simulated_time_that_jumps_back(make):
    process, world = make("-p", "use_sim_time:=true", simulated=True)
    world.offset_ns = 1_000_000_000_000 - time.time_ns()
    time.sleep(0.5)
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    for number, seconds in enumerate((-30, 60)):
        world.until(lambda: world.twists[-1][1] > 0)
        since = time.time_ns()
        world.offset_ns += seconds * 10**9
        assert world.zero_after_s(since) < TWO_PERIODS_S + SLACK_S
        world.until(lambda number=number: process.said().count("the clock jumped by") == number + 1)
        rested = len(world.twists)
        world.until(lambda rested=rested: any(x > 0 for _, x, _ in world.twists[rested:]))
    assert world.deactivate()
    [path] = process.reports()
    assert json.loads(path.read_text())["reasons"]["the clock jumped"] == 2


def test_slow_server_is_refused_unless_allowed(make, server):
    server.faults.write_text("sleep 0.04")
    process, world = make()
    assert world.configure()
    assert not world.activate()
    world.until(lambda: "too few" in world.status[-1].reason)
    assert world.state() == "inactive"
    assert world.set("allow_slow", True)[0]
    assert world.activate()
    world.until(lambda: world.status[-1].allow_slow)
    assert world.deactivate()
    slow = json.loads(process.reports()[-1].read_text())["metadata"]
    server.faults.unlink()
    assert world.activate()
    world.until_state("driving")
    assert not world.status[-1].allow_slow  # it need not
    assert world.deactivate()
    fast = json.loads(process.reports()[-1].read_text())["metadata"]
    assert slow["allow_slow"]
    assert not fast["allow_slow"]
    assert slow["decision_ms"]["p99"] > slow["decision_ms"]["budget"]
    assert fast["decision_ms"]["p99"] <= fast["decision_ms"]["budget"]


def test_no_server_is_one_sentence(make, server):
    server.kill()
    process, world = make("-p", "server_wait_s:=1.0")
    assert not world.configure()
    world.until(lambda: world.status and "no inference server listens" in world.status[-1].reason)
    assert "Traceback" not in process.said()


def test_quality_of_service_that_does_not_fit_is_said(make):
    process, world = make("-p", "qos_overrides./eye.subscription.reliability:=reliable")
    assert world.configure()
    world.until(lambda: "does not offer the quality of service" in process.said())
    assert "reliability" in process.said()


def test_nothing_is_left_of_a_crash(make, server, tmp_path):
    """Shared memory has no name; a socket file that nobody listens on gives way to the next server."""
    process, world = make()
    before = set(os.listdir("/dev/shm"))
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    server.kill()
    process.end(signal.SIGKILL)
    assert set(os.listdir("/dev/shm")) - before == set()
    assert server.socket.exists()
    again, second = Server(tmp_path), PolicyProcess(tmp_path, "-r", "__node:=second")
    world = World(node="second")
    try:
        assert world.configure(), second.said()
    finally:
        world.close()
        second.end()
        again.kill()


def test_a_transition_that_is_none_does_not_end_the_node(make):
    """A second launch configured the node of the first again, and its executor died of that."""
    _, world = make()
    assert world.configure()
    assert world.activate()
    world.until_state("driving")
    assert not world.configure()  # it is answered, too
    assert world.call(Trigger, "policy/stop", Trigger.Request()).success
    world.until_state("emergency_stop")


def test_interrupt_while_waiting_for_the_server_ends_at_once(make, server):
    server.kill()
    process, world = make("-p", "server_wait_s:=60.0")
    client = world.node.create_client(ChangeState, "policy/change_state")
    assert client.wait_for_service(20.0)
    client.call_async(ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE)))
    time.sleep(0.5)
    began = time.monotonic()
    process.end(signal.SIGINT)
    assert time.monotonic() - began < 3.0


def test_a_whole_number_for_a_double_is_one_sentence(make):
    process, _ = make("-p", "watchdog_ms:=150")
    assert process.process.wait(20) == 2
    assert "error:" in process.said()
    assert "Traceback" not in process.said()


def test_the_emergency_stop_outlives_cleanup_and_is_heard_before_configuring(make):
    _, world = make()
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
    assert world.call(Trigger, "policy/reset_stop", Trigger.Request()).success
    assert world.configure()
    assert world.activate()
    world.until_state("driving")


def test_it_speaks_while_a_simulation_is_paused(make):
    """Status and diagnostics went by the simulation's clock: a paused robot looked like a dead one."""
    _, world = make("-p", "use_sim_time:=true", simulated=True)
    assert world.configure()
    world.simulated = False  # the clock stands
    world.pause = True
    time.sleep(0.3)
    seen = len(world.status)
    world.diagnostics.clear()
    world.until(lambda: len(world.status) > seen + 1, 3)
    world.until(lambda: "policy: commands" in world.diagnostics, 3)
    ok, reason = world.set("use_sim_time", False)
    assert not ok
    assert "when the node starts" in reason


def test_a_vector_that_was_said_once_before_the_node_began(make, server, tmp_path):
    """A latched topic never reached the node: its subscription was a volatile one."""
    contract, text = tmp_path / "latched.yaml", ROBOT.read_text()
    joints = text[text.index("{name: joints") : text.index("actions:")]
    contract.write_text(text.replace(joints, joints.replace(", tolerance_ms: 75", "")))
    server.kill()
    again = Server(tmp_path, robot=contract)
    try:
        _, world = make("-p", f"contract:={contract}")
        world.say_joints = False
        latched = world.node.create_publisher(JointState, "joints", qos.LATCHED)
        latched.publish(world.joint_state(*divmod(world.now(), 10**9)))
        time.sleep(0.3)
        assert world.configure()
        assert world.activate()
        world.until_state("driving")
    finally:
        again.kill()


def test_a_depth_camera(tmp_path):
    """Its pictures were measured without the contract's range, and the node refused to activate."""
    robot = tmp_path / "robot.yaml"
    robot.write_text(ROBOT.read_text().replace("size: [8, 12]", "size: [8, 12], depth_m: [0.1, 4]"))
    server = Server(tmp_path, robot=robot)
    process = PolicyProcess(tmp_path, "-p", f"contract:={robot}")
    world = World()
    world.encoding, world.pixel = "32FC1", 4
    try:
        assert world.configure()
        time.sleep(0.5)  # pictures come
        assert world.activate(), process.said()
        world.until_state("driving")
    finally:
        world.close()
        process.end(signal.SIGKILL)
        server.kill()
        print(process.said())
