"""Gates on worlds whose truth is known: each passes on a model that is right and fails on one that is not.

The stand-ins: `Physics` is the dynamics of a point that moves by its action, `Eye` a tokenizer whose pixels
are the position, `Mind` an agent that goes to the middle and is paid for being near a task's goal.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d4_core.actions import ActionPart, ActionSpace
from d4_core.dynamics import Block
from d4_core.gates import (
    Gate,
    agent_gates,
    dynamics_gates,
    fit_probe,
    frames_of,
    not_measured,
    record,
    tokenizer_gates,
)
from d4_core.open_loop import CONTEXT, HORIZONS
from d4_core.shortcut import Grid
from d4_core.tokenizer import Camera, Tokenizer

SPEED = 0.3
GOALS = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
TRAIN, HELD_OUT = np.arange(10), np.arange(10, 14)


# ---- the world


@pytest.fixture
def world(make_logs):
    """Factory of 14 episodes of a moving point, as logs and latents (N, 3, 1): x, y, is it held out."""

    def make(length: int = 24, policy=None, labelled: np.ndarray | None = None):
        rng = np.random.default_rng(0)
        place, action = np.zeros((14, length, 2)), np.zeros((14, length, 2))
        place[:, 0] = rng.uniform(-1, 1, (14, 2))
        for t in range(length):
            noise = rng.uniform(-1, 1, (14, 2))
            action[:, t] = noise if policy is None else policy(place[:, t], noise)
            if t + 1 < length:
                place[:, t + 1] = place[:, t] + SPEED * action[:, t]
        place, action = place.reshape(-1, 2).astype(np.float32), action.reshape(-1, 2).astype(np.float32)
        near = np.exp(-2 * np.square(place[:, None] - GOALS.numpy()).sum(-1)).astype(np.float32)
        mask = np.ones(14, bool) if labelled is None else labelled
        logs = make_logs(
            (length,) * 14, action=action, reward=near, vectors={"pose": place},
            action_mask=np.repeat(mask, length),
        )  # fmt: skip
        held = np.repeat(np.arange(14) >= 10, length).astype(np.float32)
        return logs, np.concatenate([place, held[:, None]], 1)[..., None]

    return make


class Physics(nn.Module):
    """Predicts place + gain * action from the last committed frame.

    Args:
        gain: 0.3 is right, 0 ignores the actions.
        forgetful: error of next-frame predictions in episodes that were held out.
    """

    def __init__(self, gain: float = SPEED, forgetful: float = 0.0) -> None:
        super().__init__()
        self.gain, self.forgetful = gain, forgetful
        grid = Grid(levels=16, context_signal=0.9375)
        self.cfg = SimpleNamespace(grid=grid, num_tokens=3, token_dim=1, shortcut=True)
        self.slots = nn.Parameter(torch.zeros(1))
        limits = {"low": (-1.0, -1.0), "high": (1.0, 1.0)}
        self.space = ActionSpace((ActionPart(kind="continuous", size=2, **limits),), 15)

    def new_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        return SimpleNamespace(
            position=torch.zeros(()), keys=torch.zeros(1, dtype=dtype), reset=lambda: None,
            advance=lambda: None, clean=None,
        )  # fmt: skip

    def begin(self, cache: SimpleNamespace) -> None:
        return None

    def _move(self, clean: Tensor, action: Tensor, labelled: Tensor) -> Tensor:
        step = self.gain * (action * labelled[..., None])
        return clean + nn.functional.pad(step, (0, 1))[..., None]  # the third token stays

    def step(self, noisy, tau_index, e, action, labelled, cache, frame, agent=None) -> Block:
        if int(tau_index[0]) == self.cfg.grid.context_index:
            cache.clean = noisy / self.cfg.grid.tau(tau_index)[:, None, None]
            seen = (
                None if agent is None else torch.cat([cache.clean.flatten(1), agent[:, 0]], 1)[:, None, None]
            )
            return Block(cache.clean[:, None], seen)
        return Block(self._move(cache.clean, action, labelled)[:, None], None)

    def forward(self, noisy, tau_index, e, action, labelled) -> Block:
        before = noisy[:, :-1] / self.cfg.grid.tau(tau_index[:, :-1])[..., None, None]
        clean = self._move(before, action[:, 1:], labelled[:, 1:])
        clean = clean + self.forgetful * (before[:, :, 2:] > 0.5)
        tau = self.cfg.grid.tau(tau_index[:, 1:])[..., None, None]
        clean = (1 - tau) * clean + tau * noisy[:, 1:]  # like any model, it uses what it is shown
        return Block(torch.cat([noisy[:, :1], clean], 1), None)


class Eye:
    """Pixels are the position, squeezed into [0, 1]."""

    cfg = SimpleNamespace(cameras=(SimpleNamespace(name="cam"),))

    def unpack(self, tokens: Tensor) -> Tensor:
        return tokens

    def decode(self, z: Tensor) -> dict[str, Tensor]:
        return {"cam": z}

    def to_pixels(self, name: str, tokens: Tensor) -> Tensor:
        values = (tokens[..., :2, :] / 20 + 0.5).flatten(-2)
        return values.repeat_interleave(12 * 12 * 3 // values.shape[-1], -1).unflatten(-1, (12, 12, 3))


class Mind:
    """Goes to the middle (or has no idea); expects what being near the goal pays (or the opposite)."""

    def __init__(self, physics: Physics, knows: bool = True, honest: float = 1.0) -> None:
        self.space, self.knows, self.honest = physics.space, knows, honest
        self.cfg = SimpleNamespace(num_tasks=2)
        self.policy = SimpleNamespace(first=self._first)

    def tokens(self, task: Tensor) -> Tensor:
        return task[:, None, None].float()

    def _first(self, h: Tensor) -> Tensor:
        error = self.space.centres + 0.7 * h[..., :2, None]
        return (-20 * error.square() * self.knows).flatten(-2)

    def predict_reward(self, h: Tensor) -> Tensor:
        goal = GOALS[h[..., 3].long()]
        return self.honest * torch.exp(-2 * (h[..., :2] - goal).square().sum(-1))


def to_the_middle(place: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.clip(-0.7 * place + 0.3 * noise, -1, 1)


def by_name(gates: list[Gate]) -> dict[str, Gate]:
    assert len({gate.name for gate in gates}) == len(gates)
    return {gate.name: gate for gate in gates}


def failed(gates: list[Gate]) -> set[str]:
    return {gate.name for gate in gates if not gate.ok}


# ---- one gate


@pytest.mark.parametrize(
    ("op", "below", "equal", "above"),
    [
        (">=", False, True, True), (">", False, False, True),
        ("<=", True, True, False), ("<", True, False, False),
    ],
)  # fmt: skip
def test_a_gate_holds_or_not(op: str, below: bool, equal: bool, above: bool) -> None:
    assert [Gate("g", value, op, 2.0, "do it").ok for value in (1.0, 2.0, 3.0)] == [below, equal, above]
    assert not Gate("g", float("nan"), op, 2.0, "do it").ok


def test_a_failed_gate_says_what_to_do_and_one_that_holds_is_quiet() -> None:
    assert (
        str(Gate("PSNR", 1.5, ">=", 3.0, "train longer")) == "FAILED PSNR: 1.5 (must be >= 3) - train longer"
    )
    assert str(Gate("PSNR", 4.0, ">=", 3.0, "train longer")) == "ok     PSNR: 4 (must be >= 3)"


def test_what_cannot_be_measured_is_listed_and_blocks_nothing() -> None:
    gate = not_measured("PSNR", "no pictures")
    assert gate.ok
    assert str(gate) == "-      PSNR (not measured): no pictures"


def test_gates_of_phases_live_side_by_side(tmp_path: Path) -> None:
    def rows() -> dict[str, list[tuple[str, float]]]:
        known = json.loads((tmp_path / "gates.json").read_text())
        return {phase: [(row["name"], row["value"]) for row in gates] for phase, gates in known.items()}

    record(tmp_path, "agent", [Gate("a", 1.0, ">", 0.0, "x", {"more": 2}), Gate("b", 1.0, ">", 2.0, "x")])
    first = json.loads((tmp_path / "gates.json").read_text())["agent"]
    assert first[0] == {
        "name": "a", "value": 1.0, "op": ">", "limit": 0.0, "hint": "x", "detail": {"more": 2}, "ok": True,
    }  # fmt: skip
    assert first[1]["ok"] is False
    record(tmp_path, "imagination", [Gate("c", 3.0, ">", 0.0, "x")])
    record(tmp_path, "agent", [Gate("b", 5.0, ">", 2.0, "x"), Gate("d", 6.0, ">", 2.0, "x")], merge=True)
    assert rows() == {"agent": [("a", 1.0), ("b", 5.0), ("d", 6.0)], "imagination": [("c", 3.0)]}
    record(tmp_path, "agent", [Gate("d", 7.0, ">", 2.0, "x")])
    assert rows() == {"agent": [("d", 7.0)], "imagination": [("c", 3.0)]}
    assert [p.name for p in tmp_path.iterdir()] == ["gates.json"]


# ---- probes


def test_a_probe_reads_what_the_latents_carry_and_nothing_else(world) -> None:
    logs, latents = world()
    frames, other = frames_of(logs, TRAIN), frames_of(logs, HELD_OUT)
    truth = torch.from_numpy(logs.vectors["pose"][other])
    state = torch.get_rng_state()
    probe = fit_probe(latents, logs.vectors["pose"], frames, steps=300)
    assert torch.equal(torch.get_rng_state(), state)  # measuring does not change the training that follows
    seeing = (probe(torch.from_numpy(latents[other])) - truth).square().mean().sqrt()
    blind = fit_probe(np.zeros_like(latents), logs.vectors["pose"], frames, steps=300)
    blind_error = (blind(torch.zeros(1, 3, 1)) - truth).square().mean().sqrt()
    assert seeing < 0.15 * truth.std() < 0.9 * truth.std() < blind_error
    again = fit_probe(latents, logs.vectors["pose"], frames, steps=300)
    assert torch.equal(again(torch.ones(1, 3, 1)), probe(torch.ones(1, 3, 1)))


@pytest.fixture(scope="module")
def pose_probe():
    """Reads the place out of the first two tokens."""

    def probe(tokens: Tensor) -> Tensor:
        return tokens[..., :2, 0]

    return {"pose": probe}


# ---- tokenizer


class Mirror(Tokenizer):
    """A tokenizer whose latents are the pixels: 6 patches of 48 numbers; `fault` breaks it."""

    fault = ""

    def encode(self, obs: dict[str, Tensor], gen: torch.Generator | None = None) -> Tensor:
        z = 0.9 * (2 * (self.normalise("front", obs["front"]) * 0.25 + 0.5) - 1)
        if self.fault == "collapsed":
            z = 0.5 + 0.001 * z
        if self.fault == "saturated":
            z = torch.sign(z)
        if self.fault == "alike":
            z = torch.where(torch.arange(z.shape[1])[:, None, None] % 10 == 0, z, 0.05)
        return z

    def decode(self, latents: Tensor) -> dict[str, Tensor]:
        made = ((latents / 0.9 + 1) / 2 - 0.5) / 0.25
        return {"front": 0.1 * made if self.fault == "blurred" else made}


@pytest.fixture
def pictures(make_tokenizer, make_logs):
    """(tokenizer, logs, latents): random pictures whose brightness is a quantity the model never saw."""
    rng = np.random.default_rng(0)
    level = rng.uniform(0.2, 0.8, (80, 1)).astype(np.float32)
    images = (level[:, :, None, None] * 255 + rng.normal(0, 20, (80, 8, 12, 3))).clip(0, 255).astype(np.uint8)
    logs = make_logs((20,) * 4, images={"front": images}, vectors={"level": level})
    tokenizer = make_tokenizer()
    tokenizer.__class__ = Mirror
    mean = torch.from_numpy(images / 255).float().mean(0)
    tokenizer.set_statistics({"front": mean}, {"front": torch.tensor(0.25)})
    return tokenizer, logs, np.repeat(level[:, :, None], 2, 1)


def level_of(tokens: Tensor) -> Tensor:
    return tokens[..., 0, :]


def test_a_good_tokenizer_passes(pictures) -> None:
    tokenizer, logs, latents = pictures
    gates = by_name(tokenizer_gates(tokenizer, logs, latents, {"level": level_of}, np.array([2, 3])))
    assert failed(gates.values()) == set()
    assert len(gates) == 5
    psnr = gates["PSNR above the mean image (dB)"].detail
    real = logs.images["front"][40:] / 255
    error = np.square(tokenizer.mean_front.numpy() - real).mean()
    assert psnr["mean_image_psnr"] == pytest.approx(-10 * np.log10(error), rel=1e-4)
    assert gates["probe of level (rmse / spread)"].value < 1e-6


@pytest.mark.parametrize(
    ("fault", "gate"),
    [
        ("blurred", "PSNR above the mean image (dB)"),
        ("collapsed", "latent spread (std per channel)"),
        ("saturated", "latent saturation (share beyond 0.99)"),
        ("alike", "latent cosine between frames"),
    ],
)
def test_each_fault_of_a_tokenizer_fails_its_gate(pictures, fault: str, gate: str) -> None:
    tokenizer, logs, latents = pictures
    tokenizer.fault = fault
    gates = by_name(tokenizer_gates(tokenizer, logs, latents, {"level": level_of}, np.array([2, 3])))
    assert not gates[gate].ok
    assert gates["probe of level (rmse / spread)"].ok  # measured on the cached latents


class Squint(Mirror):
    """Sees with one eye what it shows of both, that of the wrist blurred."""

    def decode(self, latents: Tensor) -> dict[str, Tensor]:
        front = super().decode(latents)["front"]
        return {"front": front, "wrist": 0.1 * front}


def test_every_camera_has_its_gate(make_tokenizer, make_logs) -> None:
    """Only the first one's pictures were looked at: a hand's camera could be lost without a word."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (80, 8, 12, 3), np.uint8)
    logs = make_logs((20,) * 4, images={"front": images, "wrist": images})
    names = ("front", "wrist")
    tokenizer = make_tokenizer(cameras=tuple(Camera(name=name, height=8, width=12) for name in names))
    tokenizer.__class__ = Squint
    mean, scale = torch.from_numpy(images / 255).float().mean(0), torch.tensor(0.25)
    tokenizer.set_statistics(dict.fromkeys(names, mean), dict.fromkeys(names, scale))
    gates = by_name(tokenizer_gates(tokenizer, logs, np.zeros((80, 2, 1)), {}, np.array([2, 3])))
    assert gates["PSNR above the mean image of front (dB)"].ok
    assert not gates["PSNR above the mean image of wrist (dB)"].ok


def test_latents_that_leave_out_the_robot_fail_whatever_the_psnr(pictures) -> None:
    tokenizer, logs, latents = pictures
    shuffled = latents[np.random.default_rng(1).permutation(80)]
    gates = tokenizer_gates(tokenizer, logs, shuffled, {"level": level_of}, np.array([2, 3]))
    assert failed(gates) == {"probe of level (rmse / spread)"}


# ---- dynamics

SHUFFLED = "next-frame loss, shuffled / true actions"
OVERFIT = "next-frame loss, held out / labelled training"
MIRRORED = "mirrored actions move pose / sampler noise"
OPEN_LOOP = {f"position error / copy-last, {h} steps" for h in (4, 8, 16)}
PICTURES = {f"PSNR above copy-last (dB), {h} steps" for h in (4, 8, 16)}


def test_the_true_physics_pass(world, pose_probe) -> None:
    logs, latents = world()
    gates, curves = dynamics_gates(Eye(), Physics(), logs, latents, pose_probe, TRAIN, HELD_OUT, count=64)
    assert failed(gates) == set()
    assert by_name(gates).keys() == {SHUFFLED, OVERFIT, MIRRORED} | OPEN_LOOP | PICTURES
    assert curves["horizons"] == list(HORIZONS)
    assert curves["probe"] == "pose"
    assert curves["steps"] == 4
    for kind in ("psnr", "position"):
        assert all(len(values) == len(HORIZONS) for values in curves[kind].values())
    place = curves["position"]
    assert place["reconstruction"] == [0.0] * 5
    assert all(m < c < r for m, c, r in zip(place["model"], place["copy_last"], place["random"], strict=True))
    one_step = SPEED * np.linalg.norm(logs.action[frames_of(logs, HELD_OUT)], axis=1).mean()
    assert place["copy_last"][0] == pytest.approx(one_step, rel=0.15)
    detail = by_name(gates)[SHUFFLED].detail
    assert detail["held_out"] == pytest.approx(detail["labelled_train"], rel=0.3)
    assert detail["unlabelled_train"] is None
    json.dumps(curves)


def test_a_model_that_ignores_actions_fails(world, pose_probe) -> None:
    logs, latents = world()
    gates, _ = dynamics_gates(Eye(), Physics(gain=0.0), logs, latents, pose_probe, TRAIN, HELD_OUT, count=64)
    assert {SHUFFLED, MIRRORED} | OPEN_LOOP | PICTURES == failed(gates)
    assert by_name(gates)[MIRRORED].value == 0.0


def test_a_model_that_moves_the_wrong_way_loses_to_copying(world, pose_probe) -> None:
    logs, latents = world()
    gates, _ = dynamics_gates(Eye(), Physics(gain=-SPEED), logs, latents, pose_probe, TRAIN, HELD_OUT)
    assert failed(gates) >= OPEN_LOOP | PICTURES
    assert by_name(gates)[MIRRORED].ok  # controllable it is


def test_a_model_that_knows_its_episodes_by_heart_fails(world, pose_probe) -> None:
    logs, latents = world()
    model = Physics(forgetful=0.5)
    gates, _ = dynamics_gates(Eye(), model, logs, latents, pose_probe, TRAIN, HELD_OUT, count=64)
    assert failed(gates) >= {OVERFIT}
    detail = by_name(gates)[OVERFIT].detail
    assert detail["held_out"] > 5 * detail["labelled_train"]


def test_unlabelled_training_episodes_are_reported_beside(world, pose_probe) -> None:
    labelled = np.arange(14) % 2 == 0
    logs, latents = world(labelled=labelled)
    gates, _ = dynamics_gates(Eye(), Physics(), logs, latents, pose_probe, TRAIN, HELD_OUT, count=64)
    detail = by_name(gates)[SHUFFLED].detail
    # without its action the next place is a guess
    assert detail["unlabelled_train"] > 2 * detail["held_out"]
    assert detail["copy_last"] == pytest.approx(detail["unlabelled_train"], rel=0.3)
    assert failed(gates) == set()


def test_without_labels_the_world_is_measured_and_control_is_not(world, pose_probe) -> None:
    logs, latents = world(labelled=np.zeros(14, bool))
    gates, curves = dynamics_gates(Eye(), Physics(), logs, latents, pose_probe, TRAIN, HELD_OUT, count=64)
    assert by_name(gates).keys() == {f"{SHUFFLED} (not measured)"} | OPEN_LOOP | PICTURES
    assert curves["horizons"] == list(HORIZONS)


def test_without_probes_control_is_measured_in_the_tokens(world) -> None:
    logs, latents = world()
    right, _ = dynamics_gates(Eye(), Physics(), logs, latents, {}, TRAIN, HELD_OUT, count=64)
    deaf, _ = dynamics_gates(Eye(), Physics(gain=0.0), logs, latents, {}, TRAIN, HELD_OUT, count=64)
    name = "mirrored actions move the tokens / sampler noise"
    assert by_name(right)[name].ok
    assert not by_name(deaf)[name].ok
    assert not OPEN_LOOP & by_name(right).keys()


def test_a_world_in_which_nothing_moves_is_not_measured(world, pose_probe) -> None:
    """Copying the last frame is exact then: it was divided by zero."""
    logs, latents = world(policy=lambda place, noise: 0 * noise)
    gates, curves = dynamics_gates(Eye(), Physics(), logs, latents, pose_probe, TRAIN, HELD_OUT, count=64)
    dark = {f"{name} (not measured)" for name in OPEN_LOOP | PICTURES}
    assert by_name(gates).keys() >= dark
    assert failed(gates) <= {SHUFFLED, MIRRORED}  # that the actions do nothing is true
    json.dumps(curves, allow_nan=False)


def test_pictures_that_never_change_are_not_measured(pictures) -> None:
    tokenizer, logs, latents = pictures
    logs.images["front"][:], logs.vectors["level"][:] = 77, 0.3
    tokenizer.set_statistics({"front": torch.full((8, 12, 3), 77 / 255)}, {"front": torch.tensor(0.25)})
    gates = tokenizer_gates(tokenizer, logs, latents, {"level": level_of}, np.array([2, 3]))
    names = {gate.name for gate in gates if gate.op == "n/a"}
    assert names == {
        "PSNR above the mean image (not measured)", "probe of level (rmse / spread) (not measured)",
    }  # fmt: skip
    assert failed(gates) == {"latent spread (std per channel)"}  # which says to look for static video


@pytest.mark.parametrize(("length", "longest"), [(24, 16), (12, 8), (10, 4), (5, 1)])
def test_short_episodes_are_measured_as_far_as_they_go(world, pose_probe, length: int, longest: int) -> None:
    logs, latents = world(length=length)
    gates, curves = dynamics_gates(Eye(), Physics(), logs, latents, pose_probe, TRAIN, HELD_OUT, count=64)
    assert curves["horizons"] == [h for h in HORIZONS if h <= longest]
    measured = {f"position error / copy-last, {h} steps" for h in (4, 8, 16) if h <= longest}
    assert {name for name in by_name(gates) if name.startswith("position")} == measured
    assert (f"{SHUFFLED} (not measured)" in by_name(gates)) == (length < 8)


def test_episodes_that_are_too_short_for_a_rollout_say_so(world, pose_probe) -> None:
    logs, latents = world(length=CONTEXT)
    gates, curves = dynamics_gates(Eye(), Physics(), logs, latents, pose_probe, TRAIN, HELD_OUT)
    assert [gate.name for gate in gates] == ["open loop against copy-last (not measured)"]
    assert "5 frames" in gates[0].hint
    assert curves == {}


# ---- agent

CLONED = "held-out BC nats / marginal"
REWARD = "reward correlation on held-out episodes"


def test_a_good_agent_passes(world) -> None:
    logs, latents = world(policy=to_the_middle)
    physics = Physics()
    gates = agent_gates(Mind(physics), physics, logs, latents, TRAIN, HELD_OUT)
    assert failed(gates) == set()
    cloned, reward = by_name(gates)[CLONED], by_name(gates)[REWARD]
    assert cloned.value == pytest.approx(cloned.detail["held_out"] / cloned.detail["marginal"])
    assert 0 < cloned.detail["marginal"] < 2 * np.log(15)  # the average action is worth more than none
    assert reward.value > 0.9


def test_a_policy_without_an_idea_fails_and_its_rewards_are_judged_apart(world) -> None:
    logs, latents = world(policy=to_the_middle)
    physics = Physics()
    gates = agent_gates(Mind(physics, knows=False), physics, logs, latents, TRAIN, HELD_OUT)
    assert failed(gates) == {CLONED}
    assert by_name(gates)[CLONED].detail["held_out"] == pytest.approx(2 * np.log(15), rel=1e-4)


def test_a_reward_head_that_is_wrong_fails(world) -> None:
    logs, latents = world(policy=to_the_middle)
    physics = Physics()
    gates = agent_gates(Mind(physics, honest=-1.0), physics, logs, latents, TRAIN, HELD_OUT)
    assert failed(gates) == {REWARD}


def test_rewards_that_never_vary_are_not_correlated(world) -> None:
    logs, latents = world(policy=to_the_middle)
    logs.reward[:] = 0
    physics = Physics()
    assert REWARD not in by_name(agent_gates(Mind(physics), physics, logs, latents, TRAIN, HELD_OUT))


def test_cloning_is_not_judged_where_nothing_held_out_can_be_cloned(world) -> None:
    logs, latents = world(policy=to_the_middle, labelled=np.arange(14) < 10)
    physics = Physics()
    gates = agent_gates(Mind(physics), physics, logs, latents, TRAIN, HELD_OUT)
    assert f"{CLONED} (not measured)" in by_name(gates)
