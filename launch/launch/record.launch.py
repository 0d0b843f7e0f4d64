"""Record what the contract names as bags that `d4-ingest` takes as they are.

    ros2 launch d4_bringup record.launch.py contract:=robot.yaml

Ctrl-C ends the bag. One recording is one bag; give `d4-ingest` the folder of them.
"""

import os
import time

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.substitutions import LaunchConfiguration

from d4_nodes.launching import switch

ARGUMENTS = [
    ("contract", "", "robot.yaml; or give a checkpoint"),
    ("checkpoint", "", "run or checkpoint folder whose contract.yaml is taken"),
    ("out", "bags", "folder for the bags"),
    ("storage", "mcap", "storage of rosbag2: mcap or sqlite3"),
    ("preset", "", "storage preset of rosbag2, such as zstd_fast for raw pictures"),
    ("extra", "", "further topics, separated by spaces"),
    ("use_sim_time", "false", "date messages by /clock, as a simulation with publish_clock needs"),
]


def _up(context):
    from d4_datasets.contract import Contract

    get = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    path = get["contract"] or os.path.join(get["checkpoint"], "contract.yaml")
    contract = Contract.load(os.path.expanduser(path))
    entries = [
        *contract.observations,
        *contract.actions,
        contract.tasks,
        contract.reward,
        contract.episode.start,
        contract.episode.terminal,
    ]
    topics = sorted({entry.topic for entry in entries if entry is not None})
    folder = os.path.expanduser(get["out"])
    os.makedirs(folder, exist_ok=True)
    bag = os.path.join(folder, f"{contract.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    command = ["ros2", "bag", "record", "--storage", get["storage"], "--output", bag]
    command += ["--storage-preset-profile", get["preset"]] if get["preset"] else []
    command += ["--use-sim-time"] if switch("use_sim_time", get["use_sim_time"]) else []
    command += [*topics, *get["extra"].split()]
    return [ExecuteProcess(cmd=command, name="rosbag2", output="screen", emulate_tty=True)]


def generate_launch_description():
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=about)
        for name, default, about in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_up)])
