"""The policy node and its inference server.

    ros2 launch d4_bringup policy.launch.py checkpoint:=RUN contract:=robot.yaml

The server needs torch, the node needs rclpy: two processes, and if you like two Python environments
(`server_python`). Both are found by `contract` and `socket`; nothing listens beyond this host.
"""

import os

from d4_nodes.launching import switch
from d4_nodes.ros import launching

ARGUMENTS = [
    ("checkpoint", None, "run folder of d4-train, or a checkpoint folder of its agent or imagination phase"),
    ("contract", "", "robot.yaml of the robot; empty: the one that the checkpoint was trained with"),
    ("task", "", "a task of the contract; empty: its first"),
    ("seed", "0", "seed of action samples, anew in every episode"),
    ("argmax", "false", "take the likeliest action instead of a sample"),
    ("shadow", "false", "compute and report everything, send nothing"),
    ("allow_slow", "false", "drive although decisions take longer than the contract allows"),
    ("name", "policy", "name of the node"),
    *launching.SERVER,
    *launching.LIFECYCLE,
]


def _up(get):
    checkpoint = os.path.abspath(get["checkpoint"])
    contract = get["contract"] or launching.contract_of(checkpoint, "imagination", "agent")
    options = ["--seed", get["seed"], *(["--argmax"] if switch("argmax", get["argmax"]) else [])]
    socket, server = launching.server(checkpoint, get, *options)
    parameters = {
        "contract": contract,
        "socket": socket,
        "task": get["task"],
        "shadow": switch("shadow", get["shadow"]),
        "allow_slow": switch("allow_slow", get["allow_slow"]),
    }
    return [*server, *launching.lifecycle_node("policy_node", get, parameters)]


def generate_launch_description():
    """The nodes and arguments, as `ros2 launch` asks for them."""
    return launching.description(ARGUMENTS, _up)
