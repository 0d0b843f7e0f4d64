"""The contract's `files` section: how recordings that are no bags lie on the disk, and the table beside them.

A pattern such as `*_front.mp4` or `*/front.mp4` has one `*`, which stands for the name of the recording. The
folder it starts from is the same for all patterns of a recording.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from d4_datasets.section import Section

STAMPS = ("rate", "name", "table")
SIGNAL_COLUMNS = ("time", "image", "start", "reward", "task", "terminal")


@dataclass(frozen=True)
class Files:
    """Videos, folders of pictures and tables.

    table: pattern of the table's name; None for a .csv, .jsonl or .parquet with the name of the recording.
    columns: what the table calls the columns that it calls otherwise than the contract.
    scale: seconds in one unit of the table's clock. offset_s: to be added for the clock of the video.
    cameras: pattern of the file or folder of each camera; empty where one camera takes every video.
    fps: pictures per second where nothing dates them; None for the contract's rate.
    stamps: what dates the pictures of a folder: the `rate`, the last number in the `name`, or the `table`.
    """

    table: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    scale: float = 1.0
    offset_s: float = 0.0
    cameras: Mapping[str, str] = field(default_factory=dict, hash=False)
    fps: float | None = None
    stamps: str = "rate"


class Match(NamedTuple):
    """A recording: its name, and the folder that patterns start from."""

    base: Path
    name: str

    def place(self, pattern: str) -> Path:
        """The path that a pattern means for this recording."""
        return self.base / pattern.replace("*", self.name)


def match(pattern: str, path: Path) -> Match | None:
    """The recording that `path` belongs to if it is what the pattern means, else None."""
    path, parts = path.absolute(), pattern.split("/")
    tail = path.parts[-len(parts) :]
    if len(path.parts) <= len(parts):
        return None
    name = ""
    for part, given in zip(parts, tail, strict=True):
        before, star, after = part.partition("*")
        if not star:
            if part != given:
                return None
        elif len(given) > len(before) + len(after) and given.startswith(before) and given.endswith(after):
            name = given[len(before) : len(given) - len(after)]
        else:
            return None
    return Match(path.parents[len(parts) - 1], name)


def parse(node: Section | None, cameras: Collection[str], columns: Collection[str]) -> Files | None:
    """The section, checked: names of cameras and columns are those of the contract.

    Raises:
        UserError: naming the key that is wrong.
    """
    if node is None:
        return None
    table = None if node.take("table", None) is None else node.text("table")
    if table is not None:
        _check_pattern(node, "table", table)
        if not table.lower().endswith((".csv", ".jsonl", ".parquet")):
            raise node.error("table", f"{table!r} must end in .csv, .jsonl or .parquet")
    places = _texts(node, "cameras", cameras)
    for name, pattern in places.items():
        _check_pattern(node, f"cameras.{name}", pattern)
    missing = [name for name in cameras if places and name not in places]
    if missing:
        raise node.error("cameras", f"has no pattern for the camera {missing[0]}")
    fps = None if node.take("fps", None) is None else node.number("fps", above=0.0)
    files = Files(
        table=table,
        columns=_texts(node, "columns", columns),
        scale=node.number("scale", 1.0, above=0.0),
        offset_s=node.number("offset_s", 0.0),
        cameras=places,
        fps=fps,
        stamps=node.choice("stamps", STAMPS, "rate"),
    )
    node.finish()
    return files


def _texts(node: Section, key: str, known: Collection[str]) -> dict[str, str]:
    """A mapping of known names to texts; empty if the key is absent."""
    child = node.child(key)
    if child is None:
        return {}
    found = {name: child.text(name) for name in known if child.take(name, None) is not None}
    child.finish()
    return found


def _check_pattern(node: Section, key: str, pattern: str) -> None:
    parts = pattern.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise node.error(key, f"{pattern!r} must be a path below the folder of the recordings, without ..")
    if pattern.count("*") != 1:
        raise node.error(
            key, f"{pattern!r} must have one *, which stands for the name of a recording, as in '*.csv'"
        )
