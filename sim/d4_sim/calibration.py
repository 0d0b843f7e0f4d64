"""What the heads said about real frames, against what came: reward, value, distance to the cloned policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from d4_core.models import Models
    from d4_core.session import PolicySession
    from d4_sim.vector import EpisodeBatch

BINS = 10


@dataclass(frozen=True)
class Reading:
    """What the heads say of one frame of n episodes, float32 [n] each; `value` is None without a critic.

    These few numbers are kept instead of the features: a thousand frames of a hundred episodes have 600 MB.
    """

    reward: np.ndarray
    kl: np.ndarray  # nats, from the cloned to the acting policy
    value: np.ndarray | None


@torch.no_grad()
def read(session: PolicySession) -> Reading:
    """The heads of a session's checkpoint on its current frame."""
    models, h = session.models, session.features
    assert models.agent is not None
    kl = models.agent.space.kl(session.head.first(h), models.agent.policy.first(h))
    value = None if models.critic is None else models.critic(h).cpu().numpy()
    return Reading(models.agent.predict_reward(h).cpu().numpy(), kl.cpu().numpy(), value)


class Recorder:
    """Passes a session through and keeps what its heads read at every frame.

    Attributes:
        readings: of frames 0, 1, ...; stays empty for a session without a world model.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.readings: list[Reading] = []
        if hasattr(session, "bind"):
            self.bind = session.bind

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Start n episodes."""
        self.session.reset(n, tasks)

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """The session's actions."""
        action = self.session.act(images, vectors, alive)
        if hasattr(self.session, "features"):
            self.readings.append(read(self.session))
        return action


def calibrate(models: Models, readings: list[Reading], batch: EpisodeBatch) -> dict[str, Any]:
    """The entries that calibration adds to a policy's row of eval.json.

    Args:
        models: of the policy that acted.
        readings: of frames 0..T-1, from a `Recorder`.
        batch: the episodes.

    Returns:
        reward_correlation, reward_bias, reward_calibration (see `table`): the reward head at frames 1..T-1
        that were reached; kl_to_cloned: mean KL (nats) of the acting to the cloned policy there and at frame
        0; with a critic, what `judge_value` says.
    """
    own = np.take_along_axis(batch.reward, batch.task[:, None, None], 2)[..., 0]
    frames = np.arange(len(readings))
    # a world that has ended keeps its last picture: no frame of it counts from there on
    alive = frames < np.minimum(batch.length, len(readings))[:, None]
    rewarded = alive & (frames > 0)  # no action earned frame 0
    predicted = np.stack([r.reward for r in readings], 1)
    out = compare("reward", predicted[rewarded], own[:, : len(readings)][rewarded])
    kl = np.stack([r.kl for r in readings], 1)
    out["kl_to_cloned"] = float(kl[alive].mean())
    values = [r.value for r in readings if r.value is not None]
    if values:
        out |= judge_value(models, np.stack(values, 1), own, batch)
    return out


def judge_value(models: Models, value: np.ndarray, own: np.ndarray, batch: EpisodeBatch) -> dict[str, Any]:
    """The critic against discounted real returns that end with the episode, without any bootstrap.

    The critic means an endless task, and an episode that was cut by its time limit lacks the rest. Hence only
    frames count that are early enough for 1 / (1 - gamma) ticks to the limit (or two thirds of it, where that
    is shorter), whatever became of their episode: choosing by how it ended would favour falls.

    Args:
        models: their preset names gamma.
        value: (N, T) at frames 0..T-1.
        own: (N, T + 1) rewards of the episode's task, arriving with frames 0..T.
        batch: the episodes.

    Returns:
        value_correlation, value_bias, value_calibration; value_cut: mean weight gamma^n of what the limit cut
        off: a steady reward to the end makes an exact critic exceed the return by value_cut of itself.
    """
    gamma = models.preset.imagination_training.settings.discount
    limit = own.shape[1] - 1
    enough = min(math.ceil(1 / max(1 - gamma, 1e-9)), limit * 2 // 3)
    frames = np.arange(value.shape[1])
    chosen = (frames < batch.length[:, None] - 1) & (frames <= limit - enough)
    real = discounted(own, gamma)[:, : value.shape[1]]
    ended = batch.terminal.any(1, keepdims=True)
    cut = np.where(ended, 0.0, gamma ** (limit - frames))
    return compare("value", value[chosen], real[chosen]) | {"value_cut": mean(cut[chosen])}


def discounted(reward: np.ndarray, gamma: float) -> np.ndarray:
    """Returns G_t = r_{t+1} + gamma G_{t+1} (N, T + 1) of rewards that arrive with frames 0..T; G_T is 0."""
    out = np.zeros(reward.shape)
    for t in range(reward.shape[1] - 2, -1, -1):
        out[:, t] = reward[:, t + 1] + gamma * out[:, t + 1]
    return out


def compare(name: str, predicted: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Correlation (nan where one of both is constant), bias and `table` of paired numbers (n,), by name."""
    is_defined = len(predicted) > 2 and min(predicted.std(), real.std()) > 1e-6
    correlation = float(np.corrcoef(predicted, real)[0, 1]) if is_defined else float("nan")
    return {
        f"{name}_correlation": correlation,
        f"{name}_bias": mean(predicted - real),
        f"{name}_calibration": table(predicted, real),
    }


def table(predicted: np.ndarray, real: np.ndarray) -> list[dict[str, float]]:
    """Pairs sorted by prediction and cut into 10 bins of equal count: means of both, and the count."""
    bins = np.array_split(np.argsort(predicted, kind="stable"), BINS)
    return [{"predicted": mean(predicted[b]), "real": mean(real[b]), "count": len(b)} for b in bins if len(b)]


def mean(x: np.ndarray) -> float:
    """Mean as a plain float; nan of nothing, without a warning."""
    return float(np.mean(x, dtype=np.float64)) if len(x) else float("nan")
