"""What a model costs: parameters, FLOPs and memory, counted before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from d4_core.config import Preset
from d4_core.distributed import share
from d4_core.loop import computes_reduced
from d4_core.models import build
from d4_core.transformer import TransformerConfig
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

# weights, gradient, EMA and two optimiser moments in float32
_BYTES_PER_PARAMETER = 4 * 5
# What backward keeps per token and layer, without and with bfloat16 (the tests count it): floats as many
# times the width, as many more for each unit of mlp_ratio, and bytes for each logit of a head.
_KEPT = {False: (10, 4, 8), True: (7, 2, 8)}
# Layers' worth of gradients, and of results that backward does not keep, at the peak: counted 0.3, and 1.4 if
# layers are run again, in 8 layers 256 wide on 4480 tokens; allocators leave gaps.
_WORKING, _WORKING_AGAIN = 1, 2


@dataclass(frozen=True)
class Cost:
    """Cost of one network.

    Attributes:
        parameters: number of parameters.
        flops: floating-point operations of one frame's forward pass (a multiply-add counts as two).
        train_bytes: memory of a training step.
    """

    parameters: int
    flops: float
    train_bytes: float


def costs(preset: Preset, contract: Contract, ranks: int = 1, reduced: bool = False) -> dict[str, Cost]:
    """Cost of tokenizer, dynamics and agent for a contract.

    Args:
        ranks: processes that share a batch; memory is that of one of them.
        reduced: whether layers compute in bfloat16 (`loop.computes_reduced`).
    """
    with torch.device("meta"):
        models = build(preset, contract, "agent")
    assert models.dynamics is not None
    assert models.agent is not None
    tok, dyn, width = models.tokenizer.cfg, models.dynamics.cfg, slots(preset, contract)
    clips = _batches(preset, ranks)
    shape: dict[str, tuple[nn.Module, TransformerConfig, int, int]] = {
        "tokenizer": (models.tokenizer, tok.transformer, width["tokenizer"], 2),
        "dynamics": (models.dynamics, dyn.transformer, width["dynamics"], 1),
    }
    out = {}
    for name, (module, cfg, count, stacks) in shape.items():
        per_frame = stacks * count * (layer_flops(cfg, count) * cfg.depth)
        kept = max(activation_bytes(cfg, count, *batch, stacks, reduced) for batch in clips[name])
        out[name] = Cost(_count(module), per_frame, _BYTES_PER_PARAMETER * _count(module) + kept)
    heads = _count(models.agent)
    weights = _BYTES_PER_PARAMETER * (out["dynamics"].parameters + heads)
    kept = max(
        activation_bytes(dyn.transformer, width["dynamics"], *batch, reduced=reduced)
        for batch in clips["agent"]
    )
    out["agent"] = Cost(heads, 2.0 * heads, weights + kept)
    return out


def _batches(preset: Preset, ranks: int) -> dict[str, list[tuple[int, int]]]:
    """Clips and their frames in each kind of batch that a rank draws, as the phases do."""
    t, d, a = preset.tokenizer_training, preset.dynamics_training, preset.agent_training
    alone, batch, half = share(t.batch, ranks), share(d.batch, ranks), share(a.batch, ranks)
    tokenizer = [(alone, 1)] + [(max(1, alone // t.length), t.length)] * (t.clip_share > 0)
    return {
        "tokenizer": tokenizer,
        "dynamics": [(batch, d.length), (max(1, batch * d.length // d.long_length), d.long_length)],
        "agent": [(max(2, half * a.length // length), length) for length in (a.length, a.long_length)],
    }


def activation_bytes(
    cfg: TransformerConfig, slots: int, clips: int, length: int, stacks: int = 1, reduced: bool = False
) -> float:
    """What a step keeps for its backward pass, and works with: clips of `length` frames of `slots` tokens."""
    fixed, mlp, logit = _KEPT[reduced]
    space, time = (
        4 * (fixed + mlp * cfg.mlp_ratio) * cfg.dim + logit * cfg.heads * keys for keys in (slots, length)
    )
    depth = stacks * cfg.depth
    kept = depth * ((cfg.time_every - 1) * space + time) / cfg.time_every
    working = _WORKING * max(space, time)
    if cfg.recompute:
        kept, working = depth * 4 * cfg.dim, _WORKING_AGAIN * max(space, time)
    return clips * length * slots * (kept + working)


def slots(preset: Preset, contract: Contract) -> dict[str, int]:
    """Tokens of one frame in tokenizer (encoder or decoder) and dynamics."""
    tok, dyn = preset.tokenizer_config(contract), preset.dynamics_config(contract)
    patches = sum((c.height // tok.patch) * (c.width // tok.patch) for c in tok.cameras)
    return {
        "tokenizer": tok.num_latents + patches + len(tok.vectors),
        "dynamics": dyn.world_slots + dyn.agent_tokens,
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def layer_flops(cfg: TransformerConfig, slots: int) -> float:
    """FLOPs of one layer per token, averaged over space and time layers."""
    width, keys = cfg.dim, cfg.kv_heads * cfg.head_dim
    matrices = 2 * width * width + 2 * width * keys + 3 * width * int(width * cfg.mlp_ratio)
    space, time = slots, cfg.context
    seen = ((cfg.time_every - 1) * space + time) / cfg.time_every
    return 2 * matrices + 4 * width * seen


def available_bytes(device: torch.device) -> float:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def require_memory(
    preset: Preset, contract: Contract, phase: str, device: torch.device, ranks: int = 1
) -> None:
    """Refuse a phase that cannot fit, before anything is trained; on a CPU the ranks share the memory.

    Raises:
        UserError: with the memory needed and the memory free.
    """
    cost = costs(preset, contract, ranks, reduced=computes_reduced(device))
    needed, free = cost.get(phase, cost["agent"]).train_bytes, available_bytes(device)
    needed *= ranks if device.type == "cpu" else 1
    if needed > free:
        again = "tokenizer" if phase == "tokenizer" else "dynamics"
        slower = "" if getattr(preset, again).recompute else f", or {again}.recompute=true, which costs time,"
        raise UserError(
            f"{phase} of this preset needs about {needed / 2**30:.1f} GiB but {free / 2**30:.1f} GiB are "
            f"free on {device.type}: choose a preset that needs less (not every smaller one does), or "
            f"smaller batches or shorter clips{slower} with --set"
        )
