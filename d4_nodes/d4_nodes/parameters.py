"""A node's parameter as it is declared and documented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """`about` names the unit; `span` is the least and the largest value."""

    name: str
    default: Any
    about: str
    span: tuple[float, float] | None = None
    read_only: bool = False
