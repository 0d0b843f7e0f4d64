"""Action spaces: any mix of continuous, binary and categorical parts, to tokens and to distributions.

An action is one float vector (.., A) in the units of the contract, whatever its parts: a binary part holds 0
or 1, a categorical part the class number. Parts are encoded separately and summed (paper section 3.2); an
unlabelled frame carries the learned base embedding alone, which differs from every labelled action, "no key
pressed" included.

Continuous parts are predicted as one categorical per dimension over evenly spaced bins. The paper's own
action distributions are categorical and Bernoulli, too: they can be multimodal, their KL is closed and their
log-likelihood is bounded, where a squashed Gaussian diverges on mixed-quality data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ActionPart:
    """One part of an action vector.

    Attributes:
        kind: "continuous", "binary" or "categorical".
        low, high: limits per dimension in contract units (continuous), else unused.
        size: number of vector entries (continuous, binary) or 1 (categorical).
        classes: number of classes (categorical).
    """

    kind: str
    size: int = 1
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    classes: int = 0


class ActionSpace(nn.Module):
    """Splits action vectors into parts, and turns head outputs into distributions over them.

    Args:
        parts: the parts in vector order.
        bins: bins per continuous dimension; odd, so that the middle of the range is a bin.
    """

    low: Tensor
    high: Tensor
    centres: Tensor

    def __init__(self, parts: tuple[ActionPart, ...], bins: int = 15) -> None:
        super().__init__()
        self.parts, self.bins = parts, bins
        self.size = sum(p.size for p in parts)
        self.num_params = sum(self._params(p) for p in parts)
        low = [x for p in parts for x in (p.low if p.kind == "continuous" else (-1.0,) * p.size)]
        high = [x for p in parts for x in (p.high if p.kind == "continuous" else (1.0,) * p.size)]
        self.register_buffer("low", torch.tensor(low), persistent=False)
        self.register_buffer("high", torch.tensor(high), persistent=False)
        self.register_buffer("centres", torch.linspace(-1, 1, bins), persistent=False)

    def _params(self, part: ActionPart) -> int:
        sizes = {"continuous": part.size * self.bins, "binary": part.size, "categorical": part.classes}
        return sizes[part.kind]

    def normalise(self, action: Tensor) -> Tensor:
        """Contract units to [-1, 1] for continuous entries; others pass unchanged (their limits are +-1)."""
        return (action - self.low) * (2 / (self.high - self.low)) - 1

    def mirror(self, action: Tensor) -> Tensor:
        """The opposite action (.., A): reflected about the middle of the range, keys and classes reversed."""
        ends: list[float] = []  # lowest plus highest value of each entry
        for part in self.parts:
            if part.kind == "continuous":
                ends += [low + high for low, high in zip(part.low, part.high, strict=True)]
            else:
                ends += [1.0 if part.kind == "binary" else part.classes - 1.0] * part.size
        return torch.tensor(ends, device=action.device) - action

    def _split(self, params: Tensor, action: Tensor | None) -> Iterator[tuple[ActionPart, Tensor, Any]]:
        """Yield (part, logits of the part, entries of the action vector) in order."""
        p, a = 0, 0
        unit: Any = None if action is None else self.normalise(action)
        for part in self.parts:
            logits = params[..., p : p + self._params(part)]
            if part.kind == "continuous":
                logits = logits.unflatten(-1, (part.size, self.bins))
            values = None
            if action is not None:
                source = unit if part.kind == "continuous" else action
                values = source[..., a : a + part.size]
            yield part, logits, values
            p, a = p + self._params(part), a + part.size

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Joint log-probability (nats) of actions (.., A) under head outputs (.., num_params); (..) float32.

        A continuous value between two bin centres counts towards both, by its distance (two-hot
        cross-entropy); for a value on a centre, such as every sampled one, this is exactly the categorical
        log-probability.
        """
        total: Any = 0  # a tensor from the first part on
        for part, logits, value in self._split(params.float(), action):
            if part.kind == "continuous":
                total = total + (two_hot(value, self.centres) * logits.log_softmax(-1)).sum((-1, -2))
            elif part.kind == "binary":
                total = total - F.binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)
            else:
                index = value.long()
                total = total + logits.log_softmax(-1).gather(-1, index)[..., 0]
        return total

    def kl(self, params: Tensor, prior: Tensor) -> Tensor:
        """Closed-form KL(params || prior) in nats, summed over parts; (..) float32."""
        total: Any = 0
        pairs = zip(self._split(params.float(), None), self._split(prior.float(), None), strict=True)
        for (part, a, _), (_, b, _) in pairs:
            if part.kind == "binary":
                p = a.sigmoid()
                on, off = F.logsigmoid(a) - F.logsigmoid(b), F.logsigmoid(-a) - F.logsigmoid(-b)
                total = total + (p * on + (1 - p) * off).sum(-1)
            else:
                log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
                kl = (log_p.exp() * (log_p - log_q)).sum(-1)
                total = total + (kl.sum(-1) if part.kind == "continuous" else kl)
        return total

    def sample(
        self, params: Tensor, gen: torch.Generator | None = None, uniform: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Draw actions (.., A) in contract units; a constant as far as gradients are concerned.

        `uniform` are the random numbers to use, of `chances`; they are drawn from `gen` otherwise.
        """
        given = None if uniform is None else iter(uniform)

        def chance(like: Tensor) -> Tensor:
            if given is not None:
                return next(given)
            return torch.rand(like.shape, generator=gen, device=like.device)

        return self._decide(
            params,
            lambda logits: _gumbel_argmax(logits, chance(logits)),
            lambda p: (chance(p) < p).float(),
        )

    def chances(self) -> list[tuple[int, ...]]:
        """Shapes of the uniform random numbers that `sample` takes for one action, in the order in which it
        takes them.
        """
        shapes = {
            "continuous": lambda part: (part.size, self.bins),
            "binary": lambda part: (part.size,),
            "categorical": lambda part: (part.classes,),
        }
        return [shapes[part.kind](part) for part in self.parts]

    def mode(self, params: Tensor) -> Tensor:
        """Most likely action (.., A). Deploying it instead of samples is known to freeze policies."""
        return self._decide(params, lambda logits: logits.argmax(-1), lambda p: (p > 0.5).float())

    @torch.no_grad()
    def _decide(
        self, params: Tensor, choose: Callable[[Tensor], Tensor], flip: Callable[[Tensor], Tensor]
    ) -> Tensor:
        out, a = [], 0
        for part, logits, _ in self._split(params.float(), None):
            if part.kind == "continuous":
                low, high = self.low[a : a + part.size], self.high[a : a + part.size]
                out.append(low + (self.centres[choose(logits)] + 1) / 2 * (high - low))
            elif part.kind == "binary":
                out.append(flip(logits.sigmoid()))
            else:
                out.append(choose(logits)[..., None].float())
            a += part.size
        return torch.cat(out, -1)


class ActionEncoder(nn.Module):
    """Actions to ``num_tokens`` tokens: a learned base plus, on labelled frames, the sum over parts."""

    def __init__(self, space: ActionSpace, dim: int, num_tokens: int = 1) -> None:
        super().__init__()
        self.space, self.num_tokens = space, num_tokens
        width = dim * num_tokens
        self.base = nn.Parameter(0.5 * torch.randn(width))
        self.linear, self.tables = nn.ModuleDict(), nn.ModuleDict()
        for i, part in enumerate(space.parts):
            if part.kind == "continuous":
                self.linear[str(i)] = nn.Linear(part.size, width, bias=False)
            elif part.kind == "binary":  # two rows per key, so that a released key is a statement as well
                self.tables[str(i)] = nn.Embedding(2 * part.size, width)
            else:
                self.tables[str(i)] = nn.Embedding(part.classes, width)

    def forward(self, action: Tensor, labelled: Tensor) -> Tensor:
        """Actions (B, T, A) and mask (B, T) to tokens (B, T, S_a, D)."""
        # where, not a product: an unlabelled action may hold anything, NaN or a class out of range included
        action = torch.where(labelled[..., None], action, 0.0)
        total, a = torch.zeros((), device=action.device), 0
        unit = self.space.normalise(action)
        for i, part in enumerate(self.space.parts):
            value = action[..., a : a + part.size]
            if part.kind == "continuous":
                total = total + self.linear[str(i)](unit[..., a : a + part.size])
            elif part.kind == "binary":
                rows = value.long() + 2 * torch.arange(part.size, device=value.device)
                total = total + self.tables[str(i)](rows).sum(-2)
            else:
                total = total + self.tables[str(i)](value[..., 0].long())
            a += part.size
        tokens = self.base + torch.where(labelled[..., None], total, 0.0)
        return tokens.unflatten(-1, (self.num_tokens, -1))


def two_hot(value: Tensor, centres: Tensor) -> Tensor:
    """Weights (.., bins) that put `value` between its two neighbouring centres; outside go the end bins."""
    value = value.clamp(centres[0], centres[-1])
    upper = torch.searchsorted(centres, value.contiguous()).clamp(1, len(centres) - 1)
    lower = upper - 1
    weight = (value - centres[lower]) / (centres[upper] - centres[lower])
    out = torch.zeros(*value.shape, len(centres), device=value.device)
    out.scatter_(-1, lower[..., None], (1 - weight)[..., None])
    return out.scatter_(-1, upper[..., None], weight[..., None])


def _gumbel_argmax(logits: Tensor, uniform: Tensor) -> Tensor:
    """Categorical samples without a host sync (multinomial would check its input)."""
    uniform = uniform.clamp(1e-20, 1 - 1e-7)
    return (logits - torch.log(-torch.log(uniform))).argmax(-1)
