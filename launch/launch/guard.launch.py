"""The guard in front of another policy.

    ros2 launch d4_bringup guard.launch.py contract:=robot.yaml

The other policy publishes on policy/<command topic>, for example /policy/cmd_vel; remap its topic to that.
"""

from d4_nodes.launching import switch
from d4_nodes.ros import launching

ARGUMENTS = [
    ("contract", None, "robot.yaml of the robot"),
    ("input_prefix", "policy", "what the policy wants is received on this, then the command topic"),
    ("shadow", "false", "check and report everything, send nothing"),
    ("dead_man_button", "-1", "button of `joy` to be held for commands to pass; -1: none"),
    ("name", "guard", "name of the node"),
    *launching.LIFECYCLE,
]


def _up(get):
    parameters = {
        "contract": get["contract"],
        "input_prefix": get["input_prefix"],
        "shadow": switch("shadow", get["shadow"]),
        "dead_man_button": int(get["dead_man_button"]),
    }
    return launching.lifecycle_node("guard_node", get, parameters)


def generate_launch_description():
    """The nodes and arguments, as `ros2 launch` asks for them."""
    return launching.description(ARGUMENTS, _up)
