"""A node's parameter as it is declared and documented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Parameter:
    """`about` names the unit; `span` is the least and the largest value.

    fixed: from which state of the node on it cannot change, because it was read then: changing it later would
    change nothing, and look as if it had.
    """

    name: str
    default: Any
    about: str
    span: tuple[float, float] | None = None
    read_only: bool = False
    fixed: Literal["configured", "active", "never"] = "active"
