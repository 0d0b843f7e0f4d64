"""Record what the contract names as bags that `d4-ingest` takes as they are.

    ros2 launch d4_bringup record.launch.py contract:=robot.yaml

Ctrl-C ends the bag. One recording is one bag; give `d4-ingest` the folder of them.
"""

import os
import time

from launch.actions import ExecuteProcess

from d4_datasets.contract import Contract
from d4_datasets.namespaces import within
from d4_nodes.launching import switch
from d4_nodes.ros import launching

ARGUMENTS = [
    ("contract", "", "robot.yaml; or give a checkpoint"),
    ("checkpoint", "", "run or checkpoint folder whose contract.yaml is taken"),
    ("out", "bags", "folder for the bags"),
    ("storage", "mcap", "storage of rosbag2: mcap or sqlite3"),
    ("preset", "", "storage preset of rosbag2, such as zstd_fast for raw pictures"),
    ("namespace", "", "namespace that the robot runs in; give it to d4-ingest as well: --namespace"),
    ("extra", "", "further topics, separated by spaces"),
    ("use_sim_time", "false", "date messages by /clock, as a simulation with publish_clock needs"),
]


def _up(get):
    if not get["contract"] and not get["checkpoint"]:
        raise RuntimeError("what is to be recorded? give contract:=robot.yaml, or checkpoint:=RUN")
    phases = ("imagination", "agent", "dynamics", "tokenizer")
    contract = Contract.load(get["contract"] or launching.contract_of(get["checkpoint"], *phases))
    contract = within(contract, get["namespace"])
    episode = contract.episode
    single = (contract.tasks, contract.reward, episode.start, episode.terminal)
    entries = [*contract.observations, *contract.actions, *single]
    topics = sorted({entry.topic for entry in entries if entry is not None})
    os.makedirs(get["out"], exist_ok=True)
    bag = os.path.join(get["out"], f"{contract.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    command = ["ros2", "bag", "record", "--storage", get["storage"], "--output", bag]
    command += ["--storage-preset-profile", get["preset"]] if get["preset"] else []
    command += ["--use-sim-time"] if switch("use_sim_time", get["use_sim_time"]) else []
    command += [*topics, *get["extra"].split()]
    return [ExecuteProcess(cmd=command, name="rosbag2", output="screen", emulate_tty=True)]


def generate_launch_description():
    """The nodes and arguments, as `ros2 launch` asks for them."""
    return launching.description(ARGUMENTS, _up)
