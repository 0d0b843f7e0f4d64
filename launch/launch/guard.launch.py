"""The guard in front of another policy.

    ros2 launch d4_bringup guard.launch.py contract:=robot.yaml

The other policy publishes on policy/<command topic>, for example /policy/cmd_vel; remap its topic to that.
"""

import os

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition

from d4_nodes.launching import switch

ARGUMENTS = [
    ("contract", None, "robot.yaml of the robot"),
    ("input_prefix", "policy", "what the policy wants is received on this, then the command topic"),
    ("shadow", "false", "check and report everything, send nothing"),
    ("dead_man_button", "-1", "button of `joy` to be held for commands to pass; -1: none"),
    ("autostart", "true", "configure and activate at once; false: with `ros2 lifecycle set`"),
    ("params_file", "", "YAML file with further parameters of the node"),
    ("namespace", "", "namespace of node and topics"),
    ("name", "guard", "name of the node"),
    ("use_sim_time", "false", "take the time from /clock"),
    ("log_level", "info", "debug, info, warn or error"),
]


def _up(context):
    get = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    for name in {"socket", "server_python", "params_file"} & get.keys():
        get[name] = os.path.expanduser(get[name])
    parameters = {
        "contract": get["contract"],
        "input_prefix": get["input_prefix"],
        "shadow": switch("shadow", get["shadow"]),
        "dead_man_button": int(get["dead_man_button"]),
        "use_sim_time": switch("use_sim_time", get["use_sim_time"]),
    }
    node = LifecycleNode(
        package="d4_nodes",
        executable="guard_node",
        name=get["name"],
        namespace=get["namespace"],
        output="screen",
        emulate_tty=True,
        arguments=["--ros-args", "--log-level", get["log_level"]],
        parameters=[*([get["params_file"]] if get["params_file"] else []), parameters],
    )
    return [node, *_autostart(node)]


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
