"""What a model costs: parameters, FLOPs and memory, counted before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from d4_core.config import Preset
from d4_core.distributed import share
from d4_core.models import build
from d4_core.transformer import TransformerConfig
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

# weights, gradient, EMA and two optimiser moments in float32
_BYTES_PER_PARAMETER = 4 * 5
# activations that backward keeps, per token and layer, in units of the width, measured on `nano` and `small`
_ACTIVATIONS = 40


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


def costs(preset: Preset, contract: Contract, ranks: int = 1) -> dict[str, Cost]:
    """Cost of tokenizer, dynamics and agent for a contract; memory of each of `ranks` sharing a batch."""
    with torch.device("meta"):
        models = build(preset, contract, "agent")
    assert models.dynamics is not None
    assert models.agent is not None
    tok, dyn, width = models.tokenizer.cfg, models.dynamics.cfg, slots(preset, contract)
    t, d = preset.tokenizer_training, preset.dynamics_training
    longest = t.length if t.clip_share else 1
    frames = {"tokenizer": max(longest, share(t.batch, ranks)), "dynamics": share(d.batch, ranks) * d.length}
    shape: dict[str, tuple[nn.Module, TransformerConfig, int, int]] = {
        "tokenizer": (models.tokenizer, tok.transformer, width["tokenizer"], 2),
        "dynamics": (models.dynamics, dyn.transformer, width["dynamics"], 1),
    }
    out = {}
    for name, (module, cfg, count, stacks) in shape.items():
        per_frame = stacks * count * (layer_flops(cfg, count) * cfg.depth)
        kept = 4 * _ACTIVATIONS * cfg.dim * cfg.depth * count * stacks * frames[name]
        out[name] = Cost(_count(module), per_frame, _BYTES_PER_PARAMETER * _count(module) + kept)
    heads = _count(models.agent)
    both = out["dynamics"].train_bytes + _BYTES_PER_PARAMETER * heads
    out["agent"] = Cost(heads, 2.0 * heads, both)
    return out


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
    cost = costs(preset, contract, ranks)
    needed, free = cost.get(phase, cost["agent"]).train_bytes, available_bytes(device)
    needed *= ranks if device.type == "cpu" else 1
    if needed > free:
        raise UserError(
            f"{phase} of this preset needs about {needed / 2**30:.1f} GiB but {free / 2**30:.1f} GiB are "
            f"free on {device.type}: choose a smaller preset or lower the batch size with --set"
        )
