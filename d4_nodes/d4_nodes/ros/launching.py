"""What the launch files share: arguments, the inference server, lifecycle nodes that start by themselves."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# for a type checker `launch` is the folder of our launch files
from launch import LaunchDescription, LaunchDescriptionEntity  # type: ignore[attr-defined]
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    Shutdown,
)
from launch.event_handlers import OnProcessExit, OnShutdown
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.ros_adapters import get_ros_node
from launch_ros.utilities import make_namespace_absolute, prefix_namespace
from lifecycle_msgs.msg import Transition

from d4_nodes.launching import switch

_DISCOVERY_S = 1.0  # within which nodes of this network are heard of
Argument = tuple[str, "str | None", str]  # name, default (None: must be given), what it means

_PATHS = {"checkpoint", "run", "contract", "socket", "server_python", "sim_python", "params_file", "out",
          "results"}  # fmt: skip


def python_argument(name: str = "server_python", needs: str = "torch") -> Argument:
    """The interpreter that has d4 installed."""
    default = os.environ.get("D4_PYTHON", "python3")
    return name, default, f"Python that has d4 installed ({needs}); default: $D4_PYTHON, or python3"


SERVER: list[Argument] = [
    python_argument(),
    ("device", "auto", "where the inference server computes: auto, cpu or cuda"),
    ("threads", "", "compute threads of the server; empty: the free cores"),
    ("socket", "", "socket between node and server; empty: one of its own for this launch"),
    ("respawn", "true", "start the inference server again if it ends"),
]
LIFECYCLE: list[Argument] = [
    ("autostart", "true", "configure and activate at once; false: with `ros2 lifecycle set`"),
    ("params_file", "", "YAML file with further parameters of the node"),
    ("namespace", "", "namespace of node and topics"),
    ("use_sim_time", "false", "take the time from /clock"),
    ("log_level", "info", "debug, info, warn or error"),
]


def description(
    arguments: Sequence[Argument], up: Callable[[dict[str, str]], list[LaunchDescriptionEntity]]
) -> LaunchDescription:
    """Declares arguments, and does `up` with what they were set to; in paths `~` is the home."""

    def read(context: Any) -> list[LaunchDescriptionEntity]:
        get = {name: LaunchConfiguration(name).perform(context) for name, _, _ in arguments}
        if "autostart" in get:
            _refuse_twin(context, get["name"], get["namespace"])
        return up({name: os.path.expanduser(v) if name in _PATHS else v for name, v in get.items()})

    declared = [DeclareLaunchArgument(n, default_value=d, description=about) for n, d, about in arguments]
    return LaunchDescription([*declared, OpaqueFunction(function=read)])


def _refuse_twin(context: Any, name: str, namespace: str) -> None:
    """Refuse a lifecycle node of a name that is taken: transitions that are meant for the new one may reach
    the other, and a robot that somebody has deactivated would drive again.
    """
    outer = context.launch_configurations.get("ros_namespace")
    where = make_namespace_absolute(prefix_namespace(outer, namespace) or "/")
    node, until = get_ros_node(context), time.monotonic() + _DISCOVERY_S
    while time.monotonic() < until:
        if (name, where) in node.get_node_names_and_namespaces():
            full = f"{where.rstrip('/')}/{name}"
            raise RuntimeError(
                f"a node {full} runs already, or was killed a moment ago: end it, wait ten seconds, or "
                "choose another namespace or name"
            )
        time.sleep(0.05)


def contract_of(folder: str, *phases: str) -> str:
    """The contract of a run, of the first of these phases that it has, or of a checkpoint folder itself."""
    for place in (*(os.path.join(folder, phase) for phase in phases), folder):
        path = os.path.join(place, "contract.yaml")
        if os.path.exists(path):
            return path
    raise RuntimeError(
        f"{folder} holds no checkpoint of phase {' or '.join(phases)}: train one with d4-train"
    )


def interpreter(path: str, name: str) -> str:
    """An interpreter that can be started."""
    if shutil.which(path) is None:
        raise RuntimeError(f"{name}:={path} is no program: name the Python that has d4 installed")
    return path


def server(folder: str, get: Mapping[str, str], *options: str) -> tuple[str, list[LaunchDescriptionEntity]]:
    """The inference server of a checkpoint: its socket, and what to launch.

    It is started again when it ends, unless it says that it cannot run at all (exit code 2): then all ends.
    """
    own = "" if get["socket"] else tempfile.mkdtemp(prefix="d4-")
    socket = get["socket"] or os.path.join(own, "d4.sock")
    command = [interpreter(get["server_python"], "server_python"), "-m", "d4_nodes.server", folder]
    command += ["--socket", socket, "--device", get["device"], *options]
    command += ["--threads", get["threads"]] if get["threads"] else []
    process = ExecuteProcess(
        cmd=command, name="d4_server", output="screen", emulate_tty=True,
        # the server's Python has its own packages; those of ROS would only shadow them
        additional_env={"PYTHONPATH": "", "OMP_WAIT_POLICY": "PASSIVE"},
        respawn=switch("respawn", get["respawn"]), respawn_delay=1.0,
    )  # fmt: skip

    def ended(event: Any, context: Any) -> None:
        if event.returncode == 2:  # by an error of the user's, which will not go away
            raise RuntimeError("the inference server cannot run, see above")

    def clear(event: Any, context: Any) -> None:
        if own:
            shutil.rmtree(own, ignore_errors=True)

    return socket, [
        process,
        RegisterEventHandler(OnProcessExit(target_action=process, on_exit=ended)),
        RegisterEventHandler(OnShutdown(on_shutdown=clear)),
    ]


def lifecycle_node(
    executable: str, get: Mapping[str, str], parameters: Mapping[str, Any]
) -> list[LaunchDescriptionEntity]:
    """A lifecycle node, and its way to `active` if `autostart`: once, however that ends. Whoever configures
    it later has to activate it, too: no robot drives because somebody only configured it.
    """
    values = {**parameters, "use_sim_time": switch("use_sim_time", get["use_sim_time"])}
    node = LifecycleNode(
        package="d4_nodes", executable=executable, name=get["name"], namespace=get["namespace"],
        output="screen", emulate_tty=True, arguments=["--ros-args", "--log-level", get["log_level"]],
        parameters=[*([get["params_file"]] if get["params_file"] else []), values],
    )  # fmt: skip
    if not switch("autostart", get["autostart"]):
        return [node]

    def change(transition: int) -> EmitEvent:
        matcher = matches_action(node)
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matcher, transition_id=transition))

    where = "/".join(part.strip("/") for part in (get["namespace"], get["name"]) if part.strip("/"))
    again = f"the node waits, see above why; then `ros2 lifecycle set /{where}"

    def configured(context: Any) -> list[LaunchDescriptionEntity]:
        if context.locals.event.goal_state == "inactive":
            return [change(Transition.TRANSITION_ACTIVATE)]
        return [LogInfo(msg=f"not configured: {again} configure`, and `activate` when it is")]

    refused = LogInfo(msg=f"not activated: {again} activate`")
    return [
        node,
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node, start_state="configuring",
                entities=[OpaqueFunction(function=configured)], handle_once=True,
            )
        ),
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node, start_state="activating", goal_state="inactive",
                entities=[refused],
            )
        ),
        change(Transition.TRANSITION_CONFIGURE),
    ]  # fmt: skip


def ends_all(process: Any, what: str) -> RegisterEventHandler:
    """When a process has ended, so does the launch; with an error if the process did."""

    def ended(event: Any, context: Any) -> list[LaunchDescriptionEntity]:
        if event.returncode > 0:
            raise RuntimeError(f"{what} did not end well, see above")
        return [Shutdown(reason=f"{what} has ended")]

    return RegisterEventHandler(OnProcessExit(target_action=process, on_exit=ended))
