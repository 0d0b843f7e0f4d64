"""What record.launch.py records is what nodes in the same namespace have."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("rclpy")

from ament_index_python.packages import get_package_share_directory
from rclpy.expand_topic_name import expand_topic_name

from d4_datasets.contract import Contract
from d4_nodes.ros.shell import local

pytestmark = pytest.mark.ros
ROBOT = Path(__file__).parents[1] / "nodes" / "robot.yaml"


def recorded(tmp_path, **arguments: str) -> list[str]:
    """The command line of the recorder."""
    path = Path(get_package_share_directory("d4_bringup")) / "launch" / "record.launch.py"
    spec = importlib.util.spec_from_file_location("record_launch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get = {name: default for name, default, _ in module.ARGUMENTS}
    [process] = module._up({**get, "contract": str(ROBOT), "out": str(tmp_path), **arguments})
    return ["".join(part.text for part in word) for word in process.cmd]


@pytest.mark.parametrize("namespace", ["", "/robot1", "site/robot1"])
def test_topics_are_those_of_nodes_in_the_namespace(tmp_path, namespace) -> None:
    contract, where = Contract.load(ROBOT), "/" + namespace.strip("/")
    entries = [*contract.observations, *contract.actions]
    live = {expand_topic_name(local(entry.topic), "policy", where) for entry in entries}
    command = recorded(tmp_path, namespace=namespace)
    assert set(command[-len(live) :]) == live
    assert {word for word in command if word.count("/") and word not in live} == {
        command[command.index("--output") + 1]
    }


def test_further_topics_stay_as_they_are_given(tmp_path) -> None:
    assert recorded(tmp_path, namespace="robot1", extra="/tf /robot1/imu")[-2:] == ["/tf", "/robot1/imu"]
