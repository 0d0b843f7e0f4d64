"""The square: the smallest world in which imagination training has something to find, and logs of it.

No pictures and no physics engine, so that `d4_sim.ladder` can climb in minutes; otherwise like the yard: two
goals, a pit, a dense reward and drivers of mixed quality, few of whose actions are known. Shapes: B worlds, S
numbers of a state, N frames, E episodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from d4_core.actions import ActionSpace
from d4_core.config import action_parts
from d4_datasets.contract import Contract

_TOPIC = {"topic": "/none", "align": {"strategy": "hold", "timeline": "receive", "tolerance_ms": 150}}
CONTRACT = Contract.from_dict({
    "name": "ladder", "rate_hz": 10, "latency_ms": 0,
    "observations": [{"name": "state", "type": "sensor_msgs/msg/Image", "size": [16, 16], **_TOPIC}],
    "actions": [{"name": "base", "type": "geometry_msgs/msg/Twist", "select": ["linear.x", "linear.y"],
                 "low": [-1.0, -1.0], "high": [1.0, 1.0], "safety": "zeros", **_TOPIC}],
    "tasks": {"topic": "/none", "type": "std_msgs/msg/String", "select": "data", "names": ["one", "two"]},
})  # fmt: skip
"""Two velocities and two tasks. Checkpoints want a camera; nothing looks at it."""

HORIZON = 30  # ticks of an episode
_STEP = 0.15  # way of one tick at full command
_PIT, _BERTH = 0.2, 0.3  # radius of the pit in the middle, and how close to its centre a careful driver goes
_REWARD_SCALE = 0.4


class Square(nn.Module):
    """A point with velocity commands on a square, a pit in its middle, a goal per task; B worlds at once.

    State (B, 7): position, first goal, second goal, 1 while alive. The reward of a task is
    exp(-(d / 0.4)^2) of the distance to its goal, 0 in the pit, where an episode ends.

    h (B, 7 + 128) is the state, the task's goal in front of the other one, and fixed random waves of place
    and goal. A learned h is as rich; on seven bare numbers the heads bend one smooth function over the whole
    square, and what they learn on open ground speaks for the pit's edge, too.
    """

    features = 7 + 128

    def __init__(self) -> None:
        super().__init__()
        self.space = ActionSpace(action_parts(CONTRACT))
        gen = torch.Generator().manual_seed(0)
        self._waves = 3 * torch.randn(4, 128, generator=gen)
        self._phase = 2 * torch.pi * torch.rand(128, generator=gen)

    def reset(self, batch: int, gen: torch.Generator) -> Tensor:
        """Random places outside the pit."""
        angle, radius = torch.rand(2, batch, 3, generator=gen)
        unit = torch.stack([angle.mul(2 * torch.pi).cos(), angle.mul(2 * torch.pi).sin()], -1)
        places = unit * (_BERTH + (0.95 - _BERTH) * radius)[..., None]
        return torch.cat([places.flatten(1), torch.ones(batch, 1)], 1)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The state one tick later; a point in the pit stays there."""
        alive = state[:, 6:]
        place = (state[:, :2] + _STEP * alive * action.clamp(-1, 1)).clamp(-1, 1)
        return torch.cat([place, state[:, 2:6], alive * (place.norm(dim=1, keepdim=True) > _PIT)], 1)

    def observe(self, state: Tensor, task: Tensor) -> Tensor:
        """h (B, F) of states (B, 7) and tasks (B,)."""
        h = torch.where(task[:, None] == 1, state[:, [0, 1, 4, 5, 2, 3, 6]], state)
        return torch.cat([h, (h[:, :4] @ self._waves + self._phase).sin()], 1)

    def reward(self, h: Tensor) -> Tensor:
        """Reward (..) that arrives with the frame of h (.., F)."""
        distance = (h[..., :2] - h[..., 2:4]).norm(dim=-1)
        return h[..., 6] * (-(distance / _REWARD_SCALE).square()).exp()

    def proceed(self, h: Tensor) -> Tensor:
        """1 (..) while alive."""
        return h[..., 6]

    def best(self, state: Tensor, action: Tensor, known: Tensor, task: Tensor) -> Tensor:
        """Optimal commands (B, 2), an `Act`: at full speed the shortest way round the pit."""
        goal = self.observe(state, task)[:, 2:4]
        return steer(state[:, :2], goal, torch.ones(len(state), dtype=torch.bool))


@dataclass
class StateLogs:
    """Episodes one after another, as `d4_core.data.Logs` wants them, with states in place of pictures."""

    state: np.ndarray  # float32 [N, S]
    action: np.ndarray  # float32 [N, 2]
    action_mask: np.ndarray  # bool [N]
    reward: np.ndarray  # float32 [N, 2]
    is_terminal: np.ndarray  # bool [N]
    episode_length: np.ndarray  # int64 [E]

    def __post_init__(self) -> None:
        self.num_frames = len(self.state)
        self.episode_start = np.cumsum(self.episode_length) - self.episode_length
        self.episode_index = np.repeat(np.arange(len(self.episode_length)), self.episode_length)
        self.labelled = np.logical_or.reduceat(self.action_mask, self.episode_start)
        self.images: dict[str, np.ndarray] = {}
        self.vectors: dict[str, np.ndarray] = {}

    def sample_starts(
        self, rng: np.random.Generator, batch: int, length: int, episodes: np.ndarray
    ) -> np.ndarray:
        """Windows of `length` frames around frames drawn at random, shifted into their episode."""
        size = self.episode_length[episodes]
        which = rng.choice(len(episodes), batch, p=size / size.sum())
        offset = (rng.random(batch) * size[which]).astype(np.int64) - rng.integers(0, length, batch)
        return self.episode_start[episodes[which]] + np.clip(offset, 0, np.maximum(size[which] - length, 0))

    def indices(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame indices and validity [batch, length]; past its end an episode repeats its last frame."""
        episode = np.searchsorted(self.episode_start, starts, side="right") - 1
        last = (self.episode_start[episode] + self.episode_length[episode] - 1)[:, None]
        index = starts[:, None] + np.arange(length)
        return np.minimum(index, last), index <= last


def steer(place: Tensor, goal: Tensor, careful: Tensor) -> Tensor:
    """Command (B, 2) straight to the goal (B, 2), or along the pit's tangent if `careful` (B,) demands it."""
    way = goal - place
    distance = place.norm(dim=1)
    inward = -place / distance[:, None]
    ahead = way / way.norm(dim=1, keepdim=True).clamp_min(1e-6)
    along, across = -(place * ahead).sum(1), place[:, 1] * ahead[:, 0] - place[:, 0] * ahead[:, 1]
    blocked = careful & (along > 0) & (along < way.norm(dim=1)) & (across.abs() < _BERTH)
    angle = torch.where(across > 0, 1, -1) * (_BERTH / distance).clamp_max(1).asin()
    turned = torch.stack([-inward[:, 1], inward[:, 0]], 1)
    detour = 2 * (angle.cos()[:, None] * inward + angle.sin()[:, None] * turned)
    command = torch.where(blocked[:, None], detour, way / _STEP)
    # keep the direction when an axis saturates
    return command / command.abs().amax(1, keepdim=True).clamp_min(1)


def record(episodes: int, seed: int, labelled: float = 0.2) -> StateLogs:
    """Drives of mixed quality: slow and shaky to the own goal, to the other one, or wandering; most careless.

    Args:
        episodes: their number.
        seed: decides everything.
        labelled: share of the episodes whose actions are known.
    """
    world, gen = Square(), torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(episodes, 1, generator=gen)

    state = world.reset(episodes, gen)
    goals = state[:, 2:6].view(-1, 2, 2)[torch.arange(episodes), torch.randint(2, (episodes,), generator=gen)]
    wander, careful = uniform(0, 1) < 1 / 3, uniform(0, 1)[:, 0] < 0.3
    speed = uniform(0.2, 0.8) * ~wander
    level, memory = torch.where(wander, 0.7, uniform(0.15, 0.3)), torch.where(wander, 0.85, 0.2)
    states, actions, noise = [state], [], torch.zeros(episodes, 2)
    for _ in range(HORIZON):
        fresh = torch.randn(episodes, 2, generator=gen)
        noise = memory * noise + (1 - memory.square()).sqrt() * level * fresh
        actions.append((speed * steer(state[:, :2], goals, careful) + noise).clamp(-1, 1))
        state = world.step(state, actions[-1])
        states.append(state)
    actions.append(torch.zeros_like(actions[0]))
    return _pack(world, torch.stack(states, 1), torch.stack(actions, 1), uniform(0, 1)[:, 0] < labelled)


def _pack(world: Square, states: Tensor, actions: Tensor, labelled: Tensor) -> StateLogs:
    """Cut episodes (E, T, ..) behind the frame in the pit and put them one after another."""
    length = 1 + states[:, :-1, 6].sum(1).long()
    inside = torch.arange(states.shape[1]) < length[:, None]
    flat, is_last = states[inside], (torch.arange(states.shape[1]) == length[:, None] - 1)[inside]
    tasks = [torch.full((len(flat),), q) for q in range(2)]
    known = labelled[:, None].expand(inside.shape)[inside] & ~is_last
    return StateLogs(
        state=flat.numpy(), action=actions[inside].numpy(), action_mask=known.numpy(),
        reward=torch.stack([world.reward(world.observe(flat, q)) for q in tasks], 1).numpy(),
        is_terminal=(flat[:, 6] == 0).numpy(), episode_length=length.numpy(),
    )  # fmt: skip
