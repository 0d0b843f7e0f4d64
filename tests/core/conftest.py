"""Tiny models and hand-made logs for the tests of the model files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from torch import nn

from d4_core.actions import ActionPart
from d4_core.agent import Agent, AgentConfig
from d4_core.dynamics import Dynamics, DynamicsConfig
from d4_core.imagination import ImaginationConfig
from d4_core.phase import Phase
from d4_core.phases import (
    AgentPhase,
    AgentTraining,
    DynamicsPhase,
    DynamicsTraining,
    ImaginationPhase,
    ImaginationTraining,
)
from d4_core.shortcut import Grid
from d4_core.tokenizer import Camera, Tokenizer, TokenizerConfig
from d4_core.transformer import TransformerConfig

# the same examples on every run, and no deadlines: the first call into torch takes a second on a busy machine
hypothesis_settings.register_profile("core", deadline=None, derandomize=True)
hypothesis_settings.load_profile("core")
# models this small lose time to a second thread, and on a busy machine very much of it
torch.set_num_threads(1)

# clips of all kinds in every batch
ALL_ROLES = {"image_rows": 0.3, "bootstrap_rows": 0.5, "bootstrap_warmup": 0.0}

ONE_DIM = (ActionPart(kind="continuous", size=1, low=(-2.0,), high=(2.0,)),)


@dataclass
class ArrayLogs:
    """The `Logs` protocol over plain arrays of N frames: episodes one after another."""

    episode_length: np.ndarray
    action: np.ndarray
    action_mask: np.ndarray
    reward: np.ndarray
    is_terminal: np.ndarray
    images: dict[str, np.ndarray] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        return int(self.episode_length.sum())

    @property
    def episode_start(self) -> np.ndarray:
        return np.cumsum(self.episode_length) - self.episode_length

    @property
    def episode_index(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.episode_length)), self.episode_length)

    @property
    def labelled(self) -> np.ndarray:
        return np.logical_or.reduceat(self.action_mask, self.episode_start)

    def sample_starts(self, rng, batch: int, length: int, episodes: np.ndarray) -> np.ndarray:
        episode = rng.choice(episodes, batch)
        room = np.maximum(self.episode_length[episode] - length, 0)
        return self.episode_start[episode] + (rng.random(batch) * (room + 1)).astype(np.int64)

    def indices(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        episode = np.searchsorted(self.episode_start, starts, side="right") - 1
        last = (self.episode_start[episode] + self.episode_length[episode] - 1)[:, None]
        index = starts[:, None] + np.arange(length)
        return np.minimum(index, last), index <= last


def _wake(module: nn.Module) -> nn.Module:
    """Fill zero-initialised parameters, enlarge residual branches: no probe shall pass on a dead network."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if not p.any():
                p.normal_(std=0.3)
            elif name.endswith(("attention.out.weight", "down.weight")):
                p.mul_(10.0)
    return module


@pytest.fixture(scope="session")
def tiny_shape() -> Callable[..., TransformerConfig]:
    """Factory of small transformer shapes: space, time, space, time."""

    def make(**changes) -> TransformerConfig:
        settings = {
            "dim": 16,
            "depth": 4,
            "heads": 4,
            "kv_heads": 2,
            "mlp_ratio": 2.0,
            "time_every": 2,
            "context": 4,
        }
        return TransformerConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def make_dynamics(tiny_shape) -> Callable[..., Dynamics]:
    """Factory of small dynamics models without dead weights; keyword arguments change the config."""

    def make(seed: int = 0, awake: bool = True, shape: dict | None = None, **changes) -> Dynamics:
        settings = {
            "num_tokens": 3, "token_dim": 2, "actions": ONE_DIM, "action_bins": 5,
            "registers": 1, "agent_tokens": 2,
            "grid": Grid(levels=8), "transformer": tiny_shape(**(shape or {})),
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Dynamics(DynamicsConfig(**{**settings, **changes}))
            return _wake(model) if awake else model

    return make


@pytest.fixture(scope="session")
def make_agent() -> Callable[..., Agent]:
    """Factory of heads for a dynamics model."""

    def make(dynamics: Dynamics, seed: int = 0, awake: bool = True, **changes) -> Agent:
        cfg = AgentConfig(
            **{**{"num_tasks": 2, "leads": 3, "hidden": 16, "reward_bins": 9, "value_bins": 9}, **changes}
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            agent = Agent(cfg, dynamics.space, dynamics.cfg.transformer.dim, dynamics.cfg.agent_tokens)
            return _wake(agent) if awake else agent

    return make


@pytest.fixture(scope="session")
def make_tokenizer(tiny_shape) -> Callable[..., Tokenizer]:
    """Factory of small tokenizers (one 8x12 camera by default)."""

    def make(seed: int = 0, awake: bool = True, shape: dict | None = None, **changes) -> Tokenizer:
        settings = {
            "cameras": (Camera(name="front", height=8, width=12),), "patch": 4,
            "num_latents": 4, "latent_dim": 3, "num_tokens": 2,
            "transformer": tiny_shape(**({"context": 3} | (shape or {}))),
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Tokenizer(TokenizerConfig(**{**settings, **changes}))
            return _wake(model) if awake else model

    return make


@pytest.fixture(scope="session")
def make_logs() -> Callable[..., ArrayLogs]:
    """Factory of logs whose numbers name their frame: action = frame + 0.25, reward[:, q] = frame + q / 4."""

    def make(lengths: tuple[int, ...] = (5, 7, 3), tasks: int = 2, **changes) -> ArrayLogs:
        frames = np.arange(sum(lengths), dtype=np.float32)
        terminal = np.zeros(len(frames), bool)
        terminal[np.cumsum(lengths) - 1] = True
        settings = {
            "episode_length": np.array(lengths),
            "action": frames[:, None] + 0.25,
            "action_mask": np.ones(len(frames), bool),
            "reward": frames[:, None] + np.arange(tasks, dtype=np.float32) / 4,
            "is_terminal": terminal,
        }
        return ArrayLogs(**{**settings, **changes})

    return make


@pytest.fixture
def rng() -> torch.Generator:
    """A fresh generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def noise_latents() -> Callable[..., np.ndarray]:
    """Factory of latents that show nothing: unit noise [N, tokens, channels]."""

    def make(frames: int, tokens: int = 3, channels: int = 2) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(frames, tokens, channels)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., list[dict[str, float]]]:
    """Trains a phase with Adam and returns the losses of every step."""

    def train(phase: Phase, steps: int, lr: float = 3e-3) -> list[dict[str, float]]:
        optimiser = torch.optim.Adam([p for _, p in phase.trainable()], lr=lr)
        history = []
        for step in range(steps):
            batch = phase.sample(np.random.default_rng([7, step]), step)
            losses, _ = phase(batch, torch.Generator().manual_seed(step), step)
            optimiser.zero_grad()
            phase.total(losses).backward()
            optimiser.step()
            history.append({name: loss.item() for name, loss in losses.items()})
        return history

    return train


@pytest.fixture(scope="session")
def dynamics_phase(make_dynamics, make_logs, noise_latents) -> Callable[..., DynamicsPhase]:
    """Factory of phase 1b on noise; keyword arguments change its settings."""

    def make(**changes) -> DynamicsPhase:
        logs = make_logs((9, 12, 7))
        logs.action[:] = np.sin(logs.action)
        cfg = DynamicsTraining(**({"steps": 40, "batch": 6, "length": 4, "long_length": 8} | changes))
        episodes = np.arange(3)
        return DynamicsPhase(cfg, make_dynamics(), nn.Identity(), logs, noise_latents(28), episodes)

    return make


@pytest.fixture(scope="session")
def agent_phase(make_dynamics, make_agent, make_logs, noise_latents) -> Callable[..., AgentPhase]:
    """Factory of phase 2: episode 0 does task 0, episode 1 task 1, episode 2 none."""

    def make(awake: bool = True, reward: float = 1.0, **changes) -> AgentPhase:
        logs = make_logs((9, 12, 7))
        logs.reward[:] = 0
        logs.reward[[4, 15], [0, 1]] = reward
        dynamics = make_dynamics()
        settings = {"steps": 40, "batch": 12, "length": 4, "long_share": 0.0}
        cfg = AgentTraining(**(settings | {"dynamics": DynamicsTraining(**ALL_ROLES)} | changes))
        return AgentPhase(
            cfg, make_agent(dynamics, awake=awake), dynamics, nn.Identity(), logs,
            noise_latents(28), np.arange(3),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def imagination_phase(make_dynamics, make_agent, make_logs, noise_latents) -> Callable[..., ImaginationPhase]:
    """Factory of phase 3: episode 0 does task 0, episode 1 task 1, episode 2 is too short to start from."""

    def make(awake: bool = True, leads: int = 3, **changes) -> ImaginationPhase:
        dynamics, logs = make_dynamics(), make_logs((9, 12, 2))
        logs.action[:] = np.sin(logs.action)
        logs.reward[:] = 0
        logs.reward[[4, 15], [0, 1]] = 1.0
        settings = ImaginationConfig(horizon=3, contexts=(1, 4), steps=2, warmup=0.0)
        cfg = ImaginationTraining(**({"steps": 20, "batch": 6, "reuse": 2, "settings": settings} | changes))
        torch.manual_seed(0)
        return ImaginationPhase(
            cfg, make_agent(dynamics, awake=awake, leads=leads), dynamics, nn.Identity(), logs,
            noise_latents(23), np.arange(3),
        )  # fmt: skip

    return make
