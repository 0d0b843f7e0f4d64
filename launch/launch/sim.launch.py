"""The simulated robot as a node: the contract's topics, so that everything runs without hardware.

ros2 launch d4_bringup sim.launch.py world:=yard
"""

import os

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration

ARGUMENTS = [
    ("world", "yard", "world of d4_sim: yard, yard_dusk or arm"),
    ("episodes", "0", "episodes until the launch ends; 0: for ever"),
    ("seed", "0", "decides the start states, as in d4-eval"),
    ("results", "", "write return and success of every episode to this JSON file"),
    ("speed", "1.0", "simulated seconds per second; other than 1 needs publish_clock"),
    ("publish_clock", "false", "be the clock: publish /clock; start other nodes with use_sim_time:=true"),
    ("wait_for_commands", "true", "begin only when commands come"),
    (
        "sim_python",
        os.environ.get("D4_PYTHON", "python3"),
        "Python that has d4 installed (MuJoCo), of the version that ROS has; default: $D4_PYTHON, or python3",
    ),
    ("namespace", "", "namespace of node and topics"),
]


def _up(context):
    get = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    command = [
        get["sim_python"],
        "-m",
        "d4_nodes.ros.sim_node",
        "--ros-args",
        "-r",
        f"__ns:=/{get['namespace']}",
    ]
    for name in ("world", "episodes", "seed", "results", "speed", "publish_clock", "wait_for_commands"):
        # a whole number is no double to ROS: speed:=2 must work all the same
        value = str(float(get[name])) if name == "speed" else get[name]
        if value:
            command += ["-p", f"{name}:={value}"]
    sim = ExecuteProcess(cmd=command, name="d4_sim", output="screen", emulate_tty=True)
    over = EmitEvent(event=Shutdown(reason="the simulation has ended"))
    return [sim, RegisterEventHandler(OnProcessExit(target_action=sim, on_exit=[over]))]


def generate_launch_description():
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=about)
        for name, default, about in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_up)])
