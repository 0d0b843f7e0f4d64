"""Training as an action, with d4-train in a process of its own.

    ros2 launch d4_bringup train.launch.py dataset:=DATASET out:=RUN     # trains, and ends
    ros2 launch d4_bringup train.launch.py                               # waits for goals of /training/train

Ctrl-C stops a training with a checkpoint; the same command goes on from it.
"""

from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from d4_nodes.ros import launching

GOAL = [
    ("dataset", "", "train on this dataset folder at once, and end"),
    ("bags", "", "or: train on these bags, or folders of bags, separated by blanks; needs contract"),
    ("contract", "", "robot.yaml that says what is in the bags"),
    ("out", "", "run folder: checkpoints, metrics, gates, and the dataset made of bags"),
    ("phase", "", "tokenizer, dynamics, agent or imagination; empty: all"),
    ("preset", "", "size of the models: nano, small, base, large or paper; empty: nano"),
    ("overrides", "", "further options of d4-train, such as overrides:='--scale 0.5 --force'"),
]
ARGUMENTS = [
    *GOAL,
    launching.python_argument(),
    ("stop_s", "60.0", "time to save and leave after a cancel or Ctrl-C, s; then the training is killed"),
    ("params_file", "", "YAML file with parameters of the node"),
    ("namespace", "", "namespace of the node"),
    ("name", "training", "name of the node"),
    ("log_level", "info", "debug, info, warn or error"),
]


def _up(get):
    at_once = bool(get["dataset"] or get["bags"])
    if get["out"] and not at_once:
        raise RuntimeError("out:= names where to train to; give dataset:= or bags:= as well")
    parameters = {name: ParameterValue(get[name], value_type=str) for name, _, _ in GOAL}
    parameters["server_python"] = get["server_python"]
    parameters["stop_s"] = float(get["stop_s"])
    # launch must not kill the node while the training saves
    patience = str(float(get["stop_s"]) + 20.0)
    node = Node(
        package="d4_nodes",
        executable="training_node",
        name=get["name"],
        namespace=get["namespace"],
        output="screen",
        emulate_tty=True,
        arguments=["--ros-args", "--log-level", get["log_level"]],
        parameters=[*([get["params_file"]] if get["params_file"] else []), parameters],
        sigterm_timeout=patience,
        sigkill_timeout=patience,
    )
    return [node, launching.ends_all(node, "the training")] if at_once else [node]


def generate_launch_description():
    """The nodes and arguments, as `ros2 launch` asks for them."""
    return launching.description(ARGUMENTS, _up)
