"""The example policies of SROS2 permit what the nodes create for the robot "yard", and nothing else."""

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from d4_datasets.contract import Contract

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "security"
YARD = ROOT / "sim" / "d4_sim" / "yard.yaml"
SERVER = ROOT / "tests" / "nodes" / "scripted_server.py"
NODES = {"policy": "policy_node", "guard": "guard_node", "tokenizer": "tokenizer_node"}  # with a life cycle
# what a tokenizer's server says of itself, without one behind it
TOKENIZER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from d4_datasets.contract import Contract
from d4_nodes import memory
from d4_nodes.server import serve

contract = Contract.load(sys.argv[1])
card = {"weights": "w0", "tokens": 2, "channels": 2}
fields = memory.latents_layout(contract, 2, 2)
brain = SimpleNamespace(
    kind="tokenizer", contract=contract, card=card, fields=fields, decide=lambda shared: None
)
serve(brain, Path(sys.argv[2]))
"""
SINCE_JAZZY = "get_type_description"
RULES = {
    "publish": ("topics", "get_publisher_names_and_types_by_node"),
    "subscribe": ("topics", "get_subscriber_names_and_types_by_node"),
    "reply": ("services", "get_service_names_and_types_by_node"),
    "request": ("services", "get_client_names_and_types_by_node"),
}
# what SROS2 makes of the right to an action: (rule, names below the action's)
ACTIONS = {
    "execute": (("publish", ("feedback", "status")), ("reply", ("send_goal", "cancel_goal", "get_result"))),
    "call": (("subscribe", ("feedback", "status")), ("request", ("send_goal", "cancel_goal", "get_result"))),
}


def permitted(file: str) -> dict[str, set[str]]:
    """rule -> full names that a policy file allows; checks its shape on the way."""
    root = ElementTree.parse(FOLDER / f"{file}.policy.xml").getroot()
    assert (root.tag, root.attrib) == ("policy", {"version": "0.2.0"})
    [enclave] = root.findall("enclaves/enclave")
    [profile] = enclave.findall("profiles/profile")
    prefix = profile.attrib["ns"].rstrip("/") + "/"
    names: dict[str, set[str]] = {rule: set() for rule in RULES}
    for group in profile:
        [(rule, value)] = group.attrib.items()
        assert (group.tag, value) == ("actions" if rule in ACTIONS else RULES[rule][0], "ALLOW")
        for entry in group:
            assert entry.tag == group.tag[:-1]
            name = (entry.text or "").replace("~", prefix + profile.attrib["node"])
            name = name if name.startswith("/") else prefix + name
            for part, ends in ACTIONS.get(rule, ((rule, None),)):
                names[part] |= {name} if ends is None else {f"{name}/_action/{end}" for end in ends}
    return names


def test_only_policy_and_guard_may_command_the_robot() -> None:
    commands = {channel.topic for channel in Contract.load(YARD).actions}
    for path in FOLDER.glob("*.policy.xml"):
        file = path.name.split(".")[0]
        allowed = permitted(file)
        assert (allowed["publish"] & commands == commands) == (file in ("policy_node", "guard_node"))
        assert not any("*" in name for rule in ("publish", "subscribe", "request") for name in allowed[rule])


def test_what_the_operator_calls_exists() -> None:
    replied = [permitted(path.name.split(".")[0])["reply"] for path in FOLDER.glob("*_node.policy.xml")]
    assert permitted("operator")["request"] <= set[str]().union(*replied)


def test_the_operator_may_call_what_ros2_lifecycle_calls() -> None:
    """`ros2 lifecycle set` asks for the transitions first, which was refused."""
    calls = ("change_state", "get_state", "get_available_transitions")
    assert {f"/{node}/{call}" for node in NODES for call in calls} <= permitted("operator")["request"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.xml")), ids=lambda path: path.name)
def test_the_files_follow_the_schema_of_sros2(path) -> None:
    policy = pytest.importorskip("sros2.policy")
    policy.load_policy(path)


@pytest.fixture
def looker():
    """A node that looks at the others."""
    rclpy = pytest.importorskip("rclpy")
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("looker", context=context)
    yield node
    node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.fixture
def start(tmp_path):
    """Starts processes; ends them."""
    started = []

    def run(*command: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **(environment or {})}, stdout=log, stderr=log
            )
        started.append(process)
        return process

    yield run
    for process in started:
        process.send_signal(signal.SIGINT)
    for process in started:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    if started:
        print((tmp_path / "log").read_text())


def graph(looker, node: str) -> dict[str, set[str]]:
    """rule -> names that a node has."""
    if node not in looker.get_node_names():
        return {rule: set() for rule in RULES}
    return {rule: {name for name, _ in getattr(looker, get)(node, "/")} for rule, (_, get) in RULES.items()}


def until_equal(looker, node: str, wanted: dict[str, set[str]]) -> None:
    """Wait until a node has what its policy permits; fails with the difference."""
    end = time.monotonic() + 15
    while (found := _old(graph(looker, node))) != _old(wanted):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    assert found == _old(wanted)


def _old(names: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without what Humble does not have yet."""
    return {rule: {name for name in all_ if not name.endswith(SINCE_JAZZY)} for rule, all_ in names.items()}


@pytest.mark.ros
@pytest.mark.parametrize("name", NODES)
def test_a_node_creates_what_its_policy_permits(start, looker, tmp_path, name) -> None:
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState
    from rclpy.executors import SingleThreadedExecutor

    command = [sys.executable, "-m", f"d4_nodes.ros.{NODES[name]}", "--ros-args", "-p", f"contract:={YARD}"]
    server = {"policy": (str(SERVER),), "tokenizer": ("-c", TOKENIZER)}.get(name)
    if server is not None:
        python, socket = os.environ.get("D4_PYTHON", sys.executable), str(tmp_path / "socket")
        start(python, *server, str(YARD), socket, str(tmp_path / "fault"), environment={"PYTHONPATH": ""})
        command += ["-p", f"socket:={socket}"]
    start(*command)
    client = looker.create_client(ChangeState, f"/{name}/change_state")
    assert client.wait_for_service(20)
    future = client.call_async(ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE)))
    executor = SingleThreadedExecutor(context=looker.context)
    executor.add_node(looker)
    executor.spin_until_future_complete(future, 20)
    assert future.result().success
    until_equal(looker, name, permitted(NODES[name]))


@pytest.mark.ros
def test_the_simulated_robot_creates_what_its_policy_permits(start, looker) -> None:
    python = os.environ.get("D4_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import mujoco"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs MuJoCo in the Python that D4_PYTHON names")
    start(python, "-m", "d4_nodes.ros.sim_node")
    until_equal(looker, "sim", permitted("sim_node"))


@pytest.mark.ros
def test_the_training_node_creates_what_its_policy_permits(start, looker) -> None:
    start(sys.executable, "-m", "d4_nodes.ros.training_node")
    until_equal(looker, "training", permitted("training_node"))


@pytest.mark.ros
def test_the_client_calls_what_the_operator_may(looker) -> None:
    from d4_nodes.client import PolicyClient

    allowed = permitted("operator")
    with PolicyClient() as client:
        time.sleep(1.0)
        found = graph(looker, client._node.get_name())
    assert found["request"]
    assert found["request"] <= allowed["request"]
    assert found["subscribe"] <= allowed["subscribe"]
    assert found["publish"] <= allowed["publish"]
    own = [pattern.rstrip("*") for pattern in allowed["reply"]]
    assert all(any(name.startswith(start) for start in own) for name in found["reply"])
