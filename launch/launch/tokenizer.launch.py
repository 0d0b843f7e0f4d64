"""The tokenizer node and its inference server: a camera in, latents out.

    ros2 launch d4_bringup tokenizer.launch.py run:=RUN contract:=robot.yaml

The server needs torch, the node needs rclpy: two processes, and if you like two Python environments
(`server_python`). Both are found by `contract` and `socket`; nothing listens beyond this host.
"""

import os
import tempfile

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition

from d4_nodes.launching import switch

ARGUMENTS = [
    ("run", None, "run folder of d4-train, or its tokenizer checkpoint"),
    ("contract", "", "robot.yaml of the robot; empty: the one that the tokenizer was trained with"),
    ("codec", "float16", "how latents are written: float16, or uint8 with half its bytes"),
    (
        "server_python",
        os.environ.get("D4_PYTHON", "python3"),
        "Python that has d4 installed (torch); default: $D4_PYTHON, or python3",
    ),
    ("device", "auto", "where the tokenizer computes: auto, cpu or cuda"),
    ("threads", "", "compute threads of the server; empty: the free cores"),
    ("socket", "", "socket between node and server; empty: one of its own for this launch"),
    ("autostart", "true", "configure and activate at once; false: with `ros2 lifecycle set`"),
    ("respawn", "true", "start the inference server again if it ends"),
    ("params_file", "", "YAML file with further parameters of the node"),
    ("namespace", "", "namespace of node and topics"),
    ("name", "tokenizer", "name of the node"),
    ("use_sim_time", "false", "take the time from /clock"),
    ("log_level", "info", "debug, info, warn or error"),
]


def _up(context):
    get = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    for name in {"socket", "server_python", "params_file"} & get.keys():
        get[name] = os.path.expanduser(get[name])
    run = os.path.abspath(os.path.expanduser(get["run"]))
    contract = os.path.expanduser(get["contract"]) or _contract_of(run)
    socket = get["socket"] or os.path.join(tempfile.mkdtemp(prefix="d4-"), "tokenizer.sock")
    command = [get["server_python"], "-m", "d4_nodes.server", run, "--tokenizer"]
    command += ["--socket", socket, "--device", get["device"]]
    command += ["--threads", get["threads"]] if get["threads"] else []
    server = ExecuteProcess(
        cmd=command,
        name="d4_tokenizer_server",
        output="screen",
        emulate_tty=True,
        # the server's Python has its own packages; those of ROS would only shadow them
        additional_env={"PYTHONPATH": "", "OMP_WAIT_POLICY": "PASSIVE"},
        respawn=switch("respawn", get["respawn"]),
        respawn_delay=1.0,
    )
    parameters = {
        "contract": contract,
        "socket": socket,
        "codec": get["codec"],
        "use_sim_time": switch("use_sim_time", get["use_sim_time"]),
    }
    node = LifecycleNode(
        package="d4_nodes",
        executable="tokenizer_node",
        name=get["name"],
        namespace=get["namespace"],
        output="screen",
        emulate_tty=True,
        arguments=["--ros-args", "--log-level", get["log_level"]],
        parameters=[*([get["params_file"]] if get["params_file"] else []), parameters],
    )
    return [server, node, *_autostart(node)]


def _contract_of(run):
    for folder in (os.path.join(run, "tokenizer"), run):
        path = os.path.join(folder, "contract.yaml")
        if os.path.exists(path):
            return path
    raise RuntimeError(f"{run} holds no tokenizer checkpoint: train one with d4-train")


def _autostart(node):
    def change(transition):
        return ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition)

    wanted = IfCondition(LaunchConfiguration("autostart"))
    activate = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[EmitEvent(event=change(Transition.TRANSITION_ACTIVATE))],
    )
    return [
        RegisterEventHandler(activate, condition=wanted),
        EmitEvent(event=change(Transition.TRANSITION_CONFIGURE), condition=wanted),
    ]


def generate_launch_description():
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=about)
        for name, default, about in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_up)])
