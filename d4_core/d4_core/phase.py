"""What a training phase is: an object that draws batches and turns them into named losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
Metrics = dict[str, Tensor | float]
Network = TypeVar("Network", bound=nn.Module)

# a loss that has all but vanished is not scaled up any further: its gradient would be noise
_FLOOR = 1e-3


class Normaliser(nn.Module):
    """Divides every loss by its running root mean square, L / sqrt(m) with m <- beta m + (1 - beta) L^2.

    The state is a set of buffers, so that it is saved with a checkpoint, and is averaged over ranks.
    """

    def __init__(self, names: Iterable[str], beta: float = 0.99) -> None:
        super().__init__()
        self.beta = beta
        for name in names:
            self.register_buffer(f"{name}_square", torch.zeros(()))
            self.register_buffer(f"{name}_weight", torch.zeros(()))

    def forward(self, name: str, loss: Tensor) -> Tensor:
        """Normalised loss; updates the statistics."""
        square, weight = getattr(self, f"{name}_square"), getattr(self, f"{name}_weight")
        new = loss.detach().float().square()
        if dist.is_initialized():
            dist.all_reduce(new)
            new = new / dist.get_world_size()
        square.mul_(self.beta).add_(new, alpha=1 - self.beta)
        weight.mul_(self.beta).add_(1 - self.beta)  # bias correction: the first value counts fully
        return loss / (square / weight).sqrt().clamp_min(_FLOOR)


class Phase(nn.Module):
    """One of tokenizer, dynamics, agent, imagination.

    Attributes:
        name: folder of the run it writes to.
        total_steps: length of the phase.
        period: checkpoints are taken at multiples of this many steps.
        loss_weights: names of the losses and their weights after normalisation.
    """

    name: str
    period: int = 1

    def __init__(self, total_steps: int, loss_weights: dict[str, float]) -> None:
        super().__init__()
        self.total_steps, self.loss_weights = total_steps, loss_weights
        self.normaliser = Normaliser(loss_weights)

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """Draw one batch on the host."""
        raise NotImplementedError(f"{type(self).__name__} draws no batches")

    def total(self, losses: Losses) -> Tensor:
        """Weighted sum of the RMS-normalised losses."""
        return sum(self.loss_weights[name] * self.normaliser(name, loss) for name, loss in losses.items())

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters that this phase changes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def group(self, name: str, p: nn.Parameter) -> str:
        """Optimiser group: matrices inside transformer layers go to Muon, heads have their learning rate."""
        if ".layers." in name and p.ndim == 2:
            return "muon"
        return "heads" if name.startswith(("agent.", "policy.", "critic.")) else "adamw"

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """Modules that inference loads, by prefix."""
        raise NotImplementedError(f"{type(self).__name__} saves nothing")


def freeze(module: Network) -> Network:
    """Switch a module to evaluation and take its parameters out of training."""
    return module.eval().requires_grad_(False)


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean of `value` where `mask` (broadcast) is set; zero if it is set nowhere."""
    mask = mask.to(value.dtype).expand_as(value)
    return (value * mask).sum() / mask.sum().clamp_min(1.0)
