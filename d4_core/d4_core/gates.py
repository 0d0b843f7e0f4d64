"""Blocking gates: measurements on held-out data that must hold before the next phase is worth its time.

A low loss says little: latents can leave out the robot at a good PSNR, a world model can ignore the actions
and a policy can clone training episodes by heart. Each gate measures one such failure and comes with a hint.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d4_core.agent import Agent
from d4_core.data import Logs, draw, encode_episode, first_frames, transitions
from d4_core.dynamics import Dynamics
from d4_core.imagination import Dream
from d4_core.open_loop import (
    CONTEXT,
    EXACT_DB,
    OpenLoop,
    distance,
    horizon_curves,
    labelled_clips,
    next_frame_error,
    open_loop,
    open_loop_clips,
    transitions_of,
    whole_clips,
)
from d4_core.phases import relevant_episodes
from d4_core.tokenizer import Tokenizer
from d4_datasets import whole
from d4_datasets.joined import Frames

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_OPERATORS["n/a"] = lambda *_: True


@dataclass(frozen=True)
class Gate:
    """One measurement and what it must satisfy."""

    name: str
    value: float
    op: str
    limit: float
    hint: str
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it holds; NaN never does."""
        return bool(_OPERATORS[self.op](self.value, self.limit))

    def __str__(self) -> str:
        if self.op == "n/a":
            return f"{'-':6} {self.name}: {self.hint}"
        verdict = "ok" if self.ok else "FAILED"
        return f"{verdict:6} {self.name}: {self.value:.4g} (must be {self.op} {self.limit:.4g})" + (
            "" if self.ok else f" - {self.hint}"
        )


def not_measured(name: str, reason: str) -> Gate:
    """A gate that these data cannot serve: it shows in every list and blocks nothing."""
    return Gate(f"{name} (not measured)", 0.0, "n/a", 0.0, reason)


def record(run: Path, phase: str, gates: list[Gate], merge: bool = False) -> None:
    """Write a phase's gates to <run>/gates.json, keeping other phases' and, with `merge`, its own others."""
    path = run / "gates.json"
    known = whole.read_json(path, dict)
    rows = [{**asdict(g), "ok": g.ok} for g in gates]
    names = {g.name for g in gates}
    kept = [row for row in known.get(phase, []) if row["name"] not in names] if merge else []
    known[phase] = kept + rows
    whole.write(path, json.dumps(known, indent=1))


# -- probe ---------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """Reads a quantity that the model never saw (such as the robot's position) out of packed tokens.

    A small perceptron on frozen tokens; its held-out error says whether the latents carry the quantity.
    """

    net: torch.nn.Module
    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (.., N, L) to the quantity (.., k) in its units."""
        return self.net(tokens.flatten(-2).float()) * self.std + self.mean


def fit_probe(
    latents: Frames, target: np.ndarray, frames: np.ndarray, seed: int = 0, steps: int = 2000
) -> Probe:
    """Fit a probe of `target` (N, k) on `latents` (N, Nz, Dz) over the given frames."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = int(np.prod(latents.shape[1:]))
        net = torch.nn.Sequential(
            torch.nn.Linear(inputs, 256), torch.nn.LayerNorm(256), torch.nn.SiLU(),
            torch.nn.Linear(256, 256), torch.nn.LayerNorm(256), torch.nn.SiLU(),
            torch.nn.Linear(256, target.shape[1]),
        )  # fmt: skip
    y = torch.from_numpy(np.ascontiguousarray(target[frames])).float()
    mean, std = y.mean(0), y.std(0).clamp_min(1e-6)
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        pick = rng.integers(0, len(frames), 256)
        x = torch.from_numpy(latents[frames[pick]]).float().flatten(1)
        loss = (net(x) - (y[pick] - mean) / std).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return Probe(net.eval(), mean, std)


def frames_of(logs: Logs, episodes: np.ndarray) -> np.ndarray:
    """Global frame indices of these episodes."""
    start, length = logs.episode_start, logs.episode_length
    return np.concatenate([np.arange(start[e], start[e] + length[e]) for e in episodes])


# -- tokenizer -----------------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_gates(
    tokenizer: Tokenizer, logs: Logs, latents: Frames, probes: dict[str, Probe], held_out: np.ndarray
) -> list[Gate]:
    """PSNR above mean images, latent spread, saturation and collapse, and probes, on held-out episodes."""
    cameras = [camera.name for camera in tokenizer.cfg.cameras]
    encoded: list[Tensor] = []
    errors: dict[str, list[tuple[float, float]]] = {camera: [] for camera in cameras}
    for e in held_out[:40]:
        encoded.append(encode_episode(tokenizer, logs, int(e)))
        for camera, squared in _picture_errors(tokenizer, logs, int(e), encoded[-1]).items():
            errors[camera].append(squared)
    gates = [_picture_gate(f" of {name}" * (len(cameras) > 1), errors[name]) for name in cameras]
    z = torch.cat(encoded).flatten(1)
    centred = z - z.mean(0)
    other = centred[torch.randperm(len(centred), generator=torch.Generator().manual_seed(0))]
    cosine = torch.nn.functional.cosine_similarity(centred, other, dim=-1).mean()
    gates += [
        Gate("latent spread (std per channel)", float(z.std(0).mean()), ">=", 0.05,
             "latents have collapsed: check the data for static video"),
        Gate("latent saturation (share beyond 0.99)", float((z.abs() > 0.99).float().mean()), "<=", 0.2,
             "tanh is saturated: lower the learning rate or enlarge the batch"),
        Gate("latent cosine between frames", float(cosine), "<=", 0.5,
             "all frames look alike to the encoder"),
    ]  # fmt: skip
    frames = frames_of(logs, held_out)
    for name, probe in probes.items():
        truth = torch.from_numpy(np.ascontiguousarray(logs.vectors[name][frames]))
        error = (probe(torch.from_numpy(latents[frames])) - truth).square().mean(0).sqrt()
        spread = truth.std(0)
        moving = spread > 1e-6  # a coordinate that never changes cannot be missed
        if not moving.any():
            reason = f"{name} does not change in the held-out episodes"
            gates.append(not_measured(f"probe of {name} (rmse / spread)", reason))
            continue
        gates.append(
            Gate(f"probe of {name} (rmse / spread)", float((error / spread)[moving].mean()), "<=", 0.2,
                 f"the latents do not carry {name}: PSNR can hide that; train longer or use smaller patches",
                 {"rmse": error.tolist(), "spread": spread.tolist()})
        )  # fmt: skip
    return gates


def _picture_errors(tokenizer: Tokenizer, logs: Logs, e: int, z: Tensor) -> dict[str, tuple[float, float]]:
    """Squared errors of an episode's pictures made of its latents, and of the mean image, by camera."""
    if not logs.images:
        return {}
    rows = slice(logs.episode_start[e], logs.episode_start[e] + logs.episode_length[e])
    out = {}
    for camera, patches in tokenizer.decode(z[None]).items():
        if camera in logs.images:
            real = torch.from_numpy(np.array(logs.images[camera][rows])).to(z.device).float() / 255
            made = tokenizer.to_pixels(camera, patches)[0].clamp(0, 1)
            mean = getattr(tokenizer, f"mean_{camera}")
            out[camera] = (float((made - real).square().mean()), float((mean - real).square().mean()))
    return out


def _picture_gate(whose: str, errors: Sequence[tuple[float, float]]) -> Gate:
    name = f"PSNR above the mean image{whose}"
    if not errors:
        return not_measured(name, "the dataset holds latents, not pictures")
    if max(mean for _, mean in errors) < 1e-7:
        return not_measured(name, "all held-out pictures are the mean image")
    psnr, mean_psnr = (float(-10 * np.log10(x)) for x in np.mean(errors, 0))
    hint = "the tokenizer has learned little: train longer"
    detail = {"psnr": psnr, "mean_image_psnr": mean_psnr}
    return Gate(f"{name} (dB)", psnr - mean_psnr, ">=", 3.0, hint, detail)


# -- dynamics ------------------------------------------------------------------------------------------------


@torch.no_grad()
def dynamics_gates(
    tokenizer: Tokenizer,
    dynamics: Dynamics,
    logs: Logs,
    latents: Frames,
    probes: dict[str, Probe],
    train: np.ndarray,
    held_out: np.ndarray,
    steps: int = 4,
    count: int = 128,
) -> tuple[list[Gate], dict[str, Any]]:
    """Open-loop accuracy against copying the last frame, use of the actions, and overfitting to the labels.

    Returns:
        The gates, and the curves against horizon for the report.
    """
    frames = open_loop_clips(logs, held_out, count)
    if not len(frames):
        reason = f"no held-out episode has the {CONTEXT + 1} frames that an open-loop rollout needs"
        return [not_measured("open loop against copy-last", reason)], {}
    run = partial(open_loop, dynamics, logs, latents, frames, steps=steps)
    curves = horizon_curves(tokenizer, logs, probes, run(seed=0)) | {"steps": steps}
    gates = _copy_gates(curves)
    gates += action_gates(dynamics, logs, latents, train, held_out)
    if logs.labelled[held_out].any():
        gates += mirror_gates(probes, run)
    return gates, curves


def _copy_gates(curves: dict[str, Any]) -> list[Gate]:
    """Position error and PSNR from 4 frames ahead on, against those of copying the last frame."""
    gates = []
    for kind, op, limit in (("position", "<", 1.0), ("psnr", ">", 0.0)):
        for i, h in enumerate(curves["horizons"] if kind in curves else []):
            if h < 4:
                continue
            model, copy = curves[kind]["model"][i], curves[kind]["copy_last"][i]
            name = "position error / copy-last" if kind == "position" else "PSNR above copy-last (dB)"
            if copy == (0.0 if kind == "position" else EXACT_DB):
                reason = "nothing moves in the held-out clips, and copying the last frame is exact"
                gates.append(not_measured(f"{name}, {h} steps", reason))
                continue
            value = model / copy if kind == "position" else model - copy
            gates.append(Gate(f"{name}, {h} steps", value, op, limit,
                              "open loop loses to copying the last frame: train longer or on more episodes",
                              {"model": model, "copy_last": copy}))  # fmt: skip
    return gates


def action_gates(
    dynamics: Dynamics, logs: Logs, latents: Frames, train: np.ndarray, held_out: np.ndarray
) -> list[Gate]:
    """Whether the predicted world follows the actions, and generalises beyond the labelled episodes."""
    short = labelled_clips(logs, held_out, 8, 512)
    if not len(short) or not len(labelled_clips(logs, train, 8, 1)):
        reason = "training or held-out data have no labelled episode of 8 frames"
        return [not_measured("next-frame loss, shuffled / true actions", reason)]
    plain = next_frame_error(dynamics, logs, latents, short)
    shuffled = next_frame_error(dynamics, logs, latents, short, shuffle=True)
    seen = next_frame_error(dynamics, logs, latents, labelled_clips(logs, train, 8, 512))
    if plain == 0.0 or seen == 0.0:
        reason = "next frames are predicted without any error: nothing moves in these clips"
        return [not_measured("next-frame loss, shuffled / true actions", reason)]
    dark = train[~logs.labelled[train]]
    unlabelled = whole_clips(logs, dark, 8, 512)
    unknown = next_frame_error(dynamics, logs, latents, unlabelled) if len(unlabelled) else None
    detail = {
        "labelled_train": seen,
        "unlabelled_train": unknown,
        "held_out": plain,
        "copy_last": _copy_error(latents, short),
    }
    return [
        Gate("next-frame loss, shuffled / true actions", shuffled / plain, ">=", 1.2,
             "the model ignores the actions: more labelled episodes or longer training", detail),
        Gate("next-frame loss, held out / labelled training", plain / seen, "<=", 2.0,
             "the model memorises the labelled episodes: record more of them", detail),
    ]  # fmt: skip


def mirror_gates(probes: dict[str, Probe], run: Callable[..., OpenLoop]) -> list[Gate]:
    """Whether mirrored actions lead elsewhere by more than another draw of the sampler, 8 frames ahead.

    Measured in the quantities of the probes, or in the tokens themselves where the data have no probe.
    """
    runs = [run(seed=seed, mirror=mirror).predicted for seed, mirror in ((0, False), (1, False), (0, True))]
    at = min(8, runs[0].shape[1]) - 1
    readers: dict[str, Callable[[Tensor], Tensor]] = {**probes}
    readers = readers or {"the tokens": lambda tokens: tokens.flatten(-2)}
    gates = []
    for name, read in readers.items():
        here, again, mirrored = (read(tokens[:, at].cpu()) for tokens in runs)
        floor = distance(here, again)
        gates.append(
            Gate(f"mirrored actions move {name} / sampler noise",
                 distance(here, mirrored) / max(floor, 1e-9), ">", 1.0,
                 "mirrored actions make no difference beyond sampling noise: the model is not controllable",
                 {"mirrored": distance(here, mirrored), "noise_floor": floor})
        )  # fmt: skip
    return gates


def _copy_error(latents: Frames, frames: np.ndarray) -> float:
    return float(np.square(latents[frames[:, -1]].astype(np.float32) - latents[frames[:, -2]]).mean())


# -- agent ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def agent_gates(
    agent: Agent,
    dynamics: Dynamics,
    logs: Logs,
    latents: Frames,
    train: np.ndarray,
    held_out: np.ndarray,
    count: int = 256,
    relevant_return: float = 0.4,
) -> list[Gate]:
    """Held-out BC nats against the marginal action distribution, and reward correlation.

    `relevant_return` is the one of the training: which episodes accomplish a task.
    """
    clone = partial(_bc_nats, agent, dynamics, logs, latents, count=count, share=relevant_return)
    gates = [_bc_gate(agent, clone(train), clone(held_out))]
    predicted, real = reward_pairs(agent, dynamics, logs, latents, held_out, count)
    if real.std() > 1e-6:
        correlation = float(np.corrcoef(predicted, real)[0, 1])
        gates.append(
            Gate("reward correlation on held-out episodes", correlation, ">=", 0.8,
                 "the reward head cannot be trusted: train phase 2 longer", {"frames": len(real)})
        )  # fmt: skip
    return gates


def _features(
    agent: Agent, dynamics: Dynamics, batch: dict[str, Tensor], tokens: Tensor, task: Tensor
) -> Tensor:
    """h (B, T, F) of clips committed at the context level, as in deployment."""
    dream = Dream(dynamics, agent, len(tokens), torch.Generator(tokens.device).manual_seed(0))
    out = [
        dream.observe(tokens[:, t], batch["prev_action"][:, t], batch["prev_labelled"][:, t], task)
        for t in range(tokens.shape[1])
    ]
    return torch.stack(out, 1)


def _hindsight(
    logs: Logs, episodes: np.ndarray, tasks: int, count: int, length: int, share: float
) -> tuple[np.ndarray, Tensor]:
    rng, frames, task = np.random.default_rng(0), [], []
    for q in range(tasks):
        usable = relevant_episodes(logs, episodes, q, share)
        if len(usable):
            clips = draw(logs, rng, count // tasks, length, usable)
            frames.append(clips.index[clips.valid.all(1)])
            task += [q] * len(frames[-1])
    index = np.concatenate(frames) if frames else np.empty((0, length), np.int64)
    return index, torch.tensor(task, dtype=torch.int64)


def _bc_gate(agent: Agent, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Gate:
    """Lead-0 nats on held-out relevant clips against those of the average action, on the same frames."""
    name = "held-out BC nats / marginal"
    (seen, action), (held, target) = train, held_out
    if not len(held) or not len(seen):
        return not_measured(name, "no held-out labelled episode accomplishes a task")
    marginal = _marginal_nats(agent, action, target)
    detail = {"train": float(seen.mean()), "held_out": float(held.mean()), "marginal": marginal}
    hint = "the cloned policy knows no more than the average action: record more labelled episodes"
    return Gate(name, detail["held_out"] / marginal, "<", 1.0, hint, detail)


def _bc_nats(
    agent: Agent,
    dynamics: Dynamics,
    logs: Logs,
    latents: Frames,
    episodes: np.ndarray,
    count: int,
    share: float,
) -> tuple[Tensor, Tensor]:
    """Nats (M,) and actions (M, A) of the labelled frames of relevant clips."""
    frames, task = _hindsight(logs, episodes, agent.cfg.num_tasks, count, 12, share)
    device = dynamics.slots.device
    if not len(frames):
        return torch.zeros(0, device=device), torch.zeros(0, agent.space.size, device=device)
    batch = {k: v.to(device) for k, v in transitions_of(logs, frames).items()}
    tokens = torch.from_numpy(latents[frames]).float().to(device)
    h = _features(agent, dynamics, batch, tokens, task.to(device))
    nats = -agent.space.log_prob(agent.policy.first(h), batch["action"])
    return nats[batch["labelled"]], batch["action"][batch["labelled"]]


def _marginal_nats(agent: Agent, action: Tensor, target: Tensor) -> float:
    """Nats on `target` of a policy that always predicts the distribution of `action` (fitted by LBFGS)."""
    space = agent.space
    params = torch.zeros(space.num_params, device=action.device).requires_grad_()
    with torch.enable_grad():
        optimiser = torch.optim.LBFGS([params], max_iter=50)

        def closure() -> Tensor:
            optimiser.zero_grad()
            nats = -space.log_prob(params.expand(len(action), -1), action).mean()
            loss = nats + 1e-4 * params.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    return float(-space.log_prob(params.detach().expand(len(target), -1), target).mean())


def reward_pairs(
    agent: Agent, dynamics: Dynamics, logs: Logs, latents: Frames, episodes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and real rewards of all tasks on clips of these episodes."""
    clips = draw(logs, np.random.default_rng(1), count, 12, episodes)
    device = dynamics.slots.device
    batch = {k: v.to(device) for k, v in transitions(logs, first_frames(logs), clips).items()}
    tokens = torch.from_numpy(latents[clips.index]).float().to(device)
    predicted, real = [], []
    for q in range(agent.cfg.num_tasks):
        task = torch.full((len(tokens),), q, device=device)
        h = _features(agent, dynamics, batch, tokens, task)
        column = min(q, batch["reward"].shape[2] - 1)
        predicted.append(agent.predict_reward(h)[batch["valid"]].cpu().numpy())
        real.append(batch["reward"][..., column][batch["valid"]].cpu().numpy())
    return np.concatenate(predicted), np.concatenate(real)
