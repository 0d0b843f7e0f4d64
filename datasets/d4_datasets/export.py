"""d4-export: a dataset out again, as bags to look at or as a plain LeRobotDataset for other tools."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from d4_datasets.errors import UserError, run_cli
from d4_datasets.export_lerobot import write_plain
from d4_datasets.export_mcap import write_bags
from d4_datasets.lerobot import Dataset

Format = Literal["mcap", "lerobot"]
Pictures = Literal["png", "jpeg"]


def export(
    root: Path, out: Path, format: Format, images: Pictures = "png", episodes: Sequence[int] = ()
) -> list[str]:
    """Write the dataset at `root` to `out`, all at once or not at all; returns what could not be expressed.

    Args: episodes: only these. images: how pictures are compressed in bags.

    Raises:
        UserError: `root` is no dataset, has latents for pictures or no such episode, or `out` is there.
    """
    dataset = Dataset(root)
    if out.exists():
        raise UserError(f"{out} exists already; choose another name or remove it")
    if dataset.origin is not None:
        raise UserError(f"{root} holds latents of {dataset.origin}, no pictures; it cannot be exported")
    count = dataset.episodes.num_rows
    wrong = [number for number in episodes if not 0 <= number < count]
    if wrong:
        raise UserError(f"{root} has no episode {wrong[0]}; they are numbered 0 to {count - 1}")
    numbers = sorted(set(episodes)) or list(range(count))
    lengths = dataset.episodes["length"].to_pylist()
    aside = out.absolute().parent / f".tmp-{out.name}-export"
    shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
    try:
        with _progress(sum(lengths[number] for number in numbers)) as tick:
            if format == "lerobot":
                return write_plain(dataset, numbers, out, aside, tick)
            aside.mkdir(parents=True)
            notes = write_bags(dataset, numbers, aside, images, tick)
            aside.rename(out)
            return notes
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show frames done and time left on stderr: a bar on a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        parts = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda count: bar.advance(task, count)
        return
    began = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= 5 and done < total:
            left = (now - began) * (total - done) / done
            print(f"{done} of {total} frames, {left:.0f} s left", file=sys.stderr, flush=True)
            said = now

    yield advance


@dataclass(frozen=True)
class Options:
    """Write a dataset as bags (MCAP, one for each episode) or as a plain LeRobotDataset v3.0."""

    dataset: Annotated[Path, tyro.conf.Positional]
    """The dataset, as d4-ingest makes them."""

    format: Format
    """mcap: for Foxglove, ROS and d4-ingest. lerobot: for LeRobot's own tools."""

    out: Path
    """Folder to make."""

    images: Pictures = "png"
    """How pictures are compressed in bags: without loss, or smaller. Topics of raw images stay raw."""

    episodes: tuple[int, ...] = ()
    """Only these episodes, by number."""


def main() -> None:
    """The command d4-export."""
    run_cli(lambda: _main(tyro.cli(Options, prog="d4-export")))


def _main(options: Options) -> None:
    notes = export(options.dataset, options.out, options.format, options.images, options.episodes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")
    if options.format == "mcap":
        first = min(options.out.iterdir())
        print(f"look:    open {first / first.name}.mcap in Foxglove")
        print(f"again:   d4-ingest {options.out} --contract robot.yaml --out DATASET")


if __name__ == "__main__":
    main()
