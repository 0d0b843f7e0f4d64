"""How long a preset trains: its work is counted, and the speed of this machine is measured for a moment.

python -m d4_core.estimate DATASET...       every preset, a line of JSON each, as d4-audit shows them
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from d4_core.config import PHASES, PRESETS, Preset
from d4_core.distributed import share
from d4_core.loop import computes_reduced
from d4_core.memory import costs, layer_flops, slots
from d4_core.threads import cgroup_quota
from d4_core.transformer import Transformer, TransformerConfig
from d4_datasets import places
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError, run_cli

_HEAD_STEP = 3.0  # a step of heads forward and backward, in forward passes
# Optimiser, losses, data and waiting come on top of the layers: `nano` on two cores (the demo at 9802ba9)
# took 1.9 (tokenizer), 1.9 (dynamics), 2.3 (agent) and 1.1 (imagination) times as long as its layers do.
_REST = 2.0
_PROBE_BYTES = 200e6  # of activations while measuring
# Bytes per parameter in the checkpoints of all four phases together: weights in every phase from the first to
# have them, average and two moments of the optimiser in those that train them.
_SAVED = {"tokenizer": 28, "dynamics": 36, "agent": 32}


@dataclass(frozen=True)
class Work:
    """What a phase has to do.

    Attributes:
        steps: optimiser steps.
        frames: recorded frames that the steps train on, counted as often as they are drawn; for imagination
            the imagined ones.
        flops: floating-point operations of all steps.
    """

    steps: int
    frames: int
    flops: float


def work(preset: Preset, contract: Contract) -> dict[str, Work]:
    """Steps, frames and operations of every phase; gates and cached latents come on top."""
    cost = costs(preset, contract)
    tokenizer, dynamics, heads = (cost[name].flops for name in ("tokenizer", "dynamics", "agent"))
    t, d, a = preset.tokenizer_training, preset.dynamics_training, preset.agent_training
    i = preset.imagination_training
    frames = {
        "tokenizer": t.steps * t.batch,
        "dynamics": d.steps * d.batch * d.length,
        "agent": a.steps * a.batch * a.length,
        "imagination": i.steps * i.batch * i.settings.horizon,
    }
    # The target of the shortcut loss takes two more forward passes of its clips; in the agent phase one half
    # of the clips has it, if there are step sizes to keep.
    shortcut = d.bootstrap_rows > 0
    targets = [2 * c.bootstrap_rows * (1 - c.bootstrap_warmup) * shortcut for c in (d, a.dynamics)]
    encode, dream = _step(preset.tokenizer), _step(preset.dynamics)
    per_frame = {
        "tokenizer": encode * tokenizer,
        "dynamics": (dream + targets[0]) * dynamics,
        "agent": (dream + targets[1] / 2) * dynamics + _HEAD_STEP * heads,
        # A batch of rollouts serves several steps. Each of its frames is sampled and then committed.
        "imagination": (i.settings.steps + 1) * dynamics / i.reuse + _HEAD_STEP * heads,
    }
    steps = dict(zip(PHASES, (t.steps, d.steps, a.steps, i.steps), strict=True))
    return {name: Work(steps[name], frames[name], frames[name] * per_frame[name]) for name in PHASES}


def _step(cfg: TransformerConfig) -> float:
    """A step forward and backward, in forward passes."""
    return 4.0 if cfg.recompute else 3.0


def on_ranks(preset: Preset, ranks: int) -> dict[str, float]:
    """Share of every phase's work that each of `ranks` does: one clip of a batch at least, however many."""
    t, others = preset.tokenizer_training, {name: getattr(preset, f"{name}_training") for name in PHASES[1:]}
    frames = share(t.batch, ranks)
    clips = max(1, frames // t.length) * t.length
    tokenizer = (t.clip_share * clips + (1 - t.clip_share) * frames) / t.batch
    return {"tokenizer": tokenizer} | {n: share(c.batch, ranks) / c.batch for n, c in others.items()}


@functools.cache
def speed(cfg: TransformerConfig, width: int, device: torch.device) -> float:
    """Floating-point operations per second of a few layers of a network with `width` slots a frame, forward
    and backward in the precision of training.

    On a CPU one core is measured by the time that it worked, and all of them are taken to be free: what else
    runs at the moment says nothing about the night.
    """
    small = replace(cfg, depth=cfg.time_every)
    frames = max(1, int(_PROBE_BYTES / (160 * cfg.dim * small.depth * width)))
    clip = min(frames, 8)
    network = Transformer(small).to(device)
    x = torch.randn(max(1, frames // clip), clip, width, cfg.dim, device=device)
    reduced = computes_reduced(device)
    on_cpu, threads, taken = device.type == "cpu", torch.get_num_threads(), []
    clock = time.process_time if on_cpu else time.perf_counter
    torch.set_num_threads(1)
    for _ in range(3):
        began = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            loss = network(x).float().square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - began)
    torch.set_num_threads(threads)
    flops = _step(cfg) * x.shape[0] * clip * width * layer_flops(cfg, width) * small.depth
    cores = max(1.0, min(len(os.sched_getaffinity(0)), cgroup_quota())) if on_cpu else 1.0
    return cores * flops / min(taken[1:])  # the first pays for the start


def training_seconds(preset: Preset, contract: Contract, device: torch.device) -> dict[str, float]:
    """Seconds of every phase on this machine, gates not included: right within a factor of two or so."""
    largest = PRESETS["base"]  # larger ones take many seconds of a CPU to measure, and are as fast as this
    is_larger = device.type == "cpu" and preset.dynamics.dim > largest.dynamics.dim
    measured = largest if is_larger else preset
    width = slots(measured, contract)
    speeds = {
        "tokenizer": speed(measured.tokenizer, width["tokenizer"], device),
        "dynamics": speed(measured.dynamics, width["dynamics"], device),
    }
    return {
        name: _REST * w.flops / speeds.get(name, speeds["dynamics"])
        for name, w in work(preset, contract).items()
    }


# ---- for d4-audit


def facts(name: str, preset: Preset, contract: Contract, frames: int) -> dict[str, Any]:
    """What a preset takes to train on `frames` recorded frames: parameters, bytes of memory, seconds on this
    machine by phase, how often dynamics training sees each frame, bytes on the disk beside the dataset and
    its frame cache; or `reason`, why it does not fit the contract.
    """
    try:
        cost = costs(preset, contract, reduced=computes_reduced(this_device()))
    except UserError as error:
        return {"preset": name, "reason": str(error)}
    tokenizer = preset.tokenizer_config(contract)
    seconds = training_seconds(preset, contract, this_device())
    return {
        "preset": name,
        "parameters": sum(c.parameters for c in cost.values()),
        "train_bytes": max(c.train_bytes for c in cost.values()),
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "device": this_device().type,
        "seen": work(preset, contract)["dynamics"].frames / frames,
        "latents_bytes": 2 * frames * tokenizer.num_tokens * tokenizer.token_dim,
        "checkpoints_bytes": sum(_SAVED[part] * c.parameters for part, c in cost.items()),
    }


def this_device() -> torch.device:
    """Where training would run on this machine."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _main(datasets: Sequence[str]) -> None:
    metas = [places.about(place) for place in places.expand(datasets)]
    contract = Contract.from_dict(metas[0]["contract"], datasets[0])
    frames = sum(episode["frames"] for meta in metas for episode in meta["episodes"])
    for name, preset in PRESETS.items():
        print(json.dumps(facts(name, preset, contract, frames)), flush=True)


if __name__ == "__main__":
    run_cli(lambda: _main(sys.argv[1:]))
