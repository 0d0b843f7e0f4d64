"""Markdown of the pages: tables, intervals, and whether a claim holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d4_core.stats import Interval


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def spread(value: Interval, digits: int = 2, sign: bool = False) -> str:
    """mean [low, high]; the mean alone where that is all, because there was one value or all were equal."""
    mean, low, high = (f"{x:+z.{digits}f}" if sign else f"{x:z.{digits}f}" for x in value)  # no -0.00
    return mean if value[1] == value[2] else f"{mean} [{low}, {high}]"


def verdict(claim: str, holds: bool | None, figure: str) -> str:
    """One line that says whether a claim holds; None: it could not be told."""
    word = "not shown" if holds is None else "holds" if holds else "does not hold"
    return f"- **{word}**: {claim} ({figure})\n"


def judged(low: float, high: float, least: float = 0.0) -> bool | None:
    """Whether what lies between `low` and `high` exceeds `least`; None where it may or may not."""
    return True if low > least else False if high < least else None
