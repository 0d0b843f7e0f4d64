"""Clips and transitions: the index convention on planted data, and cached latents against streaming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_core.data import (
    Clips,
    draw,
    encode_episode,
    first_frames,
    latent_cache,
    latent_statistics,
    observations,
    pixel_statistics,
    transitions,
)
from d4_core.tokenizer import Vector

LENGTHS = (5, 7, 3)


def pictures(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"front": np.random.default_rng(seed).integers(0, 256, (frames, 8, 12, 3), dtype=np.uint8)}


def whole(logs, episode: int) -> Clips:
    """All frames of one episode as a batch of one."""
    return Clips(*logs.indices(logs.episode_start[[episode]], int(logs.episode_length[episode])))


# ---- gate 2


def test_gate_02_block_t_carries_the_action_before_it(make_logs) -> None:
    logs = make_logs(LENGTHS)
    out = transitions(logs, first_frames(logs), whole(logs, 1))  # frames 5..11
    assert out["action"][0, :, 0].tolist() == [5.25, 6.25, 7.25, 8.25, 9.25, 10.25, 11.25]
    assert out["prev_action"][0, 1:, 0].tolist() == [5.25, 6.25, 7.25, 8.25, 9.25, 10.25]
    assert out["reward"][0, :, 0].tolist() == [5, 6, 7, 8, 9, 10, 11]  # arrives with its frame
    assert out["terminal"][0].tolist() == [False] * 6 + [True]


def test_gate_02_first_block_of_an_episode_carries_no_action(make_logs) -> None:
    """Not even that of the frame before, which belongs to another episode."""
    logs = make_logs(LENGTHS)
    for episode in range(3):
        out = transitions(logs, first_frames(logs), whole(logs, episode))
        assert out["prev_labelled"][0].tolist() == [False] + [True] * (LENGTHS[episode] - 1)
        assert out["prev_action"][0, 0, 0] == 0


def test_gate_02_windows_inside_an_episode_know_the_action_before_them(make_logs) -> None:
    logs = make_logs(LENGTHS)
    out = transitions(logs, first_frames(logs), Clips(*logs.indices(np.array([7]), 3)))
    assert out["prev_labelled"].all()
    assert out["prev_action"][0, :, 0].tolist() == [6.25, 7.25, 8.25]


def test_gate_02_past_the_end_nothing_is_known(make_logs) -> None:
    logs = make_logs(LENGTHS)
    out = transitions(logs, first_frames(logs), Clips(*logs.indices(np.array([9]), 6)))  # frames 9, 10, 11
    for name in ("valid", "labelled", "prev_labelled"):
        assert out[name][0].tolist() == [True] * 3 + [False] * 3, name
    assert not out["prev_action"][0, 3:].any()


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    length=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_gate_02_transitions_against_brute_force(make_logs, lengths: list[int], length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = sum(lengths)
    logs = make_logs(tuple(lengths), action_mask=rng.random(frames) < 0.6)
    clips = draw(logs, rng, 5, length, np.arange(len(lengths)))
    out = transitions(logs, first_frames(logs), clips)
    episode_of = np.repeat(np.arange(len(lengths)), lengths)
    for b in range(5):
        start = clips.index[b, 0]
        for t in range(length):
            frame = start + t
            inside = frame < frames and episode_of[frame] == episode_of[start]
            assert bool(out["valid"][b, t]) == inside
            knows = inside and frame > 0 and episode_of[frame - 1] == episode_of[frame] and logs.action_mask[frame - 1]
            assert bool(out["prev_labelled"][b, t]) == bool(knows)
            assert out["prev_action"][b, t, 0] == (frame - 1 + 0.25 if knows else 0)
            assert bool(out["labelled"][b, t]) == bool(inside and logs.action_mask[min(frame, frames - 1)])
            if inside:
                assert out["action"][b, t, 0] == frame + 0.25
                assert out["reward"][b, t].tolist() == [frame, frame + 0.25]


def test_changing_an_action_changes_only_the_next_block(make_logs) -> None:
    logs, other = make_logs(LENGTHS), make_logs(LENGTHS)
    other.action[8] += 100
    a, b = (transitions(x, first_frames(x), whole(x, 1)) for x in (logs, other))
    assert (a["prev_action"] != b["prev_action"])[0, :, 0].tolist() == [False] * 4 + [True] + [False] * 2


# ---- frames and latents


def test_first_frames_and_observations(make_logs) -> None:
    logs = make_logs(LENGTHS, images=pictures(15), vectors={"joints": np.arange(30, dtype=np.float32).reshape(15, 2)})
    assert np.flatnonzero(first_frames(logs)).tolist() == [0, 5, 12]
    out = observations(logs, np.array([[3, 4], [7, 8]]), ["front", "joints"])
    assert out["front"].dtype == torch.uint8
    assert out["front"].shape == (2, 2, 8, 12, 3)
    assert out["joints"][1, 0].tolist() == [14, 15]


def test_pixel_statistics_standardise(make_logs, make_tokenizer) -> None:
    vectors = {"joints": np.random.default_rng(0).normal(5, 3, (15, 3)).astype(np.float32)}
    logs = make_logs(LENGTHS, images=pictures(15), vectors=vectors)
    tokenizer = make_tokenizer(vectors=(Vector(name="joints", size=3),))
    pixel_statistics(logs, tokenizer, np.random.default_rng(0))
    obs = observations(logs, np.arange(15), ["front", "joints"])
    x = tokenizer.normalise("front", obs["front"])
    torch.testing.assert_close(x.mean(0), torch.zeros(6, 48), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.square().mean(), torch.tensor(1.0))
    y = tokenizer.normalise("joints", obs["joints"])[:, 0]
    torch.testing.assert_close(y.std(0), torch.ones(3))


def test_pixel_statistics_survive_a_constant_camera(make_logs, make_tokenizer) -> None:
    logs = make_logs(LENGTHS, images={"front": np.full((15, 8, 12, 3), 7, np.uint8)})
    tokenizer = make_tokenizer()
    pixel_statistics(logs, tokenizer, np.random.default_rng(0))
    assert tokenizer.normalise("front", torch.full((1, 1, 8, 12, 3), 7, dtype=torch.uint8)).abs().max() < 1e-3


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_gate_06_encoding_in_chunks_equals_streaming(make_logs, make_tokenizer, chunk: int) -> None:
    """Latents in training are those a robot computes, frame by frame, past the window's eviction."""
    logs = make_logs((4, 23), images=pictures(27))
    tokenizer = make_tokenizer()
    z = encode_episode(tokenizer, logs, 1, chunk=chunk)
    assert z.shape == (23, 4, 3)
    obs, cache = observations(logs, np.arange(4, 27), ["front"]), tokenizer.new_cache(1)
    with torch.no_grad():
        live = torch.cat([tokenizer.encode_step({"front": obs["front"][t : t + 1]}, cache) for t in range(23)])
    torch.testing.assert_close(z, live, rtol=1e-5, atol=1e-5)


def test_latent_cache_is_written_once_and_named_after_the_tokenizer(tmp_path, make_logs, make_tokenizer) -> None:
    logs, tokenizer = make_logs(LENGTHS, images=pictures(15)), make_tokenizer()
    latent_statistics(tokenizer, logs, np.arange(3), np.random.default_rng(0))
    seen = []
    z = latent_cache(tokenizer, logs, tmp_path / "cache", "abc", progress=lambda i, n: seen.append((i, n)))
    assert z.shape == (15, 2, 6)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["latents-abc.npy"]
    for episode, start in enumerate(logs.episode_start):
        expected = tokenizer.pack(encode_episode(tokenizer, logs, episode))
        np.testing.assert_allclose(z[start : start + len(expected)], expected, rtol=2e-3, atol=2e-3)
    flat = torch.from_numpy(np.array(z)).float()
    torch.testing.assert_close(flat.mean(0), torch.zeros(2, 6), rtol=0, atol=5e-3)
    torch.testing.assert_close(flat.std(0), torch.ones(2, 6), rtol=0, atol=5e-3)
    with torch.no_grad():
        tokenizer.to_latent.bias.add_(1.0)
    again = latent_cache(tokenizer, logs, tmp_path / "cache", "abc")
    assert np.array_equal(again, z)
    assert not np.array_equal(latent_cache(tokenizer, logs, tmp_path / "cache", "other"), z)


def test_an_interrupted_latent_cache_leaves_no_file_that_looks_whole(tmp_path, make_logs, make_tokenizer) -> None:
    logs, tokenizer = make_logs(LENGTHS, images=pictures(15)), make_tokenizer()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latent_cache(tokenizer, logs, tmp_path, "abc", progress=stop)
    assert not (tmp_path / "latents-abc.npy").exists()
    assert latent_cache(tokenizer, logs, tmp_path, "abc").any()
