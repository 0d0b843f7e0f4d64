"""Tokenizer: masks, determinism, streaming, and the probes that blind encoders fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from d4_core.tokenizer import Camera, Tokenizer, Vector, reconstruction_loss

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
RICH = {
    "cameras": (Camera(name="front", height=8, width=12), Camera(name="wrist", height=4, width=8)),
    "vectors": (Vector(name="joints", size=3),),
}


def observe(model: Tokenizer, batch: int = 2, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    obs = {
        c.name: torch.randint(0, 256, (batch, length, c.height, c.width, 3), generator=gen, dtype=torch.uint8)
        for c in model.cfg.cameras
    }
    return obs | {v.name: torch.randn(batch, length, v.size, generator=gen) for v in model.cfg.vectors}


@pytest.fixture
def rich(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return make_tokenizer(**RICH)


def test_shapes_and_range(rich: Tokenizer) -> None:
    obs = observe(rich)
    z = rich.encode(obs)
    assert z.shape == (2, 5, 4, 3)
    assert z.abs().max() < 1
    out = rich.decode(z)
    assert {k: v.shape[2:] for k, v in out.items()} == {"front": (6, 48), "wrist": (2, 48), "joints": (1, 3)}


def test_untrained_decoder_shows_the_mean_image(make_tokenizer) -> None:
    model = make_tokenizer(awake=False)
    mean = torch.rand(8, 12, 3)
    model.set_statistics({"front": mean}, {"front": torch.tensor(0.2)})
    with torch.no_grad():
        model.unembed["front"].bias.zero_()
        pixels = model.to_pixels("front", model.decode(torch.zeros(1, 1, 4, 3))["front"])
    torch.testing.assert_close(pixels[0, 0], mean)


def test_patching_round_trips_pixels(rich: Tokenizer) -> None:
    obs = observe(rich)
    rich.set_statistics({"front": torch.rand(8, 12, 3)}, {"front": torch.tensor(0.3)})
    pixels = rich.to_pixels("front", rich.normalise("front", obs["front"]))
    torch.testing.assert_close(pixels, obs["front"].float() / 255)


def test_gate_07_deterministic_without_masking_and_random_with_it(rich: Tokenizer) -> None:
    obs = observe(rich)
    assert torch.equal(rich.encode(obs), rich.encode(obs))
    a, b, again = (rich.encode(obs, torch.Generator().manual_seed(s)) for s in (1, 2, 1))
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


def test_masking_share_is_uniform_per_frame_up_to_its_maximum(make_tokenizer) -> None:
    model = make_tokenizer(cameras=(Camera(name="front", height=80, width=80),), awake=False)
    with torch.no_grad():
        model.embed["front"].weight.zero_()
        model.embed["front"].bias.zero_()
        model.positions["front"].zero_()
        model.hidden["front"].fill_(1.0)
    obs = observe(model, batch=20, length=10)
    hidden = model.embed_frames(obs, torch.Generator().manual_seed(0))[:, :, model.cfg.num_latents :, 0]
    share = hidden.mean(-1).flatten()  # one per frame: 400 patches
    assert 0.4 < share.mean() < 0.5
    assert share.std() > 0.2  # per frame, not one share for all
    assert 0.8 < share.max() < 0.97
    assert not model.embed_frames(obs)[:, :, model.cfg.num_latents :].any()
    assert not model.embed_frames(obs, torch.Generator(), 0.0)[:, :, model.cfg.num_latents :].any()


def test_hidden_patches_are_really_hidden(rich: Tokenizer) -> None:
    """With everything hidden the latents cannot depend on what the cameras saw."""
    rich.cfg = type(rich.cfg)(**{**vars(rich.cfg), "mask_max": 1e9})
    a, b = (rich.encode(observe(rich, seed=s), torch.Generator().manual_seed(1)) for s in (0, 1))
    torch.testing.assert_close(a, b)


# ---- masks


def test_encoder_patches_read_neither_latents_nor_other_modalities(rich: Tokenizer) -> None:
    x = rich.embed_frames(observe(rich)).detach().requires_grad_()
    y = rich.encoder(x, rich.encoder_bias)
    groups = {"latents": slice(0, 4), "front": slice(4, 10), "wrist": slice(10, 12), "joints": slice(12, 13)}
    for reader, rows in groups.items():
        (grad,) = torch.autograd.grad(y[:, -1, rows].pow(3).sum(), x, retain_graph=True)
        seen = {name for name, columns in groups.items() if grad[:, :, columns].any()}
        assert seen == (set(groups) if reader == "latents" else {reader})
        past = {name for name, columns in groups.items() if grad[:, :-1, columns].any()}
        assert past == (set(groups) if reader == "latents" else set())  # only latents look back


def test_decoder_pixels_come_from_latents_only(rich: Tokenizer) -> None:
    x = rich.decoder_input(torch.rand(2, 5, 4, 3) * 2 - 1).detach().requires_grad_()
    y = rich.decoder(x, rich.decoder_bias)
    (grad,) = torch.autograd.grad(y[:, :, :4].pow(3).sum(), x, retain_graph=True)
    assert not grad[:, :, 4:].any()  # latents never read queries
    assert grad[:, :, :4].any()
    for rows, others in (
        (slice(4, 10), slice(10, 13)),
        (slice(10, 12), slice(4, 10)),
        (slice(12, 13), slice(4, 12)),
    ):
        (grad,) = torch.autograd.grad(y[:, -1, rows].pow(3).sum(), x, retain_graph=True)
        assert grad[:, :, :4].any()
        assert not grad[:, :, others].any()
        assert not grad[:, :-1, 4:].any()  # queries have no past of their own


def test_every_latent_and_the_past_reach_the_picture(rich: Tokenizer) -> None:
    z = (torch.rand(1, 3, 4, 3) * 2 - 1).requires_grad_()
    (grad,) = torch.autograd.grad(rich.decode(z)["front"][0, -1].pow(3).sum(), z)
    assert (grad[0].abs().amax(-1) > 0).all()


def test_every_modality_reaches_the_latents(rich: Tokenizer) -> None:
    obs = observe(rich)
    z = rich.encode(obs)
    for name in obs:
        other = obs | {name: observe(rich, seed=1)[name]}
        assert (rich.encode(other) - z).abs().max() > 1e-3, name


# ---- probes for blindness


def test_patch_permutation_probe(make_tokenizer) -> None:
    """An encoder without patch positions gives the same latents however the patches are shuffled."""
    model = make_tokenizer()
    obs = observe(model)
    x = obs["front"].unflatten(2, (2, 4)).unflatten(4, (3, 4))  # (B, T, 2, 4, 3, 4, 3)
    shuffled = x.flip(2).roll(1, 4).reshape(obs["front"].shape)
    z, moved = model.encode(obs), model.encode({"front": shuffled})
    assert (z - moved).abs().max() > 0.05 * z.std()


def test_latent_slot_permutation_probe(make_tokenizer) -> None:
    """A decoder without slot embeddings cannot tell its latents apart."""
    model = make_tokenizer()
    z = torch.rand(1, 2, 4, 3) * 2 - 1
    a, b = model.decode(z)["front"], model.decode(z[:, :, [1, 2, 3, 0]])["front"]
    assert (a - b).abs().max() > 0.05 * a.std()


def test_latents_of_one_frame_differ(make_tokenizer) -> None:
    model = make_tokenizer()
    z = model.encode(observe(model))
    assert z.std(dim=2).min() > 1e-3


# ---- streaming


@torch.no_grad()
def test_gate_06_tokenizer_streaming_equals_clips_past_eviction(rich: Tokenizer) -> None:
    obs = observe(rich, length=11)  # context 3, two time layers
    z = rich.encode(obs)
    cache, out = rich.new_cache(2), rich.new_cache(2)
    pixels = rich.decode(z)
    for t in range(11):
        step = rich.encode_step({k: v[:, t] for k, v in obs.items()}, cache)
        torch.testing.assert_close(step, z[:, t], **TOLERANCE)
        decoded = rich.decode_step(z[:, t], out)
        for name, value in decoded.items():
            torch.testing.assert_close(value, pixels[name][:, t], **TOLERANCE)


# ---- packing and loss


def test_packing_joins_neighbours_and_inverts(make_tokenizer) -> None:
    model = make_tokenizer()
    z = torch.rand(2, 5, 4, 3) * 2 - 1
    packed = model.pack(z)
    torch.testing.assert_close(packed[..., 0, :], z[..., :2, :].flatten(-2))
    with torch.no_grad():
        model.latent_mean.uniform_(-0.5, 0.5)
        model.latent_std.uniform_(0.1, 2.0)
    torch.testing.assert_close(model.unpack(model.pack(z)), z, **TOLERANCE)
    assert (
        model.unpack(1e3 * torch.randn(2, 2, 6)).abs().max() <= 1
    )  # dreams are clamped to what tanh can produce


def test_loss_is_the_mean_over_modalities_and_scores_visible_patches(rich: Tokenizer) -> None:
    obs = observe(rich)
    target = {name: rich.normalise(name, value) for name, value in obs.items()}
    assert reconstruction_loss(rich, obs, target) == 0
    off = {name: value + 1 for name, value in target.items()}
    torch.testing.assert_close(reconstruction_loss(rich, obs, off), torch.tensor(1.0))
    only = target | {"joints": target["joints"] + 3}
    torch.testing.assert_close(reconstruction_loss(rich, obs, only), torch.tensor(3.0))


def test_motion_weight_keeps_the_scale_and_prefers_what_moves(make_tokenizer) -> None:
    model = make_tokenizer(motion_weight=10.0)
    obs = {"front": torch.zeros(1, 1, 8, 12, 3, dtype=torch.uint8)}
    obs["front"][..., :2, :2, :] = 255
    target = model.normalise("front", obs["front"])
    uniform = reconstruction_loss(model, obs, {"front": target + 1})
    torch.testing.assert_close(uniform, torch.tensor(1.0))
    moving = (target != 0).float()
    on, off = (reconstruction_loss(model, obs, {"front": target + m}) for m in (moving, 1 - moving))
    assert on / moving.sum() > 5 * off / (1 - moving).sum()
