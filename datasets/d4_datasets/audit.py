"""`d4-audit`: what is in a dataset, and whether training on it would be wrong.

One pass over the data, an episode at a time, collects counts (`scan`); the subjects in `checks` turn them
into verdicts. An ERROR means a model trained on this would have learned something false (exit code 1); a WARN
names what a person should look at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from d4_datasets import audit_page, audit_text, places, whole
from d4_datasets.audit_pictures import sheet
from d4_datasets.checks import lag, sound
from d4_datasets.checks.base import Verdict, error
from d4_datasets.errors import UserError, run_cli
from d4_datasets.pictures import write_png
from d4_datasets.places import Place
from d4_datasets.presets import Presets
from d4_datasets.scan import EpisodeRow, Scan
from d4_datasets.windows import NoFrames, Windows

FORMAT = 2  # of the JSON file


@dataclass
class Audit:
    """The result of an audit; `to_dict` is the JSON file."""

    dataset: str
    summary: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    cameras: dict[str, dict[str, Any]] = field(default_factory=dict)
    actions: dict[str, dict[str, Any]] = field(default_factory=dict)
    lag: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    room: dict[str, Any] = field(default_factory=dict)
    presets: list[dict[str, Any]] = field(default_factory=list)
    along: dict[str, list[float]] = field(default_factory=dict)
    nonfinite: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[EpisodeRow] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if training on this dataset would be wrong, else 0."""
        return int(any(verdict.level == "ERROR" for verdict in self.verdicts))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without NaN."""
        return {"format": FORMAT, **asdict(self), "exit_code": self.exit_code}


def audit(where: Place | Sequence[Place], cache: Path | None = None, limit: int | None = None) -> Audit:
    """Look through a dataset, or several as one (building their frame cache if needed), and judge.

    Args: cache, limit: as `Windows` takes them.

    Raises:
        UserError: there is no dataset, or files of it are missing or broken.
    """
    result = Audit(places.title(where))
    try:
        windows = Windows(where, cache, strict=False, limit=limit)
    except NoFrames:
        result.summary = {"episodes": 0, "frames": 0}
        hint = "ingest a recording into it (d4-ingest); if it was, the camera topic or its tolerance is wrong"
        result.verdicts.append(error("frames", "the dataset holds no frames", hint))
        return result
    rate = windows.contract.rate_hz
    claimed = max((meta["fps"] for meta in windows.metadata), key=lambda fps: abs(fps - rate))
    scan = Scan(windows, windows.provenance, claimed)
    scan.run()
    _fill(result, windows, scan)
    result.verdicts.extend(_verdicts(result, windows, scan))
    windows.close()
    return result


def _fill(result: Audit, windows: Windows, scan: Scan) -> None:
    """Turn the counts of the pass into the sections of the result."""
    contract, frames = windows.contract, windows.num_frames
    result.times, result.labels, result.cameras = (
        scan.times.table(),
        scan.labels.table(),
        scan.cameras.table(),
    )
    result.actions, result.lag, result.tasks = scan.actions.table(), scan.lag.table(), scan.rewards.table()
    result.room, result.along = sound.room(windows), scan.along.table()
    result.summary = {
        "robot": contract.name, "contract_hash": contract.hash,
        "episodes": len(scan.rows), "frames": frames, "hours": frames / contract.rate_hz / 3600,
        "rate_hz": contract.rate_hz, "median_episode_frames": float(np.median(windows.episode_length)),
        "recordings": len({row.source for row in scan.rows}),
        "terminal_episodes": sum(row.terminal for row in scan.rows),
        "unknown_task_frames": scan.rewards.unknown_frames,
        "longest_command_hold": scan.actions.longest_hold, "idle_episodes": scan.actions.idle_episodes,
    }  # fmt: skip
    result.nonfinite = [
        {"column": column, "episode": episode, "frames": count}
        for (column, episode), count in windows.nonfinite.items()
    ]
    result.episodes = scan.rows


def _verdicts(result: Audit, windows: Windows, scan: Scan) -> Iterator[Verdict]:
    """All checks, each with one line or more."""
    yield from sound.numbers(result.nonfinite)
    yield from sound.contract(windows)
    yield from sound.recordings(windows)
    yield from scan.times.verdicts()
    yield from sound.pieces(result.episodes)
    yield from scan.cameras.verdicts()
    yield from scan.labels.verdicts()
    yield from scan.actions.verdicts()
    yield from lag.verdicts(result.lag, windows.contract.rate_hz)
    yield from scan.rewards.verdicts()
    yield from sound.size(result.room)


# ---- command


@dataclass(frozen=True)
class Args:
    """Look through a dataset before training on it: what is in it, what is missing, what is wrong.

    Exit code 0: train on it. 1: training would be wrong, the ERROR lines say why. 2: the command was wrong.
    """

    dataset: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Dataset folder, as d4-ingest wrote it; several, or text files that list such, are looked through as
    one."""
    json: Path | None = None
    """Write everything that was found to this JSON file."""
    html: Path | None = None
    """Write one HTML page with pictures, histograms and curves; it needs no other file."""
    sheet: Path | None = None
    """Write a contact sheet to this PNG file: episodes as rows, frames across."""
    cache: Path | None = None
    """Folder of the frame cache (default: <dataset>/cache); training uses the same one."""
    cache_gb: float | None = None
    """Keep no more than so many gigabytes unpacked at a time."""
    presets: bool = True
    """Say what every preset of d4-train takes on this machine: time, memory, disk. Measured for some seconds
    beside the audit."""


def _run(args: Args) -> int:
    for path in (args.json, args.html, args.sheet):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    limit = places.limit_bytes(args.cache_gb)
    result = _audit(args, limit)
    audit_text.show(result.to_dict())
    if args.json is not None:
        _write(args.json, json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    windows = Windows(args.dataset, args.cache, strict=False, limit=limit) if result.episodes else None
    if args.html is not None:
        _write(args.html, audit_page.page(result.to_dict(), windows))
    if args.sheet is not None and windows is not None:
        write_png(args.sheet, sheet(windows, result.to_dict()["episodes"]))
        print(f"written: {args.sheet}")
    return result.exit_code


def _audit(args: Args, limit: int | None) -> Audit:
    """The audit, with what presets take if that is wanted and can be known."""
    datasets = places.expand(args.dataset)
    if not args.presets:
        return audit(args.dataset, args.cache, limit)
    with Presets(datasets) as presets:
        result = audit(args.dataset, args.cache, limit)
        if result.episodes:
            result.presets, reason = presets.answer()
            if reason:
                print(f"warning: what presets take is not known: {reason}", file=sys.stderr)
    return result


def _write(path: Path, text: str) -> None:
    whole.write(path, text)
    print(f"written: {path}")


def main() -> None:
    """Entry point of `d4-audit`."""
    run_cli(lambda: _run(tyro.cli(Args, prog="d4-audit")))


if __name__ == "__main__":
    main()
