"""The colcon package d4_nodes: `ros2 run d4_nodes ...`; what needs no ROS is installed with pip."""

from setuptools import find_packages, setup

NODES = ("policy_node", "guard_node", "tokenizer_node", "training_node", "sim_node", "probe_node")

setup(
    name="d4_nodes",
    version="0.1.0",
    description="A world-model policy on a robot at a fixed latency, and its guard",
    license="Apache-2.0",
    packages=find_packages(),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/d4_nodes"]),
        ("share/d4_nodes", ["package.xml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    entry_points={"console_scripts": [f"{node} = d4_nodes.ros.{node}:main" for node in NODES]},
)
