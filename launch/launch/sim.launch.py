"""The simulated robot as a node: the contract's topics, so that everything runs without hardware.

ros2 launch d4_bringup sim.launch.py world:=yard
"""

from launch.actions import ExecuteProcess

from d4_nodes.ros import launching

PARAMETERS = [
    ("world", "yard", "world of d4_sim: yard, yard_dusk or arm"),
    ("episodes", "0", "episodes until the launch ends; 0: for ever"),
    ("seed", "0", "decides the start states, as in d4-eval"),
    ("results", "", "write return and success of every episode to this JSON file"),
    ("speed", "1.0", "simulated seconds per second; other than 1 needs publish_clock"),
    ("publish_clock", "false", "be the clock: publish /clock; start other nodes with use_sim_time:=true"),
    ("wait_for_commands", "true", "begin only when commands come"),
]
ARGUMENTS = [
    *PARAMETERS,
    launching.python_argument("sim_python", "MuJoCo, and the version that ROS has"),
    ("namespace", "", "namespace of node and topics"),
]


def _up(get):
    command = [launching.interpreter(get["sim_python"], "sim_python"), "-m", "d4_nodes.ros.sim_node"]
    command += ["--ros-args", "-r", f"__ns:=/{get['namespace'].strip('/')}"]
    for name, _, _ in PARAMETERS:
        # a whole number is no double to ROS: speed:=2 must work all the same
        value = str(float(get[name])) if name == "speed" else get[name]
        if value:
            command += ["-p", f"{name}:={value}"]
    sim = ExecuteProcess(cmd=command, name="d4_sim", output="screen", emulate_tty=True)
    return [sim, launching.ends_all(sim, "the simulation")]


def generate_launch_description():
    """The nodes and arguments, as `ros2 launch` asks for them."""
    return launching.description(ARGUMENTS, _up)
