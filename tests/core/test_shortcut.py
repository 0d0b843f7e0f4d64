"""Shortcut forcing: the grid, the bootstrap target in both spaces, and the sampler."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d4_core.shortcut import (
    Grid,
    bootstrap_target,
    corrupt,
    denoise,
    ramp,
    sample_levels,
    shortcut_schedule,
)

SHAPE = (6, 5, 3, 2)


def smooth(noisy: Tensor, index: Tensor, e: Tensor) -> Tensor:
    """A made-up network that depends on all its inputs and mixes frames and tokens."""
    level = (index / 8 + 0.37 * e)[..., None, None].to(noisy.dtype)
    return torch.tanh(noisy.cumsum(1) * 0.7 + noisy.flip(2) + level)


@pytest.mark.parametrize("levels", [4, 12, 0])
def test_grids_that_are_no_power_of_two_are_refused(levels: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Grid(levels=levels)


@pytest.mark.parametrize(("levels", "index"), [(8, 7), (16, 14), (64, 58), (128, 115), (256, 230)])
def test_context_level_is_signal_nine_tenths_on_the_grid(levels: int, index: int) -> None:
    """Noise 0.1, that is signal 0.9: the paper's tau_ctx = 0.1 read literally loses object identity."""
    grid = Grid(levels=levels)
    assert grid.context_index == index
    assert 0.85 < grid.tau(torch.tensor(index)) < 0.91


@pytest.mark.parametrize("signal", [1.0, 0.99, -0.2])
def test_context_level_must_be_a_row_that_training_reaches(signal: float) -> None:
    """tau = 1 is never trained: its row does not exist."""
    with pytest.raises(ValueError, match="context_signal"):
        Grid(levels=8, context_signal=signal)


def test_corruption_and_ramp() -> None:
    clean, noise = torch.randn(2, *SHAPE)
    tau = torch.rand(SHAPE[:2])
    mixed = corrupt(clean, noise, tau)
    torch.testing.assert_close(mixed[3, 2], (1 - tau[3, 2]) * noise[3, 2] + tau[3, 2] * clean[3, 2])
    assert torch.equal(corrupt(clean, noise, torch.ones(SHAPE[:2])), clean)
    torch.testing.assert_close(ramp(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.1, 0.55, 1.0]))


@pytest.mark.parametrize("levels", [8, 64])
def test_gate_05_every_row_used_at_inference_can_be_drawn_in_training(
    levels: int, rng: torch.Generator
) -> None:
    grid = Grid(levels=levels)
    rows = torch.arange(4000) % 2 == 0
    index, e = sample_levels(grid, (4000, 16), rows, rng)
    drawn = set(zip(index.flatten().tolist(), e.flatten().tolist(), strict=True))
    legal = {(j * levels // 2**k, k) for k in range(grid.finest + 1) for j in range(2**k)}
    assert drawn == legal
    used = {(grid.context_index, grid.finest)}

    def spy(noisy: Tensor, tau_index: Tensor, exponent: Tensor) -> Tensor:
        used.update(zip(tau_index.flatten().tolist(), exponent.flatten().tolist(), strict=True))
        return noisy

    for k in range(grid.finest + 1):
        denoise(spy, grid, torch.zeros(1, 1, 1, 1), 2**k)
        denoise(spy, grid, torch.zeros(1, 1, 1, 1), 2**k, finest_label=True)
    bootstrap_target(spy, grid, torch.zeros(2000, 16, 1, 1), index[rows], e[rows])  # and the teacher's rows
    assert used <= legal


def test_level_law(rng: torch.Generator) -> None:
    """Flow rows: finest step, tau uniform. Bootstrap rows: coarser steps alike, tau uniform on their grid."""
    grid = Grid(levels=8)
    rows = torch.arange(2000) < 1000
    index, e = sample_levels(grid, (2000, 20), rows, rng)
    assert (e[~rows] == 3).all()
    flow = torch.bincount(index[~rows].flatten(), minlength=8) / index[~rows].numel()
    torch.testing.assert_close(flow, torch.full((8,), 1 / 8), rtol=0, atol=0.01)
    steps = torch.bincount(e[rows].flatten(), minlength=4) / e[rows].numel()
    torch.testing.assert_close(steps, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), rtol=0, atol=0.02)
    quarter = index[rows][e[rows] == 2]
    law = torch.bincount(quarter, minlength=8) / len(quarter)
    torch.testing.assert_close(law, torch.tensor([0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0]), rtol=0, atol=0.02)
    assert len(set(e[0].tolist())) > 1  # per frame, not per row


# ---- gate 3


@pytest.mark.parametrize("levels", [8, 64])
def test_gate_03_bootstrap_target_in_x_space_equals_v_space(levels: int, rng: torch.Generator) -> None:
    """The loss and its gradient are those of the velocity form with its factor (1 - tau)^2."""
    grid = Grid(levels=levels)
    tau_index, e = sample_levels(grid, SHAPE[:2], torch.ones(SHAPE[0], dtype=torch.bool), rng)
    z = torch.randn(SHAPE, generator=rng, dtype=torch.float64)
    student = torch.randn(SHAPE, generator=rng, dtype=torch.float64)
    tau, d = (tau_index / levels).double()[..., None, None], (0.5 ** e.double())[..., None, None]
    half_step = (d[..., 0, 0] * levels / 2).long()
    first = smooth(z, tau_index, e + 1)
    b1 = (first - z) / (1 - tau)
    middle = z + b1 * d / 2
    b2 = (smooth(middle, tau_index + half_step, e + 1) - middle) / (1 - tau - d / 2)
    velocity_loss = (1 - tau) ** 2 * ((student - z) / (1 - tau) - (b1 + b2) / 2).square()
    y = bootstrap_target(smooth, grid, z, tau_index, e)
    torch.testing.assert_close((student - y).square(), velocity_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("e", [0, 1, 2])
def test_gate_03_last_cell_returns_the_second_teacher_step(e: int) -> None:
    grid, z = Grid(levels=8), torch.randn(SHAPE)
    index = torch.full(SHAPE[:2], 8 - 8 // 2**e)  # tau = 1 - d
    calls = []

    def spy(noisy: Tensor, tau_index: Tensor, exponent: Tensor) -> Tensor:
        calls.append(smooth(noisy, tau_index, exponent))
        return calls[-1]

    y = bootstrap_target(spy, grid, z, index, torch.full(SHAPE[:2], e))
    assert len(calls) == 2
    torch.testing.assert_close(y, calls[1], rtol=1e-5, atol=1e-5)


def test_gate_03_a_perfect_teacher_gives_the_data(rng: torch.Generator) -> None:
    grid, clean = Grid(levels=16), torch.randn(SHAPE)
    index, e = sample_levels(grid, SHAPE[:2], torch.ones(SHAPE[0], dtype=torch.bool), rng)
    noisy = corrupt(clean, torch.randn(SHAPE), grid.tau(index))

    def oracle(z: Tensor, tau_index: Tensor, exponent: Tensor) -> Tensor:
        expected = corrupt(
            clean,
            (noisy - grid.tau(index)[..., None, None] * clean) / (1 - grid.tau(index))[..., None, None],
            grid.tau(tau_index),
        )
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)  # content and label agree
        return clean

    torch.testing.assert_close(bootstrap_target(oracle, grid, noisy, index, e), clean, rtol=1e-4, atol=1e-4)


def test_bootstrap_target_is_a_constant() -> None:
    weight = torch.ones((), requires_grad=True)
    y = bootstrap_target(
        lambda z, i, e: z * weight, Grid(levels=8), torch.randn(SHAPE), torch.zeros(SHAPE[:2]).long(),
        torch.zeros(SHAPE[:2]).long(),
    )  # fmt: skip
    assert not y.requires_grad


# ---- gate 4


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("finest_label", [False, True])
def test_gate_04_sampler_with_an_oracle_is_exact_and_labels_what_it_shows(
    steps: int, finest_label: bool
) -> None:
    grid, clean, noise = Grid(levels=8), *torch.randn(2, *SHAPE)
    labels = []

    def oracle(noisy: Tensor, tau_index: Tensor, e: Tensor) -> Tensor:
        torch.testing.assert_close(noisy, corrupt(clean, noise, grid.tau(tau_index)), rtol=1e-5, atol=1e-5)
        assert (e == (3 if finest_label else math.log2(steps))).all()
        labels.append(float(grid.tau(tau_index)[0, 0]))
        return clean

    assert torch.equal(denoise(oracle, grid, noise, steps, finest_label), clean)
    assert labels == [k / steps for k in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_gate_04_last_step_returns_the_prediction_itself(steps: int) -> None:
    outputs = []

    def spy(noisy: Tensor, tau_index: Tensor, e: Tensor) -> Tensor:
        outputs.append(smooth(noisy, tau_index, e))
        return outputs[-1]

    assert torch.equal(denoise(spy, Grid(levels=8), torch.randn(SHAPE), steps), outputs[-1])
    assert len(outputs) == steps


def test_gate_04_steps_follow_the_current_velocity() -> None:
    """Re-using the initial noise instead is no Euler step and gets worse with K."""
    noise, steps = torch.randn(SHAPE), 4
    z = noise
    for k in range(steps):
        x = smooth(z, torch.full(SHAPE[:2], 2 * k), torch.full(SHAPE[:2], 2))
        z = z + (x - z) / (1 - k / steps) / steps
    torch.testing.assert_close(denoise(smooth, Grid(levels=8), noise, steps), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [0, -1, 3, 6, 16])
def test_step_counts_off_the_grid_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        denoise(smooth, Grid(levels=8), torch.randn(SHAPE), steps)


def test_shortcut_schedule() -> None:
    assert [shortcut_schedule(s, 100, 0.25, 0.3) for s in (0, 24, 25, 99)] == [0.0, 0.0, 0.3, 0.3]
    assert shortcut_schedule(0, 100, 0.0, 0.3) == 0.3
    assert shortcut_schedule(99, 100, 0.0, 0.0) == 0.0
