"""Optimiser, learning-rate schedule and weight average shared by every phase."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from d4_datasets.errors import UserError

GROUPS = ("muon", "adamw", "heads")
FINAL_LR_SCALE = 0.05  # the decay ends here, not at zero, so that the last steps still move


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser settings of one phase.

    Learning rates are peak values. Fractions are of the phase's total number of steps.
    """

    lr_muon: float = 0.02  # matrices inside transformer blocks (Muon)
    lr: float = 1e-3  # embeddings, norms, biases, projections (AdamW)
    lr_heads: float = 2e-3  # output heads (AdamW)
    weight_decay: float = 0.01  # decoupled, on matrices only
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.3
    clip: float = 1.0  # global gradient norm
    ema: float = 0.995  # decay of the weight average that inference uses; below 1


def lr_scale(step: int, total: int, config: OptimConfig) -> float:
    """Factor of the peak learning rate at 0-based `step` of `total`: warm-up, stable, linear decay to 5 %."""
    warmup = max(1, round(config.warmup_fraction * total))
    decay = max(1, round(config.decay_fraction * total))
    up = min(1.0, (step + 1) / warmup)
    if config.decay_fraction == 0.0 or step < total - decay:
        return up
    down = FINAL_LR_SCALE + (1.0 - FINAL_LR_SCALE) * (total - 1 - step) / decay
    return min(up, down)


class Ema:
    """Exponential moving average of the trained parameters, exact from the first step on.

    The weight of step t is (1 - decay) / (1 - decay ** t), which is the usual bias correction folded
    into the update: after one step the average equals the parameters, later it forgets its start.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._named = dict(named)
        self._decay = decay
        self.tensors: dict[nn.Parameter, Tensor] = {p: p.detach().clone() for p in self._named.values()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the parameters as they are after 0-based `step`."""
        weight = (1.0 - self._decay) / (1.0 - self._decay ** (step + 1))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.tensors), weight)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters by the average, in place (addresses stay, as graphs need)."""
        torch._foreach_copy_(list(self.tensors), list(self.tensors.values()))

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name (views, not copies)."""
        return {name: self.tensors[p] for name, p in self._named.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, p in self._named.items():
            self.tensors[p].copy_(state[name])


class Optimiser:
    """Muon for block matrices and AdamW for the rest, behind one step with schedule, clipping and NaN stop.

    Args:
        phase_name: named in error messages.
        named: the trained parameters by name.
        group: maps (name, parameter) to "muon", "adamw" or "heads".
        config: peak learning rates and the schedule's shape.
        total: number of steps of the phase.
    """

    def __init__(
        self,
        phase_name: str,
        named: Iterable[tuple[str, nn.Parameter]],
        group: Callable[[str, nn.Parameter], str],
        config: OptimConfig,
        total: int,
    ) -> None:
        self._phase_name, self._config, self._total = phase_name, config, total
        self._named = dict(named)
        members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
        for name, p in self._named.items():
            members[group(name, p)].append(p)
        self._optimizers = _build(members, config)
        self._names: dict[Tensor, str] = {p: name for name, p in self._named.items()}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, losses: Mapping[str, Tensor]) -> float:
        """Clip and apply the gradients of 0-based `step`; returns the gradient norm before clipping.

        Raises:
            UserError: a loss or a gradient is NaN or infinite; no weight has been changed then.
        """
        params = [p for p in self._named.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        scalars = [norm, *(loss.detach().float().reshape(()) for loss in losses.values())]
        values: list[float] = torch.stack(scalars).tolist()  # the step's only wait for the device
        if not all(map(math.isfinite, values)):
            raise UserError(self._not_finite(step, dict(zip(losses, values[1:], strict=True))))
        torch.nn.utils.clip_grads_with_norm_(params, self._config.clip, norm)
        scale = lr_scale(step, self._total, self._config)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
        return values[0]

    def state(self) -> dict[str, Tensor]:
        """Optimiser state, flat: "<parameter name>/<entry>" -> tensor (views, not copies)."""
        return {
            f"{self._names[p]}/{key}": value
            for optimizer in self._optimizers
            for p, entries in optimizer.state.items()
            for key, value in entries.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, on the parameters' devices."""
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, entry = key.rsplit("/", 1)
            entries.setdefault(name, {})[entry] = value
        for optimizer in self._optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            packed = {i: entries[self._names[p]] for i, p in enumerate(params) if self._names[p] in entries}
            # load_state_dict knows which entries (AdamW's step) stay on the host.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": packed, "param_groups": groups})

    def _not_finite(self, step: int, losses: Mapping[str, float]) -> str:
        bad = [f"loss {name!r} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not bad:
            name = next(
                (n for n, p in self._named.items() if p.grad is not None and not p.grad.isfinite().all()), "?"
            )
            bad = [f"the gradient of {name!r} is not finite though all losses ({', '.join(losses)}) are"]
        return (
            f"{self._phase_name} step {step}: {' and '.join(bad)}; nothing was updated or saved: "
            "check the data with d4-audit or lower the learning rates, then run the same command again"
        )


def _build(members: Mapping[str, list[nn.Parameter]], config: OptimConfig) -> list[torch.optim.Optimizer]:
    optimizers: list[torch.optim.Optimizer] = []
    if members["muon"]:
        group = {"params": members["muon"], "peak_lr": config.lr_muon}
        optimizers.append(torch.optim.Muon([group], lr=config.lr_muon, weight_decay=config.weight_decay))
    groups = []
    for name, lr in (("adamw", config.lr), ("heads", config.lr_heads)):
        for is_matrix in (True, False):
            params = [p for p in members[name] if (p.ndim >= 2) == is_matrix]
            decay = config.weight_decay if is_matrix else 0.0
            if params:
                groups.append({"params": params, "peak_lr": lr, "weight_decay": decay})
    if groups:
        # Fused on CPU too: there, a loop of small operators costs more than the maths.
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True))
    return optimizers
