"""Space/time transformer: attention arithmetic, masks, and the cache against the plain forward pass."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from d4_core.transformer import (
    Attention,
    KVCache,
    RMSNorm,
    Transformer,
    TransformerConfig,
    rotary_tables,
    rotate,
)

SLOTS = 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def build(shape: TransformerConfig, time_slots: int = 0) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(shape, time_slots)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("attention.out.weight", "down.weight")):
                p.mul_(10.0)  # branches as loud as the residual stream, so that an error in one shows
    return model


def cache_of(model: Transformer, batch: int = 2, slots: int = SLOTS) -> KVCache:
    return KVCache(model.cfg, batch, slots, "cpu", torch.float32)


def stream(model: Transformer, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Run frames one by one against the cache."""
    outputs = []
    for t in range(x.shape[1]):
        outputs.append(model.step(x[:, t : t + 1], cache, model.begin(cache)))
        cache.advance()
    return torch.cat(outputs, 1)


# ---- arithmetic


@pytest.mark.parametrize("time_slots", [0, 2])
def test_layers_that_are_run_again_give_the_same_gradients(tiny_shape, time_slots: int) -> None:
    x = torch.randn(2, 4, SLOTS, tiny_shape().dim)
    images = torch.tensor([True, False])
    found, kept = [], []
    for again in (False, True):
        model, sizes = build(tiny_shape(recompute=again), time_slots), []
        with torch.autograd.graph.saved_tensors_hooks(partial(_weigh, sizes), lambda t: t):
            loss = model(x, image_rows=images).square().mean()
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < kept[0] / 3


def _weigh(sizes: list[int], t: torch.Tensor) -> torch.Tensor:
    sizes.append(t.nbytes)
    return t.detach()


def test_layers_are_not_run_again_for_nothing(tiny_shape, monkeypatch) -> None:
    """Without a gradient, as in imagination, and while a cache is filled."""
    monkeypatch.delattr("d4_core.transformer.checkpoint")
    x = torch.randn(2, 4, SLOTS, tiny_shape().dim)
    plain, again = build(tiny_shape()), build(tiny_shape(recompute=True))
    caches = cache_of(plain), cache_of(again)
    with torch.no_grad():
        assert torch.equal(plain(x, cache=caches[0]), again(x, cache=caches[1]))
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert caches[0].keys.any()


@pytest.mark.parametrize("changes", [{"depth": 3}, {"kv_heads": 3}, {"dim": 18}, {"dim": 12}])
def test_shapes_that_do_not_divide_are_refused(tiny_shape, changes: dict) -> None:
    with pytest.raises(ValueError, match=r"must be a multiple|do not divide"):
        tiny_shape(**changes)


def test_layer_pattern_is_one_time_layer_in_every_n() -> None:
    model = Transformer(TransformerConfig(dim=16, depth=8, heads=2, kv_heads=1, time_every=4))
    assert [layer.over_time for layer in model.layers] == [False, False, False, True] * 2


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "a part of wider rows"])
@given(rows=st.integers(1, 5), seed=st.integers(0, 99), zero=st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_norms_own_backward_pass_is_the_formulas(cut: bool, rows: int, seed: int, zero: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, rows, 3, 8, generator=gen), torch.randn(2, rows, 3, 8, generator=gen)
    if zero:
        x[0, 0] = 0.0
    norm = RMSNorm(8)
    with torch.no_grad():
        norm.scale.copy_(torch.rand(8, generator=gen) + 0.5)
    wide = torch.cat([x, x], 2).requires_grad_() if cut else x.clone().requires_grad_()
    given_x = wide[:, :, 3:] if cut else wide
    found = torch.autograd.grad(norm(given_x), [wide, norm.scale], dy)
    exact, scale = x.double().requires_grad_(), norm.scale.detach().double().requires_grad_()
    y = exact * 8**0.5 / exact.norm(dim=-1, keepdim=True).clamp_min(1e-6) * scale
    expected = torch.autograd.grad(y, [exact, scale], dy.double())
    dx = found[0][:, :, 3:] if cut else found[0]
    away = x.norm(dim=-1) > 0  # at zero the slope is that of the limit 1e-6, which is immense
    torch.testing.assert_close(dx[away], expected[0][away].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1].float(), rtol=1e-4, atol=1e-5)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("radial", [0.0, 5.0])
@pytest.mark.parametrize("width", [32, 256])
def test_the_norms_backward_pass_in_bfloat16_is_about_as_exact_as_autograds(
    width: int, radial: float
) -> None:
    """What a gradient has along x cancels, and rounding shows there."""
    norm, gen = RMSNorm(width), torch.Generator().manual_seed(0)
    x = torch.randn(500, width, generator=gen).bfloat16()
    dy = (torch.randn(500, width, generator=gen) + radial * x.float()).bfloat16()

    def plain(x: torch.Tensor) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * (width**0.5 / size).to(x.dtype) * norm.scale.to(x.dtype)

    def slopes(formula, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        return [g.float() for g in torch.autograd.grad(formula(x), [x, norm.scale], dy)]

    exact = slopes(norm, x.float(), dy.float())
    for mine, theirs, right in zip(slopes(norm, x, dy), slopes(plain, x, dy), exact, strict=True):
        assert (mine - right).norm() < 1.5 * (theirs - right).norm() + 1e-3 * right.norm()


def test_a_frozen_norm_passes_gradients_on() -> None:
    norm, x = RMSNorm(8).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    norm(x).pow(3).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(norm(x), norm(x.detach()))


def test_rms_norm_equals_the_library_and_survives_zeros() -> None:
    norm, x = RMSNorm(8), torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        norm.scale.uniform_(0.5, 2.0)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.scale, eps=0.0), **TOLERANCE)
    zero = torch.zeros(1, 8, requires_grad=True)
    norm(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_attention_equals_a_reference_written_out(tiny_shape, soft_cap: float) -> None:
    shape = tiny_shape(soft_cap=soft_cap)
    attention, x = Attention(shape), 3 * torch.randn(2, 3, SLOTS, shape.dim)
    bias = torch.zeros(SLOTS, SLOTS).masked_fill(
        torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0]]).bool(), -math.inf
    )
    q, k, v = attention.project(x, over_time=False)  # (B, T, H or K, S, E)
    k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, dim=2) for t in (k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(shape.head_dim)
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    expected = attention.out(((logits + bias).softmax(-1) @ v).transpose(2, 3).flatten(3))
    torch.testing.assert_close(attention.forward_space(x, bias), expected, **TOLERANCE)
    torch.testing.assert_close(q.square().mean(-1), torch.ones(q.shape[:-1]), **TOLERANCE)  # QK-norm is on


def test_masked_keys_get_exactly_no_weight(tiny_shape) -> None:
    attention = Attention(tiny_shape())
    x = torch.randn(1, 1, SLOTS, 16)
    bias = torch.zeros(SLOTS, SLOTS)
    bias[:2, 2] = -math.inf
    changed = x.clone()
    changed[:, :, 2] = 1e3 * torch.randn(16)
    assert torch.equal(
        attention.forward_space(x, bias)[:, :, :2], attention.forward_space(changed, bias)[:, :, :2]
    )


def test_rotation_is_relative_and_exact_after_weeks() -> None:
    q, k = torch.randn(2, 1, 64)
    near = (
        rotate(q, rotary_tables(torch.tensor([7]), 64, 1e4))
        @ rotate(k, rotary_tables(torch.tensor([2]), 64, 1e4)).T
    )
    for start in (10**6, 10**7, 10**9):
        a, b = (rotary_tables(torch.tensor([start + i]), 64, 1e4) for i in (7, 2))
        torch.testing.assert_close(rotate(q, a) @ rotate(k, b).T, near, **TOLERANCE)
    moved = (
        rotate(q, rotary_tables(torch.tensor([8]), 64, 1e4))
        @ rotate(k, rotary_tables(torch.tensor([2]), 64, 1e4)).T
    )
    assert (moved - near).abs().max() > 1e-3  # and it does encode the distance


# ---- who sees whom


def test_space_layers_do_not_mix_frames_and_time_layers_do_not_mix_slots(tiny_shape) -> None:
    x = torch.randn(1, 4, SLOTS, 16, requires_grad=True)
    space = build(tiny_shape(depth=2, time_every=2))
    space.layers = space.layers[:1]
    (grad,) = torch.autograd.grad(space(x)[0, 2, 1].sum(), x)
    assert grad[0, 2].abs().amin(-1).gt(0).all()
    assert not grad[0, [0, 1, 3]].any()
    time = build(tiny_shape(depth=1, time_every=1))
    (grad,) = torch.autograd.grad(time(x)[0, 2, 1].sum(), x)
    assert grad[0, :3, 1].abs().amin(-1).gt(0).all()
    assert not grad[0, :, [0, 2]].any()
    assert not grad[0, 3].any()


def test_nothing_depends_on_the_future(tiny_shape) -> None:
    model, x = build(tiny_shape()), torch.randn(2, 6, SLOTS, 16)
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, 2, SLOTS, 16)
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])


def test_time_attention_is_a_sliding_window_of_context_frames(tiny_shape) -> None:
    model, x = (
        build(tiny_shape(depth=1, time_every=1, context=3)),
        torch.randn(1, 8, 1, 16, requires_grad=True),
    )
    (grad,) = torch.autograd.grad(model(x)[0, 6].sum(), x)
    assert [bool(g.any()) for g in grad[0, :, 0]] == [False, False, False, False, True, True, True, False]


def test_image_rows_are_separate_images_row_by_row(tiny_shape) -> None:
    """The diagonal time mask belongs to rows, not to the batch: its neighbours keep their past."""
    model, x = build(tiny_shape()), torch.randn(3, 5, SLOTS, 16)
    y = model(x, image_rows=torch.tensor([False, True, False]))
    video = model(x)
    torch.testing.assert_close(y[[0, 2]], video[[0, 2]], **TOLERANCE)
    frames = torch.cat([model(x[1:2, t : t + 1]) for t in range(5)], 1)
    torch.testing.assert_close(y[1:2], frames, **TOLERANCE)
    assert (y[1, 1:] - video[1, 1:]).abs().max() > 1e-2


def test_slots_without_time_attention_have_no_past(tiny_shape) -> None:
    model, x = build(tiny_shape(depth=1, time_every=1), time_slots=2), torch.randn(1, 4, SLOTS, 16)
    changed = x.clone()
    changed[:, :2] += 1.0
    a, b = model(x), model(changed)
    assert torch.equal(a[:, 3, 2], b[:, 3, 2])
    assert not torch.equal(a[:, 3, :2], b[:, 3, :2])


# ---- gate 6: the cache


@pytest.mark.parametrize(("context", "length"), [(1, 4), (3, 2), (3, 3), (3, 11), (5, 23)])
@torch.no_grad()
def test_gate_06_cached_equals_uncached_past_eviction(tiny_shape, context: int, length: int) -> None:
    model, x = build(tiny_shape(context=context)), torch.randn(2, length, SLOTS, 16)
    torch.testing.assert_close(stream(model, x, cache_of(model)), model(x), **TOLERANCE)


@given(
    context=st.integers(1, 5), prefill=st.integers(1, 9), steps=st.integers(1, 7), passes=st.integers(0, 2)
)
@settings(max_examples=25)
@torch.no_grad()
def test_gate_06_prefill_then_steps_equal_one_clip(
    context: int, prefill: int, steps: int, passes: int
) -> None:
    shape = TransformerConfig(
        dim=16, depth=4, heads=4, kv_heads=2, mlp_ratio=2.0, time_every=2, context=context
    )
    model, x = build(shape), torch.randn(2, prefill + steps, SLOTS, 16)
    cache = cache_of(model)
    stream(model, torch.randn(2, 7, SLOTS, 16), cache)  # rubbish of an earlier session stays in the memory
    cache.reset()
    head = model(x[:, :prefill], cache=cache)
    tail = []
    for t in range(prefill, prefill + steps):
        frame = model.begin(cache)
        for _ in range(passes):  # unfinished versions of the frame
            model.step(torch.randn(2, 1, SLOTS, 16), cache, frame)
        tail.append(model.step(x[:, t : t + 1], cache, frame))
        cache.advance()
    torch.testing.assert_close(torch.cat([head, *tail], 1), model(x), **TOLERANCE)


@torch.no_grad()
def test_gate_06_denoising_passes_leave_no_trace_bitwise(tiny_shape) -> None:
    model, x = build(tiny_shape()), torch.randn(2, 9, SLOTS, 16)
    clean, disturbed = cache_of(model), cache_of(model)
    expected = stream(model, x, clean)
    for t in range(9):
        frame = model.begin(disturbed)
        for size in (SLOTS, SLOTS - 1):  # denoising passes carry fewer slots than the commit pass
            model.step(torch.randn(2, 1, size, 16), disturbed, frame, slots=slice(0, size))
        assert torch.equal(model.step(x[:, t : t + 1], disturbed, frame), expected[:, t : t + 1])
        disturbed.advance()
    assert torch.equal(clean.keys, disturbed.keys)
    assert torch.equal(clean.values, disturbed.values)


@pytest.mark.parametrize("start", [10**6, 10**6 + 3, 10**9])
@torch.no_grad()
def test_gate_06_rope_far_from_the_start_of_the_session(tiny_shape, start: int) -> None:
    """A session that has run for days answers as a fresh one does to the same recent frames."""
    model = build(tiny_shape(context=4))
    reach = 2 * (4 - 1)  # two time layers
    x = torch.randn(2, reach + 6, SLOTS, 16)
    near, far = cache_of(model), cache_of(model)
    far.position.fill_(start)
    far.keys.normal_()
    far.values.normal_()
    a, b = stream(model, x, near), stream(model, x, far)
    torch.testing.assert_close(a[:, reach + 1 :], b[:, reach + 1 :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_step_allocates_nothing_in_the_cache(tiny_shape) -> None:
    model = build(tiny_shape())
    cache = cache_of(model)
    places = cache.keys.data_ptr(), cache.values.data_ptr(), cache.position.data_ptr()
    stream(model, torch.randn(2, 9, SLOTS, 16), cache)
    cache.reset()
    assert places == (cache.keys.data_ptr(), cache.values.data_ptr(), cache.position.data_ptr())
