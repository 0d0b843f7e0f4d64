"""Agent tokens and heads (paper section 3.3): task embedding, policy, reward, continuation and value.

Heads read h_t, the concatenated outputs of the agent tokens of block t, which has seen frame t and a_{t-1};
with `world_tokens`, those of its spatial tokens as well.
Policy lead n predicts a_{t+n} (lead 0: the outgoing action); reward lead n predicts r_{t+n} (lead 0: the
reward that arrived with frame t); the continuation head says whether frame t is not terminal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d4_core.actions import ActionSpace, two_hot
from d4_core.transformer import RMSNorm


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Shape of the heads.

    Attributes:
        num_tasks: rows of the task embedding.
        world_tokens: spatial tokens of a frame that the heads read besides the agent tokens (paper: 0).
        leads: length of multi-token prediction, lead 0 included (paper: 8).
        hidden: width of the heads' two hidden layers.
        reward_bins, reward_range: bins of the two-hot reward head and their limits in symlog space.
        value_bins, value_range: the same for the value head.
    """

    num_tasks: int
    world_tokens: int = 0
    leads: int = 8
    hidden: int = 256
    reward_bins: int = 41
    reward_range: tuple[float, float] = (-1.0, 1.0)
    value_bins: int = 81
    value_range: tuple[float, float] = (-1.0, 4.0)


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """Inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(x.abs())


class TwoHot(nn.Module):
    """Distribution over log-spaced bins: centres are symexp of an even grid (Dreamer 3's two-hot head)."""

    centres: Tensor

    def __init__(self, bins: int, limits: tuple[float, float]) -> None:
        super().__init__()
        self.register_buffer("centres", symexp(torch.linspace(*limits, bins)), persistent=False)

    def log_prob(self, logits: Tensor, value: Tensor) -> Tensor:
        """Two-hot cross-entropy, negated: (..) nats for logits (.., bins) and values (..)."""
        return (two_hot(value, self.centres) * logits.float().log_softmax(-1)).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """Expected value (..)."""
        return (logits.float().softmax(-1) * self.centres).sum(-1)

    def concentrate(self, bias: Tensor, around: float = 0.0) -> None:
        """Initialise an output bias (.., bins) near one value: a uniform start predicts the middle bin."""
        with torch.no_grad():
            bias.copy_(-6.0 * (symlog(self.centres) - around).abs().expand_as(bias))


class Head(nn.Module):
    """Two-layer MLP with one output block per lead; the output starts at zero weight."""

    def __init__(self, inputs: int, hidden: int, outputs: int, leads: int = 1) -> None:
        super().__init__()
        self.inputs, self.leads = inputs, leads
        self.trunk = nn.Sequential(
            nn.Linear(inputs, hidden), RMSNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), RMSNorm(hidden), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Linear(hidden, leads * outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor) -> Tensor:
        """(.., inputs) to (.., leads, outputs)."""
        return self.read(self.trunk(h))

    def read(self, features: Tensor) -> Tensor:
        """Outputs (.., leads, outputs) of the trunk's features (.., hidden)."""
        return self.out(features).unflatten(-1, (self.leads, -1))

    def first(self, h: Tensor) -> Tensor:
        """(.., inputs) to (.., outputs) of lead 0."""
        return self(h)[..., 0, :]


class Agent(nn.Module):
    """Task embedding and the heads trained in agent finetuning.

    Args:
        cfg: shapes.
        space: action space of the dynamics model.
        dim: width of the dynamics transformer.
        num_tokens: agent tokens G of one block.
    """

    def __init__(self, cfg: AgentConfig, space: ActionSpace, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.cfg, self.num_tokens = cfg, num_tokens
        self.space = space
        self.task = nn.Parameter(0.5 * torch.randn(cfg.num_tasks, num_tokens, dim))
        inputs = dim * (num_tokens + cfg.world_tokens)
        self.reward_dist = TwoHot(cfg.reward_bins, cfg.reward_range)
        self.policy = Head(inputs, cfg.hidden, space.num_params, cfg.leads)
        self.reward = Head(inputs, cfg.hidden, cfg.reward_bins, cfg.leads)
        self.proceed = Head(inputs, cfg.hidden, 1)
        self.reward_dist.concentrate(self.reward.out.bias.view(cfg.leads, -1))

    def tokens(self, task: Tensor) -> Tensor:
        """Tasks (..) int64 to agent-token inputs (.., G, D)."""
        return self.task[task]

    @staticmethod
    def readout(agent_RD: Tensor) -> Tensor:
        """Outputs (.., R, D) to h (.., R * D), R = G + `world_tokens`: in training as on the robot."""
        return agent_RD.flatten(-2).float()

    def predict_reward(self, h: Tensor) -> Tensor:
        """Expected reward (..) that arrived with the frame of h."""
        return self.reward_dist.mean(self.reward.first(h))

    def predict_continue(self, h: Tensor) -> Tensor:
        """Probability (..) that the frame of h is not terminal."""
        return self.proceed.first(h)[..., 0].float().sigmoid()


class Critic(nn.Module):
    """State-value head, born in imagination training."""

    def __init__(self, cfg: AgentConfig, inputs: int) -> None:
        super().__init__()
        self.dist = TwoHot(cfg.value_bins, cfg.value_range)
        self.head = Head(inputs, cfg.hidden, cfg.value_bins)
        self.expect(0.0)

    def expect(self, value: float) -> None:
        """Begin with about this value everywhere: until the level is right, advantages say nothing."""
        level = math.copysign(math.log1p(abs(value)), value)  # symlog
        self.dist.concentrate(self.head.out.bias.view(1, -1), level)

    def forward(self, h: Tensor) -> Tensor:
        """Value estimate (..) of h (.., inputs)."""
        return self.dist.mean(self.head.first(h))

    def log_prob(self, h: Tensor, target: Tensor) -> Tensor:
        """Log-likelihood (..) of return targets (..)."""
        return self.dist.log_prob(self.head.first(h), target)
