"""The simulated robot as a node: the contract's topics, so that everything runs without hardware.

ros2 launch d4_bringup sim.launch.py world:=yard
"""

from launch_ros.actions import Node

from d4_nodes.launching import switch
from d4_nodes.ros import launching

PARAMETERS = [
    ("world", "yard", "world of d4_sim, such as yard, yard_dusk, arm or push", str),
    ("episodes", "0", "episodes until the launch ends; 0: for ever", int),
    ("seed", "0", "decides the start states, as in d4-eval", int),
    ("results", "", "write return and success of every episode to this JSON file", str),
    ("speed", "1.0", "simulated seconds per second; other than 1 needs publish_clock", float),
    ("publish_clock", "false", "publish /clock; start other nodes with use_sim_time:=true", bool),
    ("wait_for_commands", "true", "begin only when commands come", bool),
]
ARGUMENTS = [
    *((name, default, about) for name, default, about, _ in PARAMETERS),
    launching.python_argument("sim_python", "MuJoCo, and the version that ROS has"),
    ("namespace", "", "namespace of node and topics"),
    ("log_level", "info", "debug, info, warn or error"),
]


def _value(name, text, type_):
    """What an argument means to the node."""
    if type_ is bool:
        return switch(name, text)
    try:
        return type_(text)
    except ValueError:
        raise RuntimeError(f"{name}:={text} is no number") from None


def _up(get):
    sim = Node(
        executable=launching.interpreter(get["sim_python"], "sim_python"),
        arguments=["-m", "d4_nodes.ros.sim_node", "--ros-args", "--log-level", get["log_level"]],
        exec_name="d4_sim", namespace=get["namespace"], output="screen", emulate_tty=True,
        parameters=[{name: _value(name, get[name], type_) for name, _, _, type_ in PARAMETERS}],
    )  # fmt: skip
    return [sim, launching.ends_all(sim, "the simulation")]


def generate_launch_description():
    """The nodes and arguments, as `ros2 launch` asks for them."""
    return launching.description(ARGUMENTS, _up)
