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
    encode_episodes,
    first_frames,
    lead_targets,
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
def test_gate_02_transitions_against_brute_force(
    make_logs, lengths: list[int], length: int, seed: int
) -> None:
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
            knows = (
                inside
                and frame > 0
                and episode_of[frame - 1] == episode_of[frame]
                and logs.action_mask[frame - 1]
            )
            assert bool(out["prev_labelled"][b, t]) == bool(knows)
            assert out["prev_action"][b, t, 0] == (frame - 1 + 0.25 if knows else 0)
            assert bool(out["labelled"][b, t]) == bool(inside and logs.action_mask[min(frame, frames - 1)])
            if inside:
                assert out["action"][b, t, 0] == frame + 0.25
                assert out["reward"][b, t].tolist() == [frame, frame + 0.25]


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    length=st.integers(1, 8),
    leads=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_gate_02_lead_targets_against_brute_force(
    make_logs, lengths: list[int], length: int, leads: int, seed: int
) -> None:
    """Lead n is tick t + n: looked up past the clip's end, never past the episode's."""
    rng = np.random.default_rng(seed)
    frames = sum(lengths)
    logs = make_logs(tuple(lengths), action_mask=rng.random(frames) < 0.6)
    clips = draw(logs, rng, 4, length, np.arange(len(lengths)))
    out = lead_targets(logs, clips, leads)
    episode_of = np.repeat(np.arange(len(lengths)), lengths)
    for b in range(4):
        start = clips.index[b, 0]
        for t in range(length):
            for n in range(leads):
                frame = start + t + n
                inside = frame < frames and episode_of[frame] == episode_of[start]
                assert bool(out["lead_valid"][b, t, n]) == inside
                known = inside and bool(logs.action_mask[frame])
                assert bool(out["lead_labelled"][b, t, n]) == known
                if inside:
                    assert out["lead_action"][b, t, n, 0] == frame + 0.25
                    assert out["lead_reward"][b, t, n].tolist() == [frame, frame + 0.25]


def test_changing_an_action_changes_only_the_next_block(make_logs) -> None:
    logs, other = make_logs(LENGTHS), make_logs(LENGTHS)
    other.action[8] += 100
    a, b = (transitions(x, first_frames(x), whole(x, 1)) for x in (logs, other))
    assert (a["prev_action"] != b["prev_action"])[0, :, 0].tolist() == [False] * 4 + [True] + [False] * 2


# ---- frames and latents


def test_first_frames_and_observations(make_logs) -> None:
    logs = make_logs(
        LENGTHS, images=pictures(15), vectors={"joints": np.arange(30, dtype=np.float32).reshape(15, 2)}
    )
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
    """Latents in training are those a robot computes, frame by frame, past the window's eviction.

    Episodes of several lengths run together: neither the padding nor a neighbour may show.
    """
    logs = make_logs((4, 23, 9), images=pictures(36))
    tokenizer = make_tokenizer()
    together = encode_episodes(tokenizer, logs, np.array([2, 0, 1]), chunk=chunk)
    assert [z.shape for z in together] == [(9, 4, 3), (4, 4, 3), (23, 4, 3)]
    for episode, z in zip((2, 0, 1), together, strict=True):
        frames = logs.episode_start[episode] + np.arange(logs.episode_length[episode])
        obs, cache = observations(logs, frames, ["front"]), tokenizer.new_cache(1)
        with torch.no_grad():
            live = [tokenizer.encode_step({"front": frame[None]}, cache) for frame in obs["front"]]
        torch.testing.assert_close(z, torch.cat(live), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encode_episode(tokenizer, logs, episode), z, rtol=1e-5, atol=1e-5)


def test_statistics_come_from_the_frames_they_may_use(make_logs, make_tokenizer) -> None:
    """Held-out episodes would leak into the mean image, and a gate compares against it."""
    images = {
        "front": np.repeat(np.uint8([10, 90, 250]), 4)[:, None, None, None]
        + np.zeros((12, 8, 12, 3), np.uint8)
    }
    logs, tokenizer = make_logs((4, 4, 4), images=images), make_tokenizer()
    pixel_statistics(logs, tokenizer, np.random.default_rng(0), np.arange(8))
    torch.testing.assert_close(tokenizer.mean_front, torch.full((8, 12, 3), 50 / 255))
    torch.testing.assert_close(tokenizer.std_front, torch.tensor(40 / 255))
    pixel_statistics(logs, tokenizer, np.random.default_rng(0), np.array([0, 11]), count=1)
    assert tokenizer.mean_front[0, 0, 0] * 255 in (10.0, 250.0)
