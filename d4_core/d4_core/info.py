"""``d4-info``: what is installed here, what a bag, dataset or run holds, and what a preset costs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import torch
import tyro
from safetensors import safe_open

from d4_core import checkpoint, threads
from d4_core.config import PHASES, PRESETS, Preset, preset
from d4_core.estimate import this_device, training_seconds, work
from d4_core.loop import computes_reduced
from d4_core.memory import available_bytes, costs
from d4_core.models import preset_of
from d4_datasets import places, whole
from d4_datasets.audit_text import time_text
from d4_datasets.bags import Bag, find_bags
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError, run_cli
from d4_datasets.latents import Origin
from d4_datasets.places import Place

_PACKAGES = ("torch", "numpy", "opencv-python-headless", "av", "pyarrow", "safetensors", "rosbags", "mujoco")
_CODECS = {
    "libx264rgb": "frames of a dataset are stored with it, without loss",
    "libx264": "clips of rollouts and reports are made with it",
}
_GL = {"egl": ("EGL", "libegl1"), "osmesa": ("OSMesa", "libosmesa6"), "glfw": ("GL", "libgl1 and a display")}


@dataclass(frozen=True)
class Fact:
    """One line: what, its value, and, where something is missing, what to do about it."""

    name: str
    value: str
    missing: str = ""


@dataclass
class InfoArgs:
    """Say what is installed here; or what a bag, dataset, run or checkpoint holds; or what a preset costs."""

    path: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Bag, dataset (a folder, a URL, or a text file that lists such; or several), run folder or checkpoint
    folder; without it the installation is described."""
    preset: str | None = None
    """Say what this preset (nano, small, base, large, paper, or all) costs for --contract or the dataset:
    parameters, FLOPs, memory, and the time that training takes on this machine."""
    contract: Path | None = None
    """robot.yaml that the preset is counted for; a dataset brings its own."""


def main() -> None:
    """Entry point of ``d4-info``."""
    run_cli(lambda: _main(tyro.cli(InfoArgs, prog="d4-info")))


def _main(args: InfoArgs) -> None:
    datasets = _datasets(args.path)
    described = args.contract is not None or bool(datasets)
    if (args.contract is not None and args.preset is None) or (args.preset is not None and not described):
        raise UserError(
            "--preset and --contract belong together: d4-info --preset paper --contract robot.yaml; "
            "or name a dataset: d4-info DATASET --preset paper"
        )
    if len(args.path) > 1 and not datasets:
        raise UserError("several paths are described together only if all of them are datasets; give one")
    if args.preset is not None:
        _print(_cost_facts(args.preset, args.contract, datasets))
    if datasets:
        _print(dataset_facts(datasets))
    elif args.path:
        _print(path_facts(Path(args.path[0])))
    elif args.preset is None:
        _print(installation())


def _datasets(path: Sequence[str]) -> list[str]:
    """The datasets that are meant; none if the path is of something else."""
    if not path:
        return []
    if len(path) == 1 and not places.is_url(path[0]) and Path(path[0]).suffix not in (".txt", ".list"):
        return list(path) if places.is_dataset(path[0]) else []
    return places.expand(path)


def _print(facts: list[Fact]) -> None:
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        print(f"{fact.name:{width}}  {fact.value}".rstrip())
    missing = [fact for fact in facts if fact.missing]
    for fact in missing:
        print(f"MISSING {fact.name}: {fact.missing}")


# -- this machine --------------------------------------------------------------------------------------------


def installation() -> list[Fact]:
    """Versions, devices and libraries of this machine, with what is missing and what to do."""
    facts = [Fact("d4", _version("d4") or "from source"), Fact("python", platform.python_version())]
    facts += [_package(name) for name in _PACKAGES]
    facts.append(_gpu())
    facts.append(_gl())
    facts += [_codec(name, use) for name, use in _CODECS.items()]
    facts.append(_cores())
    free, disk = available_bytes(torch.device("cpu")), shutil.disk_usage(Path.cwd()).free
    facts += [Fact("memory", f"{_bytes(free)} free"), Fact("disk", f"{_bytes(disk)} free here")]
    ros = os.environ.get("ROS_DISTRO")
    facts.append(Fact("ROS 2", ros or "not sourced (not needed: bags are read without it)"))
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(name: str) -> Fact:
    found = _version(name)
    what = "" if found else f"install it with {sys.executable} -m pip install {name}"
    return Fact(name, found or "-", what)


def _gpu() -> Fact:
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia").exists()
        hint = f"there is a driver, but torch {torch.__version__} is built without CUDA: install one that is"
        return Fact("GPU", "none that torch can use", hint if driver and torch.version.cuda is None else "")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Fact("GPU", f"{', '.join(names)} (CUDA {torch.version.cuda})")


def _gl() -> Fact:
    """Off-screen OpenGL for the simulator; found by looking, not by starting it."""
    if find_spec("mujoco") is None:
        return Fact("OpenGL", "-", "the simulator needs mujoco")
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    usable = [name for name, (library, _) in _GL.items() if find_library(library)]
    if chosen in _GL and chosen not in usable:
        return Fact(
            "OpenGL", f"MUJOCO_GL={chosen}", f"its library is not there: apt-get install {_GL[chosen][1]}"
        )
    if not {"egl", "osmesa"} & {*usable, chosen}:
        return Fact(
            "OpenGL", "-", "rendering without a display needs: apt-get install libegl1 libgl1 or libosmesa6"
        )
    by = f"MUJOCO_GL={chosen}" if chosen else "MUJOCO_GL is not set: chosen when the simulator starts"
    return Fact("OpenGL", f"{', '.join(usable)} ({by})")


def _codec(name: str, use: str) -> Fact:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        return Fact(name, "-", f"{use}; install av from PyPI, whose FFmpeg has it")
    return Fact(name, "yes")


def _cores() -> Fact:
    free, mine = threads.free_cores(), len(os.sched_getaffinity(0))
    return Fact(
        "cores", f"{free} of {mine} free now" + ("" if free > 1 or mine == 1 else " (others are busy)")
    )


# -- what lies at a path -------------------------------------------------------------------------------------


def path_facts(path: Path) -> list[Fact]:
    """Facts about a dataset, checkpoint, run or bag.

    Raises:
        UserError: it is none of them.
    """
    if places.is_dataset(str(path)):
        return dataset_facts(path)
    if (path / checkpoint.CONFIG).exists():
        return checkpoint_facts(path)
    if any(checkpoint.exists(path / phase) for phase in PHASES):
        return run_facts(path)
    try:
        bags = find_bags(path)
    except UserError:
        raise UserError(f"{path} is no dataset, run, checkpoint or bag; give the folder of one") from None
    return bag_facts(bags[0]) if len(bags) == 1 else [Fact("bags", str(len(bags))), *map(_bag_line, bags)]


def dataset_facts(where: Place | Sequence[Place]) -> list[Fact]:
    """Episodes, frames, hours, labels and contract of a dataset, or of several together; reads their metadata
    only.

    Raises:
        UserError: there is none, or they are not of one robot.
    """
    found = places.expand(where)
    metas = [places.about(place) for place in found]
    contracts = [
        Contract.from_dict(meta["contract"], place) for meta, place in zip(metas, found, strict=True)
    ]
    contract, meta = contracts[0], metas[0]
    places.require_one_robot(dict(zip(found, contracts, strict=True)))
    episodes = [episode for each in metas for episode in each["episodes"]]
    frames = sum(e["frames"] for e in episodes)
    labelled = [e for e in episodes if e["labelled"]]
    share = sum(e["labelled"] for e in episodes) / max(1, frames)
    local = [Path(place) for place in found if not places.is_url(place)]
    size = sum(_files_bytes(root) for root in local)
    lengths = [e["frames"] for e in episodes] or [0]
    ended = sum(bool(e["terminal"]) for e in episodes)
    spread = f"{min(lengths)} to {max(lengths)} frames, median {np.median(lengths):.0f}"
    several = [Fact("datasets", f"{len(found)}")] if len(found) > 1 else []
    several += [
        Fact(
            f"  {place}",
            f"{len(each['episodes'])} episodes, {sum(e['frames'] for e in each['episodes'])} frames",
        )
        for place, each in zip(found, metas, strict=True)
        if len(found) > 1
    ]
    return [
        *(several or [Fact("dataset", found[0])]),
        Fact("episodes", f"{len(episodes)} ({spread}); {ended} end in a terminal"),
        Fact("frames", f"{frames}, {frames / contract.rate_hz / 3600:.3g} h at {contract.rate_hz:g} Hz"),
        *([Fact("as", f"latents of {Origin(**meta['latents'])}")] if "latents" in meta else []),
        Fact("labelled", f"{share:.1%} of the frames, in {len(labelled)} episodes"),
        *([Fact("on disk", f"{_bytes(size)} without the frame cache")] if local else []),
        *contract_facts(contract),
    ]  # fmt: skip


def _files_bytes(root: Path) -> int:
    """Bytes of a dataset without its cache, which may hold many times as much."""
    parts = [path for path in root.iterdir() if path.name != "cache"]
    files = (file for part in parts for file in (part.rglob("*") if part.is_dir() else [part]))
    return sum(file.stat().st_size for file in files if file.is_file())


def contract_facts(contract: Contract) -> list[Fact]:
    """A contract in a few lines."""
    cameras = [f"{c.name} {c.size[0]}x{c.size[1]}" for c in contract.images if c.size]
    vectors = [f"{v.name} [{len(v.select)}]{' (probe)' * (v.role == 'probe')}" for v in contract.vectors()]
    limits = zip(contract.action_names, contract.action_low, contract.action_high, strict=True)
    reward = contract.reward.topic if contract.reward else "none: imitation only"
    return [
        Fact("contract", f"{contract.name}, {contract.hash[:12]}"),
        Fact("observes", ", ".join(cameras + vectors)),
        Fact("acts", ", ".join(f"{name} {low:g}..{high:g}" for name, low, high in limits)),
        Fact("tasks", ", ".join(contract.task_names)),
        Fact("reward", reward),
    ]


def checkpoint_facts(folder: Path) -> list[Fact]:
    """Phase, progress, metrics, parameters and FLOPs of a checkpoint; loads no weights."""
    config = checkpoint.load_config(folder)
    contract = Contract.load(checkpoint.resolve(folder) / "contract.yaml")
    facts = [
        Fact("checkpoint", str(folder)),
        Fact(
            "phase",
            f"{config['phase']}, {config['status']}, step {config['step']} of {config['total_steps']}",
        ),
        Fact("trained on", str(config["config"].get("data", "not recorded"))),
    ]
    metrics = config.get("metrics", {})
    facts.append(Fact("metrics", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())))
    counts = _stored_parameters(checkpoint.resolve(folder))
    flops = {name: cost.flops for name, cost in costs(preset_of(folder, config), contract).items()}
    for name, count in counts.items():
        work = f", {_si(flops[name])}FLOPs per frame" if name in flops else ""
        facts.append(Fact(f"{name} network", f"{_si(count)}parameters{work}"))
    return facts + contract_facts(contract)


def _stored_parameters(folder: Path) -> dict[str, int]:
    """Numbers stored per network, from the file's header."""
    counts: dict[str, int] = {}
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            name = key.split(".")[0]
            counts[name] = counts.get(name, 0) + int(np.prod(file.get_slice(key).get_shape()))
    return counts


def run_facts(run: Path) -> list[Fact]:
    """The phases of a run and what their gates said."""
    gates = whole.read_json(run / "gates.json", dict)
    facts = [Fact("run", str(run))]
    for phase in PHASES:
        if not checkpoint.exists(run / phase):
            facts.append(Fact(phase, "not run"))
            continue
        config = checkpoint.load_config(run / phase)
        failed = [gate["name"] for gate in gates.get(phase, []) if not gate["ok"]]
        verdict = (
            f"{len(failed)} of {len(gates[phase])} gates FAILED: {', '.join(failed)}"
            if failed
            else "gates passed"
        )
        known = verdict if gates.get(phase) else "no gates"
        facts.append(
            Fact(phase, f"{config['status']}, step {config['step']} of {config['total_steps']}; {known}")
        )
    last = [run / phase for phase in PHASES if checkpoint.exists(run / phase)][-1]
    return [*facts, *checkpoint_facts(last)]


def bag_facts(path: Path) -> list[Fact]:
    """Topics of a bag with type, count and rate: what a contract can name."""
    bag = Bag(path)
    stamps: dict[str, list[int]] = {topic: [] for topic in bag.topics}
    times: list[int] = []
    for topic, receive, _ in bag.raw(list(bag.topics)):
        stamps[topic].append(receive)
        times.append(receive)
    facts = [Fact("bag", f"{path}, {_span(times):.1f} s")]
    for topic, own in stamps.items():
        rate = f", {(len(own) - 1) / _span(own):.1f} Hz" if _span(own) > 0 else ""
        known = "" if bag.decodable(topic) else ", type unknown"
        facts.append(Fact(topic, f"{bag.topics[topic]}, {len(own)} messages{rate}{known}"))
    return facts + [Fact("warning", text) for text in bag.report.warnings]


def _span(times: list[int]) -> float:
    return (times[-1] - times[0]) / 1e9 if times else 0.0


def _bag_line(path: Path) -> Fact:
    try:
        return Fact(str(path), ", ".join(Bag(path).topics))
    except UserError as error:
        return Fact(str(path), str(error))


# -- presets -------------------------------------------------------------------------------------------------


def preset_facts(settings: Preset, contract: Contract) -> list[Fact]:
    """Parameters, FLOPs and training memory of every network, counted without allocating it."""
    facts, total = [], 0
    for name, cost in costs(settings, contract, reduced=computes_reduced(this_device())).items():
        total += cost.parameters
        facts.append(
            Fact(name, f"{_si(cost.parameters)}parameters, {_si(cost.flops)}FLOPs per frame, "
                       f"about {_bytes(cost.train_bytes)} to train")
        )  # fmt: skip
    return [*facts, Fact("total", f"{_si(total)}parameters for {contract.name}")]


def _cost_facts(name: str, path: Path | None, datasets: Sequence[str]) -> list[Fact]:
    """What a preset (or each of them) costs for a contract, or for datasets and their contract."""
    metas = [places.about(place) for place in datasets]
    frames = sum(e["frames"] for meta in metas for e in meta["episodes"]) or None
    contract = (
        Contract.load(path) if path is not None else Contract.from_dict(metas[0]["contract"], datasets[0])
    )
    if name != "all":
        return [*preset_facts(preset(name), contract), *time_facts(preset(name), contract, frames)]
    return [_preset_line(name, settings, contract, frames) for name, settings in PRESETS.items()]


def time_facts(settings: Preset, contract: Contract, frames: int | None = None) -> list[Fact]:
    """How long each phase trains on this machine, and how often it sees each of `frames` frames."""
    facts, tasks = [], work(settings, contract)
    seconds = training_seconds(settings, contract, this_device())
    for phase, task in tasks.items():
        text = f"about {time_text(seconds[phase])} for {task.steps} steps"
        if frames and phase != "imagination":
            text += f", each frame {task.frames / frames:.3g} times"
        facts.append(Fact(f"{phase} time", text))
    where = "GPU" if this_device().type == "cuda" else "CPU if all its cores are free"
    return [*facts, Fact("total time", f"about {time_text(sum(seconds.values()))} on this machine's {where}")]


def _preset_line(name: str, settings: Preset, contract: Contract, frames: int | None) -> Fact:
    try:
        cost = costs(settings, contract, reduced=computes_reduced(this_device()))
    except UserError as error:
        return Fact(name, f"does not fit: {error}")
    count, size = sum(c.parameters for c in cost.values()), max(c.train_bytes for c in cost.values())
    took = sum(training_seconds(settings, contract, this_device()).values())
    text = f"{_si(count)}parameters, {_bytes(size)} to train, about {time_text(took)} here"
    seen = work(settings, contract)["dynamics"].frames
    return Fact(name, text + (f"; dynamics sees each frame {seen / frames:.3g} times" if frames else ""))


def _si(value: float) -> str:
    """Three digits and a prefix: 1.6 G, 400 M."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {prefix} "
    return f"{value:.3g} "


def _bytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
