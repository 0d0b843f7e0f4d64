"""A robot in a namespace: its contract's topics as they are called there."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

_NAMESPACE = re.compile(r"(/?[A-Za-z_][A-Za-z0-9_]*)(/[A-Za-z_][A-Za-z0-9_]*)*/?")


def within(contract: Contract, namespace: str) -> Contract:
    """The contract with all topics inside a namespace, as nodes have them that run in it; the same contract
    for an empty one. What is learned belongs to the contract as written: only bags are read by this one.

    Raises:
        UserError: that is no namespace.
    """
    name = namespace.strip("/")
    if not name:
        return contract
    if not _NAMESPACE.fullmatch(namespace):
        raise UserError(
            f"{namespace!r} is no namespace: give names of letters, digits and underscores, such as /robot1"
        )

    def moved(entry: Any) -> Any:
        topic = None if entry is None else f"/{name}/{entry.topic.lstrip('/')}"
        return None if entry is None else dataclasses.replace(entry, topic=topic)

    episode = contract.episode
    return dataclasses.replace(
        contract,
        observations=tuple(map(moved, contract.observations)),
        actions=tuple(map(moved, contract.actions)),
        tasks=moved(contract.tasks),
        reward=moved(contract.reward),
        episode=dataclasses.replace(episode, start=moved(episode.start), terminal=moved(episode.terminal)),
    )
