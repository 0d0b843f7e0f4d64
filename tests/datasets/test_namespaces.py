"""Robots in namespaces: their bags give the dataset that they would give without."""

import numpy as np
import pytest
import test_ingest

from d4_datasets import ingest
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Dataset
from d4_datasets.namespaces import within


def moved(log, namespace: str):
    for item in log.items:
        item[0] = namespace + item[0]
    return log


def topics(contract) -> set[str]:
    episode = contract.episode
    entries = [*contract.observations, *contract.actions, contract.tasks, contract.reward]
    return {entry.topic for entry in [*entries, episode.start, episode.terminal]}


@pytest.mark.parametrize("namespace", ["/robot1", "robot1", "robot1/"])
def test_every_topic_is_inside(namespace) -> None:
    contract = test_ingest.robot()
    assert topics(within(contract, namespace)) == {f"/robot1{topic}" for topic in topics(contract)}
    assert topics(within(within(contract, namespace), "/site")) == {
        f"/site/robot1{topic}" for topic in topics(contract)
    }


def test_without_a_namespace_nothing_changes() -> None:
    contract = test_ingest.robot()
    assert within(contract, "") is within(contract, "/") is contract


@pytest.mark.parametrize("namespace", ["robot 1", "a//b", "1st", "/a/../b", "~"])
def test_what_is_no_namespace_is_refused(namespace) -> None:
    with pytest.raises(UserError, match="is no namespace"):
        within(test_ingest.robot(), namespace)


def test_two_robots_in_one_bag_are_told_apart(tmp_path) -> None:
    """And the dataset is one of the contract as it is written, as the robot that is to use it has it."""
    contract, both = test_ingest.robot(), test_ingest.Log()
    both.items = (
        moved(test_ingest.drive(), "/robot1").items + moved(test_ingest.drive(first=20), "/robot2").items
    )
    both.write(tmp_path / "bags" / "both")
    alone = test_ingest.drive(first=20).write(tmp_path / "alone")
    ingest.ingest([tmp_path / "bags"], contract, tmp_path / "data", namespace="/robot2")
    ingest.ingest([alone], contract, tmp_path / "plain")
    one, other = Dataset(tmp_path / "data"), Dataset(tmp_path / "plain")
    assert one.contract.hash == other.contract.hash == contract.hash
    assert len(one.episodes) == len(other.episodes) == 2
    for number in range(2):
        assert np.array_equal(list(one.frames("cam", number)), list(other.frames("cam", number)))


def test_a_bag_that_is_not_of_that_robot_is_refused(tmp_path) -> None:
    moved(test_ingest.drive(), "/robot1").write(tmp_path / "bag")
    with pytest.raises(UserError, match=r"has no topic /robot3/cam; it has .*/robot1/cam"):
        ingest.ingest([tmp_path / "bag"], test_ingest.robot(), tmp_path / "data", namespace="robot3")
