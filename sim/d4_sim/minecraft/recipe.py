"""`d4-minecraft train`: from contractors' recordings to a policy: what each step costs, and then the steps.

What is counted is counted (frames, operations, bytes of caches); what is assumed says so.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d4_core.config import PHASES, Preset, override, preset, scaled
from d4_core.estimate import on_ranks, training_seconds, work
from d4_core.memory import costs, require_memory
from d4_datasets import contractor
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.ingest import read_names
from d4_datasets.windows import cache_bytes
from d4_sim.minecraft import replay
from d4_sim.minecraft.keys import require_keyboard_and_mouse
from d4_sim.stages import Command, Stage, State, alone, clock, command, keys, run_command

PAPER_HOURS = 2541  # of the contractors' recordings that the paper trains on: versions 6 to 10
VIDEO_GB_PER_HOUR = 0.4  # assumed for 640x360 at 20 Hz with its lines; measured where recordings are there
INGEST_HZ = 300  # assumed frames a second and core, from 640x360 to 256x144
PICTURE_SHARE = 0.35  # assumed size of losslessly stored pictures, of what they are in memory
GPU_FLOPS = 4e14  # assumed effective speed of one H100 or H200 in training, operations a second
GPU_BYTES = 141e9  # memory of one H200
GPU_COUNTS = (1, 8, 64, 256)
# What is cloned and improved for a task is what came around its event, be it once or thirty times; the usual
# 0.4 of the best return would leave only the pieces with most of them.
EVENTS = ("agent_training.relevant_return=0.01", "imagination_training.relevant_return=0.01")
_SMALL = ("nano", "small")  # presets too small to keep such a GPU busy
CLONE_STEPS = 10_000  # of the policies without a world model
_CHECKPOINTS = 3  # copies of the weights with optimiser state that a run holds at a time, per phase


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the steps and their cost.

    Attributes:
        index: indexes to fetch from, addresses or files; none if the recordings are there.
        recordings: folder of recordings.
        hours: of recordings to fetch, or of those that are there.
        gpus: that train; 0 for this machine's CPU.
        set: settings of the preset in place of its own, and of `EVENTS`.
        skip: a file that names recordings to leave out.
    """

    index: tuple[str, ...]
    recordings: Path
    out: Path
    contract: Path
    preset: str
    hours: float
    gpus: int
    jobs: int
    scale: float
    seed: int
    force: bool = False
    set: tuple[str, ...] = ()
    skip: Path | None = None


@dataclass(frozen=True)
class Stock:
    """Recordings that lie in a folder: how many, their hours (by their lines) and bytes."""

    recordings: int
    hours: float
    bytes: int


_LINE_SAMPLE = 20  # recordings whose lines are counted; the others are taken to be like them


def stock(folder: Path) -> Stock:
    """What recordings a folder holds."""
    found = [path for path in sorted(folder.rglob("*.jsonl")) if path.with_suffix(".mp4").exists()]
    size = sum(path.stat().st_size + path.with_suffix(".mp4").stat().st_size for path in found)
    sample = found[:: max(1, len(found) // _LINE_SAMPLE)]
    lines = sum(_count_lines(path) for path in sample)
    frames = lines / max(1, len(sample)) * len(found)
    return Stock(len(found), frames / 20 / 3600, size)


def played_in(folder: Path) -> str:
    """The engine of the recordings in a folder, by the first of them; "minerl" where it names none."""
    for path in sorted(folder.rglob("*.jsonl")):
        for first in contractor.read_lines(path):
            return replay.played(first) or "minerl"
    return "minerl"


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


# ---- what it costs ----


def training(recipe: Recipe) -> Preset:
    """The preset with its settings, and the steps that `--scale` makes of it."""
    return scaled(override(preset(recipe.preset), [*EVENTS, *recipe.set]), recipe.scale)


def told(recipe: Recipe, here: Stock, measure: bool) -> Iterator[str]:
    """The costs of a recipe, line by line.

    Args: measure: time the layers on this machine, which takes some seconds.
    """
    contract, settings = Contract.load(recipe.contract), training(recipe)
    hours = hours_of(recipe, here)
    frames = round(hours * 3600 * contract.rate_hz)
    yield f"data: {hours:,.1f} h of play = {frames:,} frames; the paper has {PAPER_HOURS:,} h"
    sizes, free = disk(recipe, here), shutil.disk_usage(_existing(recipe.out)).free / 1e9
    each = ", ".join(f"{name} {size:,.1f} GB" for name, size in sizes.items())
    yield f"disk: {sum(sizes.values()):,.1f} GB ({each}); {free:,.1f} GB are free"
    per_phase, parts = work(settings, contract), costs(settings, contract)
    counts = ", ".join(f"{name} {part.parameters / 1e6:,.1f} M" for name, part in parts.items())
    yield f"model: preset {recipe.preset}, {counts} parameters"
    encoding = frames * parts["tokenizer"].flops / 2  # its encoder is half of it
    for name, job in per_phase.items():
        passes = f", {job.frames / max(1, frames):.2g} times over the data" if name != "imagination" else ""
        yield f"  {name}: {job.steps:,} steps, {job.frames:,} frames{passes}, {job.flops:.2g} operations"
        if name == "tokenizer":
            yield f"  encoding: {frames:,} frames to latents, once, {encoding:.2g} operations"
    operations = {name: job.flops for name, job in per_phase.items()}
    total = sum(operations.values()) + encoding
    small = f"; {recipe.preset} keeps no GPU busy, so days are not told" if recipe.preset in _SMALL else ""
    yield f"time: {total:.2g} operations{small}{_on_gpus(recipe, operations, encoding)}"
    if frames > (drawn := per_phase["dynamics"].frames):
        more = frames / drawn
        days = _on_gpus(recipe, operations | {"dynamics": more * operations["dynamics"]}, encoding)
        steps = round(per_phase["dynamics"].steps * more / recipe.scale)
        yield f"  dynamics once over the data takes --set dynamics_training.steps={steps}{days} in all"
    if recipe.preset not in _SMALL:
        yield from _memory(settings, contract)
    if measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seconds = training_seconds(settings, contract, device)
        seconds["encoding"] = seconds["tokenizer"] * encoding / per_phase["tokenizer"].flops
        yield (
            f"  on this machine ({device.type}, its layers measured for a moment): "
            f"{_days(sum(seconds.values()))}, of which {_days(seconds['encoding'])} encoding"
        )
    yield (
        f"clones without a world model: {max(1, round(CLONE_STEPS * recipe.scale)):,} steps of each network, "
        "small ones and on the CPU"
    )
    yield f"ingest: {_days(frames / INGEST_HZ / recipe.jobs)} with --jobs {recipe.jobs}, " + (
        f"assumed {INGEST_HZ} frames a second and core; gates and evaluation come on top"
    )


def _on_gpus(recipe: Recipe, operations: Mapping[str, float], encoding: float) -> str:
    """Days by number of GPUs, of which each takes one clip of a batch at least."""
    if recipe.preset in _SMALL:
        return ""
    days = []
    for n in GPU_COUNTS:
        share = on_ranks(training(recipe), n)
        each = sum(share[name] * count for name, count in operations.items()) + encoding / n
        days.append(f"{n} GPU{'s' * (n > 1)} {_days(each / GPU_FLOPS)}")
    return f"; at {GPU_FLOPS:.0e} a second (assumed: a large model on an H100 or H200): {', '.join(days)}"


def _memory(settings: Preset, contract: Contract) -> Iterator[str]:
    """What training takes on each GPU, and whether that is there."""
    each = {
        n: max(cost.train_bytes for cost in costs(settings, contract, n, reduced=True).values())
        for n in (1 << i for i in range(GPU_COUNTS[-1].bit_length()))
    }
    sizes = ", ".join(f"{n} GPU{'s' * (n > 1)} {each[n] / 1e9:,.3g} GB" for n in GPU_COUNTS)
    fits = [n for n, size in each.items() if size <= GPU_BYTES]
    lacks = ""
    if not fits:
        lacks = "; none has so much: give a smaller preset, or shorter clips with --set"
    elif fits[0] > 1:
        lacks = (
            f"; an H200 has {GPU_BYTES / 1e9:.0f} GB, so {fits[0]} are needed, or smaller batches by --set"
        )
    yield f"memory, counted, on each of {sizes}{lacks}"


def hours_of(recipe: Recipe, here: Stock) -> float:
    """Hours of play: what is there, or what will be fetched."""
    return recipe.hours if recipe.index else here.hours


def disk(recipe: Recipe, here: Stock) -> dict[str, float]:
    """GB that each part takes in the end, by what it is."""
    contract, settings, hours = Contract.load(recipe.contract), training(recipe), hours_of(recipe, here)
    frames = round(hours * 3600 * contract.rate_hz)
    held = cache_bytes(contract, frames) / 1e9
    weights = sum(part.parameters for part in costs(settings, contract).values())
    known = "measured" if _is_measured(here) else "assumed"
    return {
        f"recordings ({known} {_rate(here):.2g} GB an hour)": _rate(here) * hours,
        "dataset (assumed, lossless pictures)": PICTURE_SHARE * held,
        "frame cache": held,
        "latents": frames * settings.num_latents * settings.latent_dim * 2 / 1e9,
        "checkpoints": _CHECKPOINTS * len(PHASES) * 16 * weights / 1e9,
    }


def _is_measured(here: Stock) -> bool:
    return here.recordings > 0 and here.hours > 0


def _rate(here: Stock) -> float:
    """GB of recordings an hour."""
    return here.bytes / 1e9 / here.hours if _is_measured(here) else VIDEO_GB_PER_HOUR


def require_space(recipe: Recipe, here: Stock) -> None:
    """Check that the disks are large enough; what is there already counts as free.

    Recordings are written only where they are fetched, and may be on a disk of their own.

    Raises:
        UserError: one of them is not.
    """
    recordings, *made = disk(recipe, here).values()
    fetched = max(0.0, recordings - here.bytes / 1e9) if recipe.index else 0.0
    own = recipe.recordings.resolve()
    kept = sum(
        path.stat().st_size
        for path in recipe.out.rglob("*")
        if path.is_file() and own not in path.resolve().parents
    )
    needed = {recipe.out: max(0.0, sum(made) - kept / 1e9)}
    if _disk_of(recipe.recordings) == _disk_of(recipe.out):
        needed[recipe.out] += fetched
    else:
        needed[recipe.recordings] = fetched
    for place, more in needed.items():
        free = shutil.disk_usage(_existing(place)).free / 1e9
        if more > free:
            option = "--out, or a smaller picture in the contract" if place == recipe.out else "--recordings"
            raise UserError(
                f"about {more:,.1f} GB are needed in {place}, {free:,.1f} GB are free: give fewer --hours, "
                f"another {option}"
            )


def _disk_of(path: Path) -> int:
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _days(seconds: float) -> str:
    return f"{seconds / 86400:,.2g} days" if seconds >= 86400 else f"{seconds / 3600:,.2g} h"


# ---- the steps ----


def plan(recipe: Recipe, here: Stock, given: str = "") -> list[Stage]:
    """The stages in their order.

    Args:
        here: what is there, for the size of an hour.
        given: what the files are that the dataset is made of, see `content`; what is made of others is made
            again.
    """
    out, dataset = recipe.out, recipe.out / "dataset"
    stages = []
    if recipe.index:
        each = recipe.hours * _rate(here) / len(recipe.index)
        fetched = [  # the limit is of all that is in the folder
            command("d4-fetch", source, to=recipe.recordings, limit_gb=f"{n * each:g}", jobs=recipe.jobs)
            for n, source in enumerate(recipe.index, 1)
        ]
        stages.append(Stage("fetch", "fetch recordings", tuple(fetched), (), (), 3600, gated=False))
    needs = ("fetch",) if recipe.index else ()
    ingest = command(
        "d4-ingest", recipe.recordings, contract=recipe.contract, out=dataset, jobs=recipe.jobs,
        skip=recipe.skip or False,
    )  # fmt: skip
    stages.append(Stage("ingest", "make the dataset", (ingest,), needs, (), 3600, gated=False, recipe=given))
    audit = command("d4-audit", dataset, json=out / "audit.json")
    stages.append(Stage("audit", "look through the dataset", (audit,), ("ingest",), (), 600))
    before = "ingest"
    for phase in PHASES:
        stages.append(Stage(phase, f"train the {phase}", (_train(recipe, phase),), (before,), (), 86400))
        before = phase
    clone = command("d4-clone", out / "run", dataset=dataset, steps=max(1, round(CLONE_STEPS * recipe.scale)))
    stages.append(Stage("clone", "clone without a world model", (clone,), (before,), (), 36000))
    return stages


def _train(recipe: Recipe, phase: str) -> Command:
    options: dict[str, Any] = {
        "run": recipe.out / "run", "preset": recipe.preset, "phases": phase, "seed": recipe.seed,
        "scale": recipe.scale, "force": recipe.force, "device": "cuda" if recipe.gpus else "cpu",
        "set": (*EVENTS, *recipe.set),
    }  # fmt: skip
    words = command("d4-train", recipe.out / "dataset", **options)
    if recipe.gpus > 1:
        return ("torchrun", "--nproc-per-node", str(recipe.gpus), "-m", "d4_core.train", *words[1:])
    return words


def listing(folder: Path) -> str:
    """Names and sizes of all recordings in a folder: `d4-ingest` adds those that are new."""
    files = (path for path in folder.rglob("*") if path.suffix in (".mp4", ".jsonl"))
    found = sorted(
        (str(path.relative_to(folder)), path.stat().st_size)
        for path in files
        if not path.name.startswith(".") and path.is_file()
    )
    return json.dumps(found)


def content(recipe: Recipe) -> str:
    """What a dataset is made of: the recordings, the contract, and the list of those to leave out."""
    left_out = sorted(read_names(recipe.skip)) if recipe.skip else []
    return json.dumps([listing(recipe.recordings), Contract.load(recipe.contract).hash, left_out])


def run(recipe: Recipe, here: Stock, say: Callable[[str], None]) -> int:
    """Do what is not done yet; returns the exit code of what failed, or 0.

    Raises:
        UserError: there are no recordings, or none with known actions.
    """
    recipe.out.mkdir(parents=True, exist_ok=True)
    with alone(recipe.out):
        return _run(recipe, here, say)


def _run(recipe: Recipe, here: Stock, say: Callable[[str], None]) -> int:
    stages = plan(recipe, here)
    own_keys = _keys(recipe)
    state = State(recipe.out, stages, own_keys, recipe.force)
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    for number, stage in enumerate(stages, 1):
        if stage.name in ("fetch", "ingest"):  # what is fetched is to be ingested, and so is what was added
            own_keys.update(_keys(recipe))
            state.clear_stale()
        place = f"[{number}/{len(stages)}] {stage.name}"
        if state.is_done(stage.name):
            say(f"{place}: done before, in {clock(state.seconds(stage.name))}")
        elif code := _work(recipe, stage, place, state, env, say):
            spite = ", with --force in spite of gates" if stage.name in PHASES and not recipe.force else ""
            say(f"stopped in {stage.name}, which says why above; the same command goes on from here{spite}")
            return code
        if stage.name == "ingest":
            require_labels(recipe.out / "dataset")
    return 0


def _work(
    recipe: Recipe, stage: Stage, place: str, state: State, env: dict[str, str], say: Callable[[str], None]
) -> int:
    """Run a stage and note it; returns its exit code."""
    say(f"{place}: {stage.title}")
    began, code = time.monotonic(), 1
    try:
        code = _commands(stage.commands, env, say)
        if code == 1 and stage.name == "audit" and recipe.force:
            say("the audit found errors; going on because of --force")
            code = 0
    finally:
        state.note(stage, time.monotonic() - began, done=code == 0)
    return code


def _keys(recipe: Recipe) -> dict[str, str]:
    """Keys of the stages as they are now, the same wherever and however fast they are run."""
    placeless = replace(
        recipe, out=Path("out"), recordings=Path("recordings"), contract=Path("contract"),
        skip=recipe.skip and Path("skip"), jobs=1, gpus=min(1, recipe.gpus),
    )  # fmt: skip
    return keys(plan(placeless, Stock(0, 0.0, 0), content(recipe)))


def _commands(commands: Sequence[Command], env: dict[str, str], say: Callable[[str], None]) -> int:
    for words in commands:
        say(f"$ {shlex.join(words)}")
        if code := run_command(words, env):
            return 128 - code if code < 0 else code
    return 0


def require_labels(dataset: Path) -> None:
    """Check that a dataset has episodes to clone from.

    Raises:
        UserError: no episode has known actions.
    """
    meta = json.loads((dataset / "meta" / "d4.json").read_text())
    episodes = meta["episodes"]
    if not any(episode["labelled"] for episode in episodes):
        raise UserError(
            f"{dataset} has {len(episodes)} episodes and zero labelled ones: no actions are known, so there "
            "is nothing to clone; add recordings whose lines say what mouse and keyboard did"
        )


def require_usable(recipe: Recipe, here: Stock, dry_run: bool = False) -> None:
    """Check what would fail later; GPUs may be elsewhere if the commands are only to be told.

    Raises:
        UserError: the contract is not for this game, or there is nothing to train on.
    """
    contract, settings = Contract.load(recipe.contract), training(recipe)
    require_keyboard_and_mouse(contract, str(recipe.contract))
    settings.tokenizer_config(contract)
    if not recipe.index and not here.recordings:
        raise UserError(
            f"{recipe.recordings} has no recordings (<name>.mp4 and <name>.jsonl): give an index with "
            "--index, or record some with d4-minecraft record"
        )
    if not dry_run and recipe.gpus > torch.cuda.device_count():
        raise UserError(
            f"--gpus {recipe.gpus}: this machine has {torch.cuda.device_count()} that torch can use"
        )
    if not dry_run:  # rather now than after days of fetching
        require_memory_for(recipe)
        require_index(recipe, here)


def require_index(recipe: Recipe, here: Stock) -> None:
    """Check that indexes which are files are there, before anything was fetched from them.

    Raises:
        UserError: one is not.
    """
    for source in recipe.index if not here.recordings else ():
        if "://" not in source and not Path(source).is_file():
            raise UserError(f"--index {source} is neither a file nor an address")


def require_memory_for(recipe: Recipe) -> None:
    """Check that training fits the memory of this machine. Raises UserError for a phase that does not."""
    contract, settings = Contract.load(recipe.contract), training(recipe)
    device = torch.device("cuda" if recipe.gpus else "cpu")
    for phase in PHASES:
        require_memory(settings, contract, phase, device, max(1, recipe.gpus))


def refusals(recipe: Recipe, here: Stock) -> Iterator[str]:
    """What the command would stop at on this machine if it were run."""
    checks = [partial(require_index, recipe, here), partial(require_space, recipe, here)]
    if recipe.gpus <= torch.cuda.device_count():
        checks.append(partial(require_memory_for, recipe))
    else:
        yield f"it has {torch.cuda.device_count()} GPUs that torch can use"
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)
