"""The four phases: who is trained on what, golden curves, and tiny worlds learned end to end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from d4_core import phases
from d4_core.dynamics import Block, Dynamics
from d4_core.phase import Normaliser, masked_mean
from d4_core.phases import (
    DynamicsTraining,
    ImaginationPhase,
    ShortcutObjective,
    TokenizerPhase,
    TokenizerTraining,
    draw_clips,
)
from d4_core.shortcut import ramp

# clips of all kinds in every batch
ALL_ROLES = {"image_rows": 0.3, "bootstrap_rows": 0.5, "bootstrap_warmup": 0.0}


# ---- normaliser


def test_normaliser_divides_by_the_running_rms() -> None:
    normaliser, squares, outputs = Normaliser(["a", "b"], beta=0.9), [], []
    values = [4.0, 1.0, 0.5, -3.0]
    for n, value in enumerate(values, 1):
        outputs.append(normaliser("a", torch.tensor(value)).item())
        squares.append(value**2)
        weights = np.array([0.1 * 0.9 ** (n - 1 - i) for i in range(n)])
        assert outputs[-1] == pytest.approx(value / math.sqrt((weights @ squares) / weights.sum()), rel=1e-5)
    assert outputs[0] == pytest.approx(1.0)
    assert normaliser("b", torch.tensor(5.0)).item() == pytest.approx(1.0)  # terms do not mix


def test_normaliser_is_a_constant_factor_for_the_gradient_and_survives_zero() -> None:
    normaliser, loss = Normaliser(["a"]), torch.tensor(4.0, requires_grad=True)
    (grad,) = torch.autograd.grad(normaliser("a", loss), loss)
    assert grad.item() == pytest.approx(0.25)
    assert Normaliser(["a"])("a", torch.zeros(())).item() == 0.0


def test_a_loss_that_has_vanished_is_not_blown_up() -> None:
    """Scaled up to one, what is left of it would be noise with the weight of a loss."""
    assert Normaliser(["a"])("a", torch.tensor(2e-3)).item() == pytest.approx(1.0)
    assert Normaliser(["a"])("a", torch.tensor(1e-5)).item() == pytest.approx(1e-2)


def test_normaliser_state_is_saved() -> None:
    """Lost on resume, it would scale the first losses by its start value."""
    a, b = Normaliser(["x"]), Normaliser(["x"])
    for value in (1.0, 2.0, 3.0):
        a("x", torch.tensor(value))
    b.load_state_dict(a.state_dict())
    assert a("x", torch.tensor(2.0)) == b("x", torch.tensor(2.0))


def test_masked_mean() -> None:
    value, mask = torch.tensor([[1.0, 2.0], [3.0, 8.0]]), torch.tensor([[True, False], [True, False]])
    assert masked_mean(value, mask) == 2.0
    assert masked_mean(value, torch.zeros(2, 2, dtype=torch.bool)) == 0.0
    assert masked_mean(value[..., None].expand(-1, -1, 3), mask[..., None]) == 2.0


# ---- phase 1


def test_batch_shapes_alternate_and_end_long(dynamics_phase) -> None:
    phase = dynamics_phase(steps=1000, long_share=0.1, long_final=0.2)
    shapes = [phase.shape(step) for step in range(1000)]
    assert set(shapes) == {(6, 4), (3, 8)}
    early = sum(shape == (3, 8) for shape in shapes[:800]) / 800
    assert 0.06 < early < 0.14
    assert set(shapes[800:]) == {(3, 8)}
    assert phase.sample(np.random.default_rng(0), 999)["tokens"].shape == (3, 8, 3, 2)


def test_a_fixed_share_of_clips_comes_from_labelled_episodes(make_logs) -> None:
    mask = np.zeros(28, bool)
    mask[9:21] = True  # episode 1 of 3
    logs, rng = make_logs((9, 12, 7), action_mask=mask), np.random.default_rng(0)
    clips = draw_clips(DynamicsTraining(labelled_share=0.5), logs, rng, 40, 3, np.array([0, 2, 1]))
    labelled = logs.action_mask[clips.index].all(1)
    assert labelled[20:].all()
    assert 0 < labelled[:20].sum() < 20
    blind = draw_clips(DynamicsTraining(labelled_share=0.5), logs, rng, 40, 3, np.array([0, 2]))
    assert blind.index.shape == (40, 3)


class Recorder(nn.Module):
    """Stands for the dynamics model: notes its inputs, and knows that all data are `truth`."""

    def __init__(self, dynamics: Dynamics, truth: float, student: float) -> None:
        super().__init__()
        self.cfg, self.truth, self.student = dynamics.cfg, truth, student
        self.calls: list[dict] = []

    def forward(self, noisy, tau_index, e, action, labelled, agent=None, image_rows=None) -> Block:
        self.calls.append(
            {
                "noisy": noisy,
                "index": tau_index,
                "e": e,
                "labelled": labelled,
                "agent": agent,
                "images": image_rows,
            }
        )
        value = self.student if len(self.calls) == 1 else self.truth
        return Block(torch.full_like(noisy, value), agent)


def objective_call(make_dynamics, student: float, step: int = 30, shortcut: bool = True, **changes):
    """One call on 400 clips of constant data 0.7."""
    recorder = Recorder(make_dynamics(shortcut=shortcut), 0.7, student)
    objective = ShortcutObjective(DynamicsTraining(**(ALL_ROLES | changes)), recorder, 100)
    shape = (400, 5)
    batch = {
        "tokens": torch.full((*shape, 3, 2), 0.7, dtype=torch.float16), "prev_action": torch.zeros(*shape, 1),
        "prev_labelled": torch.ones(shape, dtype=torch.bool), "valid": torch.ones(shape, dtype=torch.bool),
    }  # fmt: skip
    _, error, _ = objective(batch, torch.Generator().manual_seed(0), step)
    return recorder.calls, error


def test_roles_of_rows_are_drawn_independently(make_dynamics) -> None:
    calls, _ = objective_call(make_dynamics, 0.7)
    images, finest = calls[0]["images"], 3
    bootstrap = (calls[0]["e"] < finest).all(1)
    assert torch.equal((calls[0]["e"] < finest).any(1), bootstrap)  # the step size tells rows apart
    assert 0.22 < images.float().mean() < 0.38
    assert 0.42 < bootstrap.float().mean() < 0.58
    assert 0.1 < (images & bootstrap).float().mean() < 0.2
    assert torch.equal(~calls[0]["labelled"], images[:, None].expand(-1, 5))  # images carry no action


def test_a_model_without_shortcuts_gets_no_bootstrap_rows_in_any_phase(make_dynamics) -> None:
    calls, _ = objective_call(make_dynamics, 0.7, shortcut=False)
    assert len(calls) == 1
    assert (calls[0]["e"] == 3).all()


def test_the_teacher_runs_on_bootstrap_rows_only_at_half_the_step(make_dynamics) -> None:
    calls, error = objective_call(make_dynamics, 0.7)
    student, first, second = calls
    bootstrap = (student["e"] < 3).all(1)
    for teacher in (first, second):
        assert torch.equal(teacher["e"], student["e"][bootstrap] + 1)
        assert torch.equal(teacher["labelled"], student["labelled"][bootstrap])
        assert torch.equal(teacher["images"], student["images"][bootstrap])
    assert torch.equal(first["noisy"], student["noisy"][bootstrap])
    assert torch.equal(second["index"] - first["index"], 8 // 2 ** (first["e"]))
    assert error.abs().max() < 1e-6  # a perfect model has no loss on either kind of row


def test_loss_is_weighted_by_the_ramp_on_both_kinds_of_rows(make_dynamics) -> None:
    calls, error = objective_call(make_dynamics, 0.2)
    expected = 0.25 * ramp(calls[0]["index"] / 8)
    torch.testing.assert_close(error, expected, rtol=5e-3, atol=1e-3)
    _, flat = objective_call(make_dynamics, 0.2, ramp=False)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25), rtol=5e-3, atol=1e-3)


def test_the_velocity_loss_is_the_clean_one_over_the_squared_distance_to_the_data(make_dynamics) -> None:
    calls, error = objective_call(make_dynamics, 0.2, ramp=False, velocity_loss=True)
    expected = 0.25 / (1 - calls[0]["index"] / 8).square()
    torch.testing.assert_close(error, expected, rtol=5e-3, atol=1e-3)


def test_no_bootstrap_before_its_time(make_dynamics) -> None:
    assert len(objective_call(make_dynamics, 0.7, step=9, bootstrap_warmup=0.1)[0]) == 1
    assert len(objective_call(make_dynamics, 0.7, step=10, bootstrap_warmup=0.1)[0]) == 3


def test_committed_frames_sit_at_the_context_level_of_flow_rows(make_dynamics) -> None:
    calls, _ = objective_call(make_dynamics, 0.7, committed=0.5)
    flow = (calls[0]["e"] == 3).all(1)
    share = (calls[0]["index"][flow] == 7).float().mean()
    assert 0.5 < share < 0.62  # a half, and an eighth of the rest
    assert (calls[0]["index"][~flow] == 7).sum() == 0


def test_frames_past_the_end_do_not_count(dynamics_phase) -> None:
    phase = dynamics_phase()
    batch = phase.sample(np.random.default_rng(0), 0)
    batch["tokens"] = batch["tokens"].clone().requires_grad_()
    batch["valid"] = batch["valid"].clone()
    batch["valid"][:, 2:] = False
    losses, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    (grad,) = torch.autograd.grad(losses["dynamics"], batch["tokens"])
    assert grad[:, :2].any()
    assert not grad[:, 2:].any()


def test_tokenizer_phase_mixes_frames_and_clips(make_tokenizer, make_logs) -> None:
    logs = make_logs((9, 12), images={"front": np.zeros((21, 8, 12, 3), np.uint8)})
    phase = TokenizerPhase(
        TokenizerTraining(batch=12, length=4, clip_share=0.25), make_tokenizer(), logs, np.arange(2)
    )
    rng = np.random.default_rng(0)
    shapes = [tuple(phase.sample(rng, s)["front"].shape[:2]) for s in range(400)]
    assert set(shapes) == {(12, 1), (3, 4)}
    assert 0.18 < shapes.count((3, 4)) / 400 < 0.32


def test_masking_grows_from_nothing_so_that_several_looks_are_learned(make_tokenizer, make_logs) -> None:
    """With patches hidden from the start, video of two looks taught a small tokenizer the look alone."""
    logs = make_logs((9, 12), images={"front": np.full((21, 8, 12, 3), 255, np.uint8)})
    tokenizer = make_tokenizer()
    seen = []
    tokenizer.encode = lambda obs, gen, masking: (  # type: ignore[method-assign]
        seen.append(masking),
        type(tokenizer).encode(tokenizer, obs, gen, masking),
    )[1]
    phase = TokenizerPhase(
        TokenizerTraining(steps=20, batch=4, mask_warmup=0.5), tokenizer, logs, np.arange(2)
    )
    batch = phase.sample(np.random.default_rng(0), 0)
    for step in (0, 4, 9, 19):
        phase.forward(batch, torch.Generator().manual_seed(0), step)
    assert seen == [0.1, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["tokenizer", "dynamics", "agent", "imagination"])
def test_all_ranks_and_seeds_draw_batches_of_the_same_shape(
    kind: str, dynamics_phase, agent_phase, imagination_phase, make_tokenizer, make_logs
) -> None:
    """Ranks wait for each other: one long batch among short ones would cost all of them its time."""
    images = np.random.default_rng(0).integers(0, 256, (21, 8, 12, 3), dtype=np.uint8)
    logs = make_logs((9, 12), images={"front": images})
    cfg = TokenizerTraining(batch=12, length=4, clip_share=0.3)
    phase = {
        "tokenizer": lambda: TokenizerPhase(cfg, make_tokenizer(), logs, np.arange(2)),
        "dynamics": lambda: dynamics_phase(long_share=0.3),
        "agent": lambda: agent_phase(long_share=0.3, long_length=8),
        "imagination": lambda: imagination_phase(reuse=1),
    }[kind]()
    seen = set()
    for step in range(30):
        here, there = (phase.sample(np.random.default_rng([seed, step]), step) for seed in (0, 1))
        shapes = {name: tuple(value.shape) for name, value in here.items()}
        assert shapes == {name: tuple(value.shape) for name, value in there.items()}
        assert any(not torch.equal(here[name], there[name]) for name in here)
        seen.add(next(iter(shapes.values()))[:2])
    assert len(seen) == 2  # steps still differ


def test_the_perceptual_loss_joins_where_its_weights_are_given(
    make_tokenizer, make_logs, monkeypatch
) -> None:
    class Brightness(nn.Module):
        """Stands for LPIPS, which knows its two files."""

        def __init__(self, features: Path, heads: Path) -> None:
            super().__init__()
            self.files = (features, heads)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a.mean((1, 2, 3)) - b.mean((1, 2, 3))).square()

    monkeypatch.setattr(phases, "Perceptual", Brightness)
    logs = make_logs((9,), images={"front": np.full((9, 8, 12, 3), 200, np.uint8)})
    plain = TokenizerPhase(TokenizerTraining(batch=4), make_tokenizer(), logs, np.arange(1))
    cfg = TokenizerTraining(batch=4, lpips_features="vgg.pth", lpips_heads="lin.pth", lpips_weight=0.2)
    phase = TokenizerPhase(cfg, make_tokenizer(), logs, np.arange(1))
    assert phase.perceptual.files == (Path("vgg.pth"), Path("lin.pth"))
    assert phase.loss_weights == {"pixels": 1.0, "lpips": 0.2}
    batch = phase.sample(np.random.default_rng(0), 0)
    alone, _ = plain(batch, torch.Generator().manual_seed(0), 0)
    losses, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    assert set(alone) == {"pixels"}
    assert alone["pixels"] == losses["pixels"]
    (grad,) = torch.autograd.grad(losses["lpips"], phase.tokenizer.to_latent.weight, retain_graph=True)
    assert grad.any()
    assert phase.total(losses).item() == pytest.approx(1.2)  # both normalised, weighed as asked


# ---- golden curves: a change that is meant to leave the computation alone must leave these alone

GOLDEN_TOKENIZER = [1.814255, 1.516599, 1.351686, 1.127685, 1.008530]
GOLDEN_DYNAMICS = [1.812922, 0.966341, 0.477458, 0.150026, 0.476610]


def test_golden_curve_tokenizer(run, make_tokenizer, make_logs) -> None:
    images = np.random.default_rng(0).integers(0, 256, (21, 8, 12, 3), dtype=np.uint8)
    logs = make_logs((9, 12), images={"front": images})
    cfg = TokenizerTraining(steps=5, batch=12, length=4, clip_share=0.5)
    history = run(TokenizerPhase(cfg, make_tokenizer(), logs, np.arange(2)), 5)
    np.testing.assert_allclose([h["pixels"] for h in history], GOLDEN_TOKENIZER, rtol=5e-3)


def test_golden_curve_dynamics(run, dynamics_phase) -> None:
    history = run(dynamics_phase(steps=5, bootstrap_warmup=0.4, bootstrap_rows=0.5, long_final=0.2), 5)
    np.testing.assert_allclose([h["dynamics"] for h in history], GOLDEN_DYNAMICS, rtol=5e-3)


def test_every_trained_weight_gets_a_gradient_under_autocast(
    imagination_phase, agent_phase, dynamics_phase
) -> None:
    """Autocast may keep copies of the weights from a no-grad rollout or teacher, and lose their gradients."""
    for phase in (imagination_phase(), agent_phase(), dynamics_phase(**ALL_ROLES)):
        if isinstance(phase, ImaginationPhase):
            nn.init.normal_(phase.critic.head.out.weight)  # its start at zero would hide what lies behind it
        batch = phase.sample(np.random.default_rng(0), 0)
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = phase(batch, torch.Generator().manual_seed(0), 30)
        phase.total(losses).backward()
        missing = [name for name, p in phase.trainable() if p.grad is None or not p.grad.isfinite().all()]
        assert missing == []
        dead = [name for name, p in phase.trainable() if p.ndim == 2 and not p.grad.any()]
        assert dead == []


def test_checkpoints_are_complete_in_themselves(dynamics_phase, agent_phase, imagination_phase) -> None:
    assert set(dynamics_phase().checkpoint_modules()) == {"tokenizer", "dynamics"}
    assert set(agent_phase().checkpoint_modules()) == {"tokenizer", "dynamics", "agent"}
    names = set(imagination_phase().checkpoint_modules())
    assert names == {"tokenizer", "dynamics", "agent", "policy", "critic"}
