"""Action spaces against torch.distributions, and what unlabelled frames look like to the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, kl_divergence

from d4_core.actions import ActionEncoder, ActionPart, ActionSpace, two_hot

BINS = 5
MIXED = (
    ActionPart(kind="binary", size=2),
    ActionPart(kind="continuous", size=2, low=(-1.0, 0.0), high=(3.0, 0.5)),
    ActionPart(kind="categorical", classes=4),
    ActionPart(kind="continuous", size=1, low=(-2.0,), high=(2.0,)),
)

binary = st.integers(1, 3).map(lambda n: ActionPart(kind="binary", size=n))
categorical = st.integers(2, 5).map(lambda n: ActionPart(kind="categorical", classes=n))
continuous = st.lists(st.tuples(st.floats(-3, 0), st.floats(0.5, 4)), min_size=1, max_size=3).map(
    lambda pairs: ActionPart(
        kind="continuous", size=len(pairs), low=tuple(p[0] for p in pairs), high=tuple(p[1] for p in pairs)
    )
)
parts = st.lists(st.one_of(binary, categorical, continuous), min_size=1, max_size=4).map(tuple)


def reference(space: ActionSpace, params: Tensor) -> list[tuple[ActionPart, Distribution]]:
    """One library distribution per part; continuous parts are categoricals over bins."""
    out, p = [], 0
    for part in space.parts:
        if part.kind == "binary":
            out.append((part, Independent(Bernoulli(logits=params[..., p : p + part.size]), 1)))
            p += part.size
        elif part.kind == "categorical":
            out.append((part, Categorical(logits=params[..., p : p + part.classes])))
            p += part.classes
        else:
            logits = params[..., p : p + part.size * space.bins].unflatten(-1, (part.size, space.bins))
            out.append((part, Independent(Categorical(logits=logits), 1)))
            p += part.size * space.bins
    assert p == space.num_params == params.shape[-1]
    return out


def entries(space: ActionSpace, action: Tensor) -> list[Tensor]:
    """Values of each part as its library distribution takes them."""
    out, a = [], 0
    for part in space.parts:
        value = action[..., a : a + part.size]
        if part.kind == "continuous":
            low, high = torch.tensor(part.low), torch.tensor(part.high)
            value = ((value - low) / (high - low) * (space.bins - 1)).round()
        out.append(value[..., 0] if part.kind == "categorical" else value)
        a += part.size
    assert a == space.size == action.shape[-1]
    return out


@given(parts=parts, seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_log_prob_kl_mode_and_samples_agree_with_the_library(
    parts: tuple[ActionPart, ...], seed: int
) -> None:
    space, gen = ActionSpace(parts, BINS), torch.Generator().manual_seed(seed)
    params, prior = 3 * torch.randn(2, 2, 3, space.num_params, generator=gen)
    ours, theirs = reference(space, params), reference(space, prior)
    action = space.sample(params, gen)
    assert action.shape == (2, 3, space.size)
    values = entries(space, action)
    expected = sum(d.log_prob(v) for (_, d), v in zip(ours, values, strict=True))
    torch.testing.assert_close(space.log_prob(params, action), expected, rtol=1e-4, atol=1e-4)
    kl = sum(kl_divergence(p, q) for (_, p), (_, q) in zip(ours, theirs, strict=True))
    torch.testing.assert_close(space.kl(params, prior), kl, rtol=1e-4, atol=1e-4)
    assert not space.kl(params, params).any()
    best = space.mode(params)
    for (_, d), v in zip(ours, entries(space, best), strict=True):
        base = d.base_dist if isinstance(d, Independent) else d
        assert torch.equal(v, base.mode.float())
    others = space.sample(params, gen)
    assert (space.log_prob(params, best) >= space.log_prob(params, others) - 1e-4).all()


def test_samples_follow_their_probabilities(rng: torch.Generator) -> None:
    space = ActionSpace(MIXED, BINS)
    params = torch.randn(space.num_params, generator=rng)
    action = space.sample(params.expand(40_000, -1), rng)
    for (part, d), v in zip(reference(space, params), entries(space, action), strict=True):
        if part.kind == "binary":
            torch.testing.assert_close(v.mean(0), d.mean, rtol=0, atol=0.015)
        else:
            probs = (d if part.kind == "categorical" else d.base_dist).probs
            for column, p in zip(v.reshape(len(v), -1).T, probs.reshape(-1, probs.shape[-1]), strict=True):
                seen = torch.bincount(column.long(), minlength=len(p)) / len(v)
                torch.testing.assert_close(seen, p, rtol=0, atol=0.015)
    columns = action - action.mean(0)
    correlation = (columns.T @ columns) / len(action) / columns.std(0) / columns.std(0)[:, None]
    assert (correlation - torch.eye(space.size)).abs().max() < 0.03  # parts are drawn independently


def test_samples_are_constants_reproducible_and_within_limits(rng: torch.Generator) -> None:
    """A sample that carries a gradient makes d ln pi / d mean vanish (or worse) in the policy loss."""
    space = ActionSpace(MIXED, BINS)
    params = torch.randn(100, space.num_params, requires_grad=True)
    a, b = (space.sample(params, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert not a.requires_grad
    assert not space.mode(params).requires_grad
    for column, (low, high) in zip(a[:, [2, 3, 5]].T, ((-1, 3), (0, 0.5), (-2, 2)), strict=True):
        assert low <= column.min()
        assert column.max() <= high
    assert not torch.equal(a, space.sample(params, rng))


@given(value=st.floats(-2, 2))
def test_values_between_centres_count_towards_both_by_distance(value: float) -> None:
    space = ActionSpace((ActionPart(kind="continuous", size=1, low=(-2.0,), high=(2.0,)),), BINS)
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1, 2.0]).log_softmax(0)
    place = value + 2  # bins are one unit apart
    lower = min(int(place), 3)
    expected = (1 - (place - lower)) * logits[lower] + (place - lower) * logits[lower + 1]
    torch.testing.assert_close(space.log_prob(logits, torch.tensor([value])), expected, rtol=1e-4, atol=1e-4)


def test_labels_outside_the_limits_count_as_the_limit() -> None:
    space = ActionSpace((ActionPart(kind="continuous", size=1, low=(-2.0,), high=(2.0,)),), BINS)
    params = torch.randn(BINS)
    assert torch.equal(
        space.log_prob(params, torch.tensor([9.0])), space.log_prob(params, torch.tensor([2.0]))
    )


def test_bounded_and_finite_at_extreme_logits() -> None:
    space = ActionSpace(MIXED, BINS)
    params = (1e4 * torch.randn(50, space.num_params)).requires_grad_()
    prior = 1e4 * torch.randn(50, space.num_params)
    action = space.sample(prior)
    total = space.log_prob(params, action).sum() + space.kl(params, prior).sum()
    (grad,) = torch.autograd.grad(total, params)
    assert total.isfinite()
    assert grad.isfinite().all()


@given(value=st.floats(-50, 50), seed=st.integers(0, 100))
def test_two_hot_is_a_distribution_with_the_value_as_its_mean(value: float, seed: int) -> None:
    centres = torch.randn(7, generator=torch.Generator().manual_seed(seed)).sort().values * 20
    weights = two_hot(torch.tensor(value), centres)
    assert (weights >= 0).all()
    assert (weights > 0).sum() <= 2
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    mean = (weights * centres).sum()
    torch.testing.assert_close(mean, torch.tensor(value).clamp(centres[0], centres[-1]), rtol=1e-4, atol=1e-3)


# ---- tokens


@pytest.fixture
def encoder() -> ActionEncoder:
    torch.manual_seed(0)
    return ActionEncoder(ActionSpace(MIXED, BINS), dim=8, num_tokens=3)


def test_parts_are_encoded_separately_and_summed(encoder: ActionEncoder) -> None:
    action = torch.tensor([[[1.0, 0.0, 3.0, 0.25, 2.0, -1.0]]])
    yes = torch.ones(1, 1, dtype=torch.bool)
    total = (
        encoder.base + encoder.tables["0"].weight[1] + encoder.tables["0"].weight[2]
    )  # key 0 down, key 1 up
    total = total + encoder.linear["1"](torch.tensor([1.0, 0.0])) + encoder.tables["2"].weight[2]
    total = total + encoder.linear["3"](torch.tensor([-0.5]))
    torch.testing.assert_close(encoder(action, yes)[0, 0], total.view(3, 8))


def test_gate_09_unlabelled_differs_from_the_zero_action(encoder: ActionEncoder) -> None:
    """No key pressed is a statement; unlabelled is none."""
    zero = torch.zeros(1, 1, 6)
    zero[..., 2], zero[..., 3] = 1.0, 0.25  # the middle of the continuous ranges
    said, unsaid = (encoder(zero, torch.full((1, 1), x)) for x in (True, False))
    assert torch.equal(unsaid[0, 0], encoder.base.view(3, 8))
    assert (said - unsaid).abs().max() > 0.1


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30, -7.0, 99.0])
def test_gate_09_unlabelled_frames_tolerate_any_action(encoder: ActionEncoder, rubbish: float) -> None:
    """In the output and in the gradient: 0 x NaN is NaN in a weight's gradient, too."""
    action = torch.zeros(2, 3, 6)
    action[:, 1] = rubbish
    labelled = torch.tensor([[True, False, True]]).expand(2, -1)
    tokens = encoder(action, labelled)
    assert torch.equal(tokens, encoder(torch.nan_to_num(action * 0), labelled))
    nn.Module.zero_grad(encoder)
    tokens.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_label_mask_is_per_frame(encoder: ActionEncoder) -> None:
    action = encoder.space.sample(torch.randn(2, 4, encoder.space.num_params))
    labelled = torch.rand(2, 4) < 0.5
    tokens = encoder(action, labelled)
    everywhere = encoder(action, torch.ones_like(labelled))
    assert torch.equal(tokens[labelled], everywhere[labelled])
    assert torch.equal(tokens[~labelled], encoder.base.view(3, 8).expand(int((~labelled).sum()), -1, -1))


def test_a_mirrored_action_is_the_opposite_within_the_limits() -> None:
    parts = (
        ActionPart(kind="binary", size=2),
        ActionPart(kind="continuous", size=2, low=(-1.0, 0.0), high=(1.0, 3.0)),
        ActionPart(kind="categorical", classes=4),
    )
    space = ActionSpace(parts, 5)
    action = torch.tensor([[0.0, 1.0, 0.5, 3.0, 0.0], [1.0, 1.0, 0.0, 1.5, 2.0]])
    expected = torch.tensor([[1.0, 0.0, -0.5, 0.0, 3.0], [0.0, 0.0, 0.0, 1.5, 1.0]])
    assert torch.equal(space.mirror(action), expected)
    assert torch.equal(space.mirror(space.mirror(action)), action)
