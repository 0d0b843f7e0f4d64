"""The four phases (paper section 3): tokenizer, dynamics, agent finetuning, imagination training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from d4_core.agent import Agent, Critic
from d4_core.data import (
    Clips,
    Logs,
    draw,
    first_frames,
    join,
    lead_targets,
    observations,
    rows,
    transitions,
)
from d4_core.distributed import share
from d4_core.dynamics import Dynamics
from d4_core.imagination import (
    Dream,
    ImaginationConfig,
    Rollout,
    imagine,
    lambda_returns,
    pmpo_loss,
    weights_of_frames,
)
from d4_core.perceptual import Perceptual, lpips_loss
from d4_core.phase import Batch, Losses, Metrics, Phase, freeze, masked_mean
from d4_core.shortcut import bootstrap_target, corrupt, ramp, sample_levels, shortcut_schedule
from d4_core.tokenizer import Tokenizer, reconstruction_loss
from d4_datasets.errors import UserError
from d4_datasets.joined import Frames


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """Phase 1a: mostly single frames, now and then clips, so that most of a step's frames are independent.

    Attributes:
        steps: optimiser steps.
        batch: frames per step.
        length: frames of a clip in clip batches.
        clip_share: share of the steps that train on clips.
        mask_warmup: first part of training in which masking grows from nothing to `mask_max` (paper: 0).
            Video of several looks needs it: with half of the scene hidden from the start, a small tokenizer
            learns which look it sees and then nothing else.
        lpips_features, lpips_heads: weight files of the perceptual loss; empty: squared error alone.
        lpips_weight: weight of the perceptual loss (paper: 0.2).
    """

    steps: int = 20_000
    batch: int = 128
    length: int = 8
    clip_share: float = 0.25
    mask_warmup: float = 0.2
    lpips_features: str = ""
    lpips_heads: str = ""
    lpips_weight: float = 0.2


@dataclass(frozen=True, kw_only=True)
class DynamicsTraining:
    """Phase 1b.

    Attributes:
        steps, batch, length: steps of `batch` clips of `length` frames (T1).
        long_length: T2; long batches hold proportionally fewer clips.
        long_share, long_final: share of long batches, and the final part of training that uses only them.
        image_rows: share of clips treated as separate images (paper: 0.3).
        bootstrap_rows, bootstrap_warmup: share of clips with the shortcut loss, after this part of training.
            0 in phase 1b means that no step size but the finest exists, in no phase.
        ramp: weigh the loss by 0.9 tau + 0.1 (paper: yes).
        velocity_loss: measure the error of the velocity, 1 / (1 - tau) times that of the tokens (paper: no).
        committed: probability that a frame is drawn at the context signal level instead of a random one, the
            state in which rollouts show history to the model (paper: 0).
        labelled_share: share of clips drawn from labelled episodes; 0 draws all episodes alike (paper).
    """

    steps: int = 20_000
    batch: int = 16
    length: int = 16
    long_length: int = 32
    long_share: float = 0.1
    long_final: float = 0.1
    image_rows: float = 0.3
    bootstrap_rows: float = 0.25
    bootstrap_warmup: float = 0.25
    ramp: bool = True
    velocity_loss: bool = False
    committed: float = 0.0
    labelled_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AgentTraining:
    """Phase 2.

    Attributes:
        steps, batch, length, long_length, long_share: as in phase 1b; one half of the clips is uniform
            (dynamics loss), one half relevant (BC loss), the reward is learned on both. Short clips matter
            here: reward and policy are learned from the number of different scenes, and the frames of one
            clip all show the same scene.
        relevant_return: an episode is relevant for a task if its return reaches this share of the best.
        dynamics: how the dynamics loss on the uniform half is drawn.
        dynamics_weight: weight of that loss.
    """

    steps: int = 5_000
    batch: int = 32
    length: int = 8
    long_length: int = 32
    long_share: float = 0.2
    relevant_return: float = 0.4
    dynamics: DynamicsTraining = DynamicsTraining(bootstrap_warmup=0.0)
    dynamics_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ImaginationTraining:
    """Phase 3.

    Attributes:
        steps: optimiser steps over the heads.
        batch: rollouts per batch, one from each context.
        reuse: optimiser steps that a batch of rollouts serves.
        relevant_share: share of contexts from episodes that accomplish the rollout's task (paper: 0.5).
        relevant_return: share of the best return that counts as accomplishing it.
    """

    steps: int = 2_000
    batch: int = 64
    reuse: int = 4
    relevant_share: float = 0.5
    relevant_return: float = 0.4
    settings: ImaginationConfig = ImaginationConfig()


def shape_rng(step: int) -> np.random.Generator:
    """Decides the shape of a step's batch: the same on every rank, so that none waits for a longer one."""
    return np.random.default_rng(step)


class TokenizerPhase(Phase):
    """Masked-autoencoder training of the tokenizer."""

    name = "tokenizer"

    def __init__(
        self,
        cfg: TokenizerTraining,
        tokenizer: Tokenizer,
        logs: Logs,
        episodes: np.ndarray | Callable[[int], np.ndarray],
    ) -> None:
        """`episodes`: ids to draw from, or what gives those of a step."""
        extra = {"lpips": cfg.lpips_weight} if cfg.lpips_features else {}
        super().__init__(cfg.steps, {"pixels": 1.0} | extra)
        self.cfg, self.tokenizer, self.logs, self.episodes = cfg, tokenizer, logs, episodes
        files = (Path(cfg.lpips_features), Path(cfg.lpips_heads))
        self.perceptual = freeze(Perceptual(*files)) if cfg.lpips_features else None
        self._names = [c.name for c in tokenizer.cfg.cameras] + [v.name for v in tokenizer.cfg.vectors]

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """{modality: (B, T, ...)}."""
        length = self.cfg.length if shape_rng(step).random() < self.cfg.clip_share else 1
        episodes = self.episodes(step) if callable(self.episodes) else self.episodes
        clips = draw(self.logs, rng, max(1, share(self.cfg.batch) // length), length, episodes)
        return observations(self.logs, clips.index, self._names)

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Reconstruction loss of masked clips."""
        masking = min(1.0, (step + 1) / max(1.0, self.cfg.mask_warmup * self.cfg.steps))
        z = self.tokenizer.encode(batch, gen, masking)
        made = self.tokenizer.decode(z)
        losses = {"pixels": reconstruction_loss(self.tokenizer, batch, made)}
        if self.perceptual is not None:
            losses["lpips"] = lpips_loss(self.perceptual, self.tokenizer, batch, made, gen)
        return losses, {"saturation": (z.detach().abs() > 0.99).float().mean()}

    def checkpoint_modules(self) -> dict[str, torch.nn.Module]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer}


class ShortcutObjective:
    """Corrupts clips, runs the dynamics model and scores it (paper Eq. 5-8); used by phases 1b and 2."""

    def __init__(self, cfg: DynamicsTraining, dynamics: Dynamics, total_steps: int) -> None:
        self.cfg, self.dynamics, self.total_steps = cfg, dynamics, total_steps

    def __call__(
        self, batch: Batch, gen: torch.Generator, step: int, agent_BTGD: Tensor | None = None
    ) -> tuple[Any, Tensor, Metrics]:
        """Returns (agent outputs or None, per-frame loss (B, T), metrics)."""
        cfg, grid = self.cfg, self.dynamics.cfg.grid
        clean = batch["tokens"].float()
        (rows, frames), device = clean.shape[:2], clean.device
        rows_of_steps = cfg.bootstrap_rows if self.dynamics.cfg.shortcut else 0.0
        share = shortcut_schedule(step, self.total_steps, cfg.bootstrap_warmup, rows_of_steps)
        # roles are drawn independently: a fixed split would confound image rows with bootstrap rows
        bootstrap = torch.rand(rows, generator=gen) < share
        images = torch.rand(rows, generator=gen) < cfg.image_rows
        tau_index, e = sample_levels(grid, (rows, frames), bootstrap, gen)
        committed = (torch.rand(rows, frames, generator=gen) < cfg.committed) & ~bootstrap[:, None]
        tau_index = torch.where(committed, grid.context_index, tau_index).to(device)
        e, images = e.to(device), images.to(device)
        noise = torch.randn(clean.shape, generator=gen).to(device)
        noisy = corrupt(clean, noise, grid.tau(tau_index))
        labelled = batch["prev_labelled"] & ~images[:, None]
        block = self.dynamics(noisy, tau_index, e, batch["prev_action"], labelled, agent_BTGD, images)
        target = clean
        if bootstrap.any():
            picked = bootstrap.nonzero()[:, 0].to(device)
            inputs = [x[picked] for x in (noisy, tau_index, e, batch["prev_action"], labelled, images)]
            target = clean.index_copy(0, picked, self._teach(*inputs))
        error = (block.clean - target).square().mean((-1, -2))
        tau = grid.tau(tau_index)
        flow_frames = batch["valid"] & ~bootstrap[:, None].to(device)
        metrics: Metrics = {"flow_mse": masked_mean(error.detach(), flow_frames)}
        if cfg.velocity_loss:
            error = error / (1 - tau).square()
        return block.agent, error * ramp(tau) if cfg.ramp else error, metrics

    def _teach(
        self, noisy: Tensor, tau_index: Tensor, e: Tensor, action: Tensor, labelled: Tensor, images: Tensor
    ) -> Tensor:
        def predict(z: Tensor, index: Tensor, exponent: Tensor) -> Tensor:
            return self.dynamics(z, index, exponent, action, labelled, image_rows=images).clean

        return bootstrap_target(predict, self.dynamics.cfg.grid, noisy, tau_index, e)


def draw_clips(
    cfg: DynamicsTraining,
    logs: Logs,
    rng: np.random.Generator,
    batch: int,
    length: int,
    episodes: np.ndarray,
    everyone: np.ndarray | None = None,
) -> Clips:
    """Uniform clips from `episodes`, with a fixed share from the labelled ones of `everyone` (default: of
    `episodes`) if the configuration asks for it.
    """
    everyone = episodes if everyone is None else everyone
    labelled = everyone[logs.labelled[everyone]]
    count = round(cfg.labelled_share * batch) if len(labelled) else 0
    parts = [draw(logs, rng, batch - count, length, episodes)]
    if count:
        parts.append(draw(logs, rng, count, length, labelled))
    return join(parts)


class DynamicsPhase(Phase):
    """Shortcut-forcing training of the world model on cached latents.

    Args: episodes: what this process draws from. everyone: those of all processes, if they share the data:
        the few that are labelled, or do a task, are drawn from all of them here and in later phases.
    """

    name = "dynamics"

    def __init__(
        self,
        cfg: DynamicsTraining,
        dynamics: Dynamics,
        tokenizer: Tokenizer,
        logs: Logs,
        latents: Frames,
        episodes: np.ndarray,
        everyone: np.ndarray | None = None,
    ) -> None:
        super().__init__(cfg.steps, {"dynamics": 1.0})
        self.cfg, self.dynamics, self.logs, self.latents = cfg, dynamics, logs, latents
        self.episodes, self.everyone = episodes, episodes if everyone is None else everyone
        self.tokenizer = freeze(tokenizer)
        self.objective = ShortcutObjective(cfg, dynamics, cfg.steps)
        self._first = first_frames(logs)

    def shape(self, step: int) -> tuple[int, int]:
        """(clips, frames) of the batch at `step`: short, now and then long, at the end only long."""
        cfg = self.cfg
        long = shape_rng(step).random() < cfg.long_share or step >= cfg.steps * (1 - cfg.long_final)
        batch = share(cfg.batch)
        if long:
            return max(1, batch * cfg.length // cfg.long_length), cfg.long_length
        return batch, cfg.length

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """Tokens (B, T, N, L) and transitions."""
        clips = draw_clips(self.cfg, self.logs, rng, *self.shape(step), self.episodes, self.everyone)
        tokens = rows(self.latents, clips.index)
        return {"tokens": tokens, **transitions(self.logs, self._first, clips)}

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Flow and bootstrap loss."""
        _, error, metrics = self.objective(batch, gen, step)
        return {"dynamics": masked_mean(error, batch["valid"])}, metrics

    def checkpoint_modules(self) -> dict[str, torch.nn.Module]:
        """Tokenizer and dynamics: a checkpoint is complete in itself."""
        return {"tokenizer": self.tokenizer, "dynamics": self.dynamics}


def accomplished(logs: Logs, episodes: np.ndarray, task: int, share: float) -> np.ndarray:
    """Episodes whose return for the task reaches `share` of the best, whatever the driver had in mind.

    The return tells doing a task from passing by, and for sparse rewards it counts the events. A dataset
    without rewards has nothing to tell episodes apart: all of them count.
    """
    if not logs.reward.any():
        return episodes
    column = logs.reward[:, min(task, logs.reward.shape[1] - 1)]
    returns = np.add.reduceat(column, logs.episode_start)
    return episodes[(returns[episodes] >= share * returns.max()) & (returns[episodes] > 0)]


def relevant_episodes(logs: Logs, episodes: np.ndarray, task: int, share: float) -> np.ndarray:
    """Labelled episodes that accomplish a task: what the policy is cloned from."""
    return accomplished(logs, episodes[logs.labelled[episodes]], task, share)


class AgentPhase(Phase):
    """Agent finetuning: cloning and reward modelling on noisy frames, with the dynamics loss kept on."""

    name = "agent"

    def __init__(
        self,
        cfg: AgentTraining,
        agent: Agent,
        dynamics: Dynamics,
        tokenizer: Tokenizer,
        logs: Logs,
        latents: Frames,
        episodes: np.ndarray,
        everyone: np.ndarray | None = None,
    ) -> None:
        weights = {"dynamics": cfg.dynamics_weight, "policy": 1.0, "reward": 1.0, "proceed": 1.0}
        super().__init__(cfg.steps, weights)
        self.cfg, self.agent, self.dynamics, self.logs, self.latents, self.episodes = (
            cfg, agent, dynamics, logs, latents, episodes
        )  # fmt: skip
        self.tokenizer = freeze(tokenizer)
        self.objective = ShortcutObjective(cfg.dynamics, dynamics, cfg.steps)
        self._first = first_frames(logs)
        self.everyone = episodes if everyone is None else everyone
        tasks = range(agent.cfg.num_tasks)
        self.relevant = [relevant_episodes(logs, self.everyone, q, cfg.relevant_return) for q in tasks]
        if not any(map(len, self.relevant)):
            raise UserError(
                f"no labelled episode reaches {cfg.relevant_return:.0%} of the best return of any task, so "
                "there is nothing to clone: label more episodes or lower agent_training.relevant_return"
            )

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """Uniform half, then the half that `relevant` (B,) marks, whose `task` (B,) is hindsight."""
        cfg = self.cfg
        length = cfg.long_length if shape_rng(step).random() < cfg.long_share else cfg.length
        batch = max(2, share(cfg.batch) * cfg.length // length)
        half = batch // 2
        own = (self.episodes, self.everyone)
        uniform = draw_clips(cfg.dynamics, self.logs, rng, batch - half, length, *own)
        usable = [q for q, episodes in enumerate(self.relevant) if len(episodes)]
        tasks = rng.choice(usable, half)
        relevant = [draw(self.logs, rng, 1, length, self.relevant[q]) for q in tasks]
        clips = join([uniform, *relevant])
        task = np.concatenate([rng.integers(0, len(self.relevant), batch - half), tasks])
        tokens = rows(self.latents, clips.index)
        out = {"tokens": tokens, **transitions(self.logs, self._first, clips)}
        out |= lead_targets(self.logs, clips, self.agent.cfg.leads)
        column = torch.from_numpy(np.minimum(task, self.logs.reward.shape[1] - 1))
        out["lead_reward"] = torch.take_along_dim(out["lead_reward"], column[:, None, None, None], 3)[..., 0]
        return out | {"task": torch.from_numpy(task), "relevant": torch.arange(batch) >= batch - half}

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Dynamics loss on the uniform half, BC on the relevant half, reward and continuation on both."""
        tokens = self.agent.tokens(batch["task"])[:, None].expand(-1, batch["valid"].shape[1], -1, -1)
        outputs, error, metrics = self.objective(batch, gen, step, tokens)
        h, valid, relevant = Agent.readout(outputs), batch["valid"], batch["relevant"][:, None]
        known = batch["lead_labelled"] & relevant[..., None]
        nats = -self.agent.space.log_prob(self.agent.policy(h), batch["lead_action"])
        surprise = -self.agent.reward_dist.log_prob(self.agent.reward(h), batch["lead_reward"])
        alive = F.binary_cross_entropy_with_logits(
            self.agent.proceed.first(h)[..., 0].float(), (~batch["terminal"]).float(), reduction="none"
        )
        losses = {
            "dynamics": masked_mean(error, valid & ~relevant),
            "policy": masked_mean(nats, known),
            "reward": masked_mean(surprise, batch["lead_valid"]),
            "proceed": masked_mean(alive, valid),
        }
        lead0 = masked_mean(nats[..., 0].detach(), known[..., 0])
        return losses, metrics | {"bc_nats": lead0}

    def checkpoint_modules(self) -> dict[str, torch.nn.Module]:
        """Tokenizer, dynamics and agent."""
        return {"tokenizer": self.tokenizer, "dynamics": self.dynamics, "agent": self.agent}


class ImaginationPhase(Phase):
    """PMPO on imagined rollouts; transformer, reward head and task embedding stay frozen."""

    name = "imagination"

    def __init__(
        self,
        cfg: ImaginationTraining,
        agent: Agent,
        dynamics: Dynamics,
        tokenizer: Tokenizer,
        logs: Logs,
        latents: Frames,
        episodes: np.ndarray,
        everyone: np.ndarray | None = None,
    ) -> None:
        super().__init__(cfg.steps, {"policy": 1.0, "value": 1.0, "leads": 1.0})
        self.cfg, self.logs, self.latents, self.period = cfg, logs, latents, cfg.reuse
        self.tokenizer, self.dynamics, self.agent = freeze(tokenizer), freeze(dynamics), freeze(agent)
        self.prior = freeze(copy.deepcopy(agent.policy))
        self.policy = copy.deepcopy(agent.policy).requires_grad_(True)
        self.critic = Critic(agent.cfg, agent.policy.inputs)
        self._first = first_frames(logs)
        everyone = episodes if everyone is None else everyone
        self._episodes, long_enough = (
            among[logs.episode_length[among] >= max(cfg.settings.contexts)] for among in (episodes, everyone)
        )
        self._owner = np.repeat(np.arange(len(logs.episode_length)), logs.episode_length)
        tasks = range(agent.cfg.num_tasks)
        self._relevant = [accomplished(logs, long_enough, q, cfg.relevant_return) for q in tasks]
        self.critic.expect(self._mean_reward() / (1 - cfg.settings.discount))
        self._dream: Dream | None = None
        self._rollout: tuple[Rollout, Tensor] | None = None  # and whether its real start was not terminal

    def _mean_reward(self) -> float:
        """Reward per frame of the episodes that contexts come from."""
        reward, share = self.logs.reward, self.cfg.relevant_share

        def mean(episodes: np.ndarray, task: int) -> float:
            return float(reward[np.isin(self._owner, episodes), min(task, reward.shape[1] - 1)].mean())

        means = [
            share * mean(relevant if len(relevant) else self._episodes, task)
            + (1 - share) * mean(self._episodes, task)
            for task, relevant in enumerate(self._relevant)
        ]
        return float(np.mean(means))

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """Real contexts (B, T_c) of a batch of rollouts, with a task per row; empty while one is reused."""
        if step % self.cfg.reuse:
            return {}
        batch, length = share(self.cfg.batch), int(shape_rng(step).choice(self.cfg.settings.contexts))
        task = rng.integers(0, self.agent.cfg.num_tasks, batch)
        relevant = rng.random(batch) < self.cfg.relevant_share
        pools = [
            self._relevant[q] if r and len(self._relevant[q]) else self._episodes
            for q, r in zip(task, relevant, strict=True)
        ]
        clips = join([draw(self.logs, rng, 1, length, pool) for pool in pools])
        tokens = rows(self.latents, clips.index)
        out = {"tokens": tokens, **transitions(self.logs, self._first, clips)}
        return out | {"task": torch.from_numpy(task)}

    @torch.no_grad()
    def roll(self, batch: Batch, gen: torch.Generator) -> Rollout:
        """Imagine from the contexts of a batch with the current policy."""
        device = batch["task"].device
        if self._dream is None:
            dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
            self._dream = Dream(self.dynamics, self.agent, share(self.cfg.batch), dtype=dtype)
        dream, task = self._dream, batch["task"]
        dream.reset()
        dream.gen = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=gen)))
        tokens, action, known = batch["tokens"].float(), batch["prev_action"], batch["prev_labelled"]
        frames = range(tokens.shape[1])
        h = [dream.observe(tokens[:, t], action[:, t], known[:, t], task) for t in frames]
        return imagine(dream, self.policy, h[-1], task, self.cfg.settings)

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Policy and value loss on the current rollout."""
        cfg = self.cfg.settings
        if batch:
            self._rollout = self.roll(batch, gen), ~batch["terminal"][:, -1:]
        assert self._rollout is not None
        roll, alive = self._rollout
        h = roll.h[:, :-1]
        with torch.no_grad():
            value = self.critic(roll.h)
            returns = lambda_returns(roll.reward, roll.proceed, value, cfg.discount, cfg.trace)
            weight = weights_of_frames(roll.proceed) * alive
            prior = self.prior.first(h)
        features = self.policy.trunk(h)
        params = self.policy.read(features)[:, :, 0]
        log_prob = self.agent.space.log_prob(params, roll.action)
        advantage = returns - value[:, :-1]
        kl = (self.agent.space.kl(params, prior) * weight).sum() / weight.sum().clamp_min(1e-6)
        policy = pmpo_loss(log_prob, advantage, weight, cfg.alpha, cfg.drop_smallest) + cfg.beta * kl
        value_loss = -(self.critic.log_prob(h, returns) * weight).sum() / weight.sum().clamp_min(1e-6)
        metrics = {
            "kl": kl.detach(),
            "imagined_reward": roll.reward.sum(1).mean(),
            "imagined_return": returns[:, 0].mean(),
            "value_mean": value[:, 0].mean(),
            "positive_share": (advantage >= 0).float().mean(),
            "event_density": (roll.reward.max(1).values > 0.5).float().mean(),
        }
        # the zero-initialised critic would sign the first advantages at random
        warm = 0.0 if step < cfg.warmup * self.cfg.steps else 1.0
        losses = {"policy": warm * policy, "value": value_loss}
        if self.policy.leads > 1:
            # on the features as they are: what the leads learn must not move the policy
            losses["leads"] = self._follow(self.policy.read(features.detach()), roll.action, weight)
        return losses, metrics

    def _follow(self, leads: Tensor, action: Tensor, weight: Tensor) -> Tensor:
        """Leads n >= 1 clone what the policy goes on to do: robots fall back on them when a tick is late."""
        horizon, device = action.shape[1], action.device
        offset = torch.arange(1, leads.shape[2], device=device)
        ahead = torch.arange(horizon, device=device)[:, None] + offset
        inside, ahead = ahead < horizon, ahead.clamp_max(horizon - 1)
        nats = -self.agent.space.log_prob(leads[:, :, 1:], action[:, ahead])
        return masked_mean(nats * weight[..., None], inside)

    def group(self, name: str, p: torch.nn.Parameter) -> str:
        """The critic learns at a rate of its own (`lr`): the policy's progress waits for it."""
        return "adamw" if name.startswith("critic.") else super().group(name, p)

    def total(self, losses: Losses) -> Tensor:
        """Policy loss as it is (all its terms are nats, and it may be negative), value loss normalised."""
        rest = {name: loss for name, loss in losses.items() if name != "policy"}
        return losses["policy"] + super().total(rest)

    def checkpoint_modules(self) -> dict[str, torch.nn.Module]:
        """Everything that a robot or a player needs, with the behavioural prior for comparison."""
        modules = {"tokenizer": self.tokenizer, "dynamics": self.dynamics, "agent": self.agent}
        return modules | {"policy": self.policy, "critic": self.critic}
