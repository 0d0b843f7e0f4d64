"""The tokenizer node and its inference server: a camera in, latents out.

    ros2 launch d4_bringup tokenizer.launch.py run:=RUN contract:=robot.yaml

The server needs torch, the node needs rclpy: two processes, and if you like two Python environments
(`server_python`). Both are found by `contract` and `socket`; nothing listens beyond this host.
"""

import os

from d4_nodes.ros import launching

ARGUMENTS = [
    ("run", None, "run folder of d4-train, or its tokenizer checkpoint"),
    ("contract", "", "robot.yaml of the robot; empty: the one that the tokenizer was trained with"),
    ("codec", "float16", "how latents are written: float16, or uint8 with half its bytes"),
    ("name", "tokenizer", "name of the node"),
    *launching.SERVER,
    *launching.LIFECYCLE,
]


def _up(get):
    run = os.path.abspath(get["run"])
    contract = get["contract"] or launching.contract_of(run, "tokenizer")
    socket, server = launching.server(run, get, "--tokenizer")
    parameters = {"contract": contract, "socket": socket, "codec": get["codec"]}
    return [*server, *launching.lifecycle_node("tokenizer_node", get, parameters)]


def generate_launch_description():
    """The nodes and arguments, as `ros2 launch` asks for them."""
    return launching.description(ARGUMENTS, _up)
