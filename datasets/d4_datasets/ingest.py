"""d4-ingest: bags in, a dataset out.

Bags are worked on by processes of their own, each leaving a finished part aside; the parts are joined into
the dataset, which takes its place in one rename. An interrupted run goes on where it was when the same
command is given again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from d4_datasets import recording, sources
from d4_datasets.aligned import TOO_SHORT
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError, run_cli
from d4_datasets.latents import Origin
from d4_datasets.lerobot import Dataset, Episode, LeRobotWriter
from d4_datasets.locks import held
from d4_datasets.msgtypes import read_definitions
from d4_datasets.namespaces import within
from d4_datasets.progress import Shown
from d4_datasets.video import Stats, Video
from d4_datasets.workers import follow_parent

_PART_FORMAT = 4  # raise it when what a worker leaves behind changes, so that old parts are not taken up


# ---- parts: what a worker leaves behind ----

_ARRAYS = ("action", "action_mask", "reward", "task_index", "is_terminal")
_COUNTS = ("source", "start_ns", "stale", "dropped", "drive")


def ingest_one(
    path: Path,
    contract: Contract,
    part: Path,
    clip: Sequence[str] = (),
    kind: str = "bag",
    msg_path: Sequence[Path] = (),
) -> None:
    """Turn one recording into the folder `part`, written aside and renamed; nothing to do if it is there."""
    if part.exists():
        return
    aside = _aside(part)
    shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
    aside.mkdir(parents=True)
    try:
        given = read_definitions(tuple(msg_path)) if msg_path else None
        _fill_part(aside, path, contract, clip, sources.named(kind, given))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    aside.rename(part)


def _aside(part: Path) -> Path:
    """Where a part is made."""
    return part.with_name(f".tmp-{part.name}")


def _fill_part(
    folder: Path, path: Path, contract: Contract, clip: Sequence[str], reader: sources.Reader
) -> None:
    episodes, warnings = reader.fill(path, contract, folder, clip)
    entries: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for number, episode in enumerate(episodes):
        arrays |= {f"{number}/{name}": getattr(episode, name) for name in _ARRAYS}
        arrays |= {f"{number}/vector/{name}": values for name, values in episode.vectors.items()}
        if episode.latents is not None:
            arrays[f"{number}/latents"] = episode.latents
        videos = {name: video for name, video in episode.images.items() if isinstance(video, Video)}
        files = {name: [video.path.name, video.frames, _lists(video.stats)] for name, video in videos.items()}
        counts = {name: getattr(episode, name) for name in _COUNTS}
        entries.append({**counts, "videos": files, "origin": episode.origin})
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (folder / "part.json").write_text(json.dumps({"episodes": entries, "warnings": warnings}))


def _lists(stats: Stats) -> dict[str, list[float]]:
    return {key: value.tolist() for key, value in stats.items()}


def _read_part(part: Path) -> tuple[list[Episode], list[str]]:
    """(episodes, warnings) of a finished part."""
    content = json.loads((part / "part.json").read_text())
    episodes = []
    with np.load(part / "arrays.npz", allow_pickle=False) as arrays:
        for number, entry in enumerate(content["episodes"]):
            images: dict[str, np.ndarray | Video] = {
                name: Video(part / file, frames, {key: np.array(value) for key, value in stats.items()})
                for name, (file, frames, stats) in entry.pop("videos").items()
            }
            prefix = f"{number}/vector/"
            vectors = {name[len(prefix) :]: arrays[name] for name in arrays.files if name.startswith(prefix)}
            columns = {name: arrays[f"{number}/{name}"] for name in _ARRAYS}
            if (origin := entry.pop("origin")) is not None:
                columns["latents"], entry["origin"] = arrays[f"{number}/latents"], Origin(*origin)
            episodes.append(Episode(images=images, vectors=vectors, **columns, **entry))
    return episodes, content["warnings"]


# ---- the whole run ----


@dataclass
class Summary:
    """What a run of `ingest` did."""

    bags: int = 0
    skipped: int = 0
    episodes: int = 0
    frames: int = 0
    labelled: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


def ingest(
    paths: Sequence[Path],
    contract: Contract,
    out: Path,
    jobs: int = 1,
    clip_actions: Sequence[str] = (),
    kind: str | None = None,
    skip: Path | None = None,
    msg_path: Sequence[Path] = (),
    namespace: str = "",
) -> Summary:
    """Ingest all recordings under `paths` (only those of `kind`) into the dataset `out`, adding to what is
    there.

    Recordings already in the dataset (by name, size and time) are skipped, and so are those that `skip`
    names, see `read_names`. `msg_path` are files and folders that define message types, see `msgtypes`.
    `namespace` is where the contract's topics are in bags.
    Raises UserError for anything wrong with the recordings, the contract or `out`, in which case `out` is as
    it was.
    """
    unknown = set(clip_actions) - {channel.name for channel in contract.actions}
    if unknown:
        raise UserError(f"--clip-actions {min(unknown)}: the contract has no action channel of that name")
    clip, given = tuple(clip_actions), tuple(msg_path)
    digest = read_definitions(given).digest if given else ""
    began = time.monotonic()
    summary = Summary()
    unwanted = set() if skip is None else read_names(skip)
    readers = _readers(paths, kind, contract, unwanted)
    bags = list(readers)
    parts = out.absolute().parent / f".tmp-{out.name}-parts"
    with _only_one(parts, out), LeRobotWriter(out, contract) as writer:
        known = {(s["name"], s["size"], s["mtime_ns"]) for s in writer.sources}
        entries = {bag: _identity(bag, reader) for bag, reader in readers.items()}
        fresh = [bag for bag in bags if tuple(entries[bag].values()) not in known]
        summary.skipped = len(bags) - len(fresh)
        names = {name for name, _, _ in known}
        _require_absent(unwanted, names)
        summary.warnings += [
            f"{bag} is in the dataset already with another size or time; both are kept"
            for bag in fresh
            if entries[bag]["name"] in names
        ]
        work = [
            (bag, *_place(entries[bag], readers[bag], contract, namespace, parts, clip, digest), given)
            for bag in fresh
        ]
        places = [task[2] for task in work]
        sizes = {_aside(part): entries[bag]["size"] for bag, part in zip(fresh, places, strict=True)}
        with Shown(sizes) as shown, _told_how_to_go_on(len(fresh)):
            for bag, part, _ in zip(fresh, places, _run(work, jobs), strict=True):
                _add_part(writer, part, entries[bag], summary)
                shown.finish(_aside(part), summary.frames)
        if fresh and not writer.episodes:
            shutil.rmtree(parts, ignore_errors=True)
            raise _nothing_came(len(fresh), summary.warnings)
    shutil.rmtree(parts, ignore_errors=True)
    summary.seconds = time.monotonic() - began
    return summary


def _require_absent(unwanted: set[str], known: set[str]) -> None:
    """Check that what is to be left out is not in the dataset. Raises UserError if it is."""
    for name in sorted(known):
        if {name, Path(name).stem} & unwanted:
            raise UserError(f"{name} is to be left out and is in the dataset already: give another --out")


def _nothing_came(count: int, told: Sequence[str]) -> UserError:
    """With the warning that says why."""
    why = next((text for text in told if TOO_SHORT in text), told[0])
    return UserError(
        f"no episode came out of {count} bags ({why}); check the tolerances and episode signals in the "
        "contract"
    )


@contextmanager
def _told_how_to_go_on(count: int) -> Iterator[None]:
    """One bad recording among many must not look like the end of all."""
    try:
        yield
    except UserError as error:
        if count == 1:
            raise
        raise UserError(
            f"{error} (what is finished is kept, and the same command goes on; --skip FILE leaves out the "
            "recordings that FILE names)"
        ) from None


def _readers(
    paths: Sequence[Path], kind: str | None, contract: Contract, unwanted: set[str]
) -> dict[Path, sources.Reader]:
    """All recordings under `paths` but those of these names, each with its reader."""
    found = [one for path in paths for one in sources.find(path, kind, contract)]
    return {one.path.resolve(): one.reader for one in found if not {one.path.name, one.path.stem} & unwanted}


def read_names(path: Path) -> set[str]:
    """Names of recordings: the lines of a file, or the names of the files in a folder.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.is_dir():
            return {entry.name for entry in path.iterdir()}
        return {name for line in path.read_text(encoding="utf-8").splitlines() if (name := line.strip())}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the list of recordings to leave out, {path}: {reason}") from None


def _add_part(writer: LeRobotWriter, part: Path, entry: dict[str, Any], summary: Summary) -> None:
    episodes, warnings = _read_part(part)
    for episode in episodes:
        writer.add_episode(episode)
        summary.frames += episode.frames
        summary.labelled += int(episode.action_mask.sum())
    if not episodes:
        warnings.append(f"{entry['name']} gave no episode")
    writer.add_source({**entry, "episodes": len(episodes), "warnings": warnings})
    summary.bags += 1
    summary.episodes += len(episodes)
    summary.warnings += warnings


def _identity(bag: Path, reader: sources.Reader) -> dict[str, Any]:
    stats = [path.stat() for path in reader.files(bag)]
    return {
        "name": sources.name(sources.Found(bag, reader)),
        "size": sum(stat.st_size for stat in stats),
        "mtime_ns": max(stat.st_mtime_ns for stat in stats),
    }


def _place(
    entry: dict[str, Any],
    reader: sources.Reader,
    contract: Contract,
    namespace: str,
    parts: Path,
    clip: Sequence[str],
    types: str,
) -> tuple[Contract, Path, Sequence[str], str]:
    """How a recording is read and where its part goes: contract, part, clip, kind, as `ingest_one` wants."""
    own = within(contract, namespace) if reader.KIND == recording.KIND else contract
    return own, parts / _key(entry, own, clip, types), clip, reader.KIND


def _key(entry: dict[str, Any], contract: Contract, clip: Sequence[str], types: str) -> str:
    # Not the contract's hash, which leaves things out.
    text = json.dumps([_PART_FORMAT, entry, contract.to_dict(), sorted(clip), types])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextmanager
def _only_one(parts: Path, out: Path) -> Iterator[None]:
    """Hold the folder of parts against a second d4-ingest into the same dataset."""
    parts.mkdir(parents=True, exist_ok=True)
    with held(parts / "lock", f"another d4-ingest is writing to {out}; wait for it to end"):
        try:
            yield
        finally:
            if not parts.is_dir() or not any(path.is_dir() for path in parts.iterdir()):  # nothing to keep
                shutil.rmtree(parts, ignore_errors=True)


def _run(work: list[tuple[Any, ...]], jobs: int) -> Iterator[None]:
    """Do `ingest_one` on all of `work`; yields once for each, in order."""
    if jobs <= 1 or len(work) <= 1:
        for task in work:
            ingest_one(*task)
            yield
        return
    # Not fork: the progress display has a thread.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=context, initializer=_worker) as pool:
        futures: list[Future[None]] = [pool.submit(ingest_one, *task) for task in work]
        try:
            for future in futures:
                future.result()
                yield
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); run again with fewer --jobs"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _worker() -> None:
    """Make this worker process end at Ctrl-C, and as soon as its parent is gone, however that died."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    follow_parent()


@dataclass(frozen=True)
class Options:
    """Turn robot logs (bags of ROS 2 and ROS 1) and other recordings into a dataset to train on.

    Bags already in the dataset are skipped, so the same command adds what is new and goes on after an
    interruption.
    """

    source: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Bags, or folders with bags in them."""

    contract: Path
    """The robot.yaml that describes the robot."""

    out: Path
    """Folder of the dataset to make or to add to."""

    jobs: int = os.cpu_count() or 1
    """Bags worked on at the same time."""

    kind: str | None = None
    """Take only recordings of this kind, where a folder holds several kinds or one could be two."""

    skip: Path | None = None
    """Leave out the recordings that are named in this file, one a line, or by the files of this folder."""

    msg_path: tuple[Path, ...] = ()
    """Folders with the .msg files of message types that the bags themselves do not define."""

    namespace: str = ""
    """Namespace that the robot ran in, such as /robot1: in bags the contract's topics are inside it."""

    clip_actions: tuple[str, ...] = ()
    """Action channels whose commands outside the contract's limits are clipped instead of refused."""


def main() -> None:
    """The command d4-ingest."""
    run_cli(lambda: _main(tyro.cli(Options, prog="d4-ingest")))


def _main(options: Options) -> None:
    if not options.source:
        raise UserError(
            "no bags given; name bags or folders of bags: d4-ingest BAGS --contract robot.yaml --out DATASET"
        )
    contract = Contract.load(options.contract)
    summary = ingest(
        options.source,
        contract,
        options.out,
        options.jobs,
        options.clip_actions,
        options.kind,
        options.skip,
        options.msg_path,
        options.namespace,
    )
    for warning in summary.warnings[:20]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(summary.warnings) > 20:
        print(
            f"warning: and {len(summary.warnings) - 20} more, in {options.out}/meta/d4.json", file=sys.stderr
        )
    if summary.bags == 0:
        print(f"nothing new: all {summary.skipped} bags are in {options.out} already")
        return
    rate = summary.frames / max(summary.seconds, 1e-9)
    again = f" ({summary.skipped} were in it already)" if summary.skipped else ""
    print(
        f"{summary.bags} bags{again} -> {summary.episodes} episodes, {summary.frames} frames, "
        f"{summary.labelled} with a known action, in {summary.seconds:.1f} s ({rate:.0f} frames/s)"
    )
    if (origin := Dataset(options.out).origin) is not None:
        print(f"its frames are latents of {origin}, not pictures")
    if summary.labelled == 0:
        topics = ", ".join(action.topic for action in Contract.load(options.contract).actions)
        print(
            f"warning: none of these bags holds a usable {topics}: is the topic's name right?",
            file=sys.stderr,
        )
    print(f"dataset: {options.out}\nnext:    d4-audit {options.out}")


if __name__ == "__main__":
    main()
