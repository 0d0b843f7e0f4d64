"""The cache of latents: made once per tokenizer and data, whole or not at all, and cleaned up."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from d4_core import data
from d4_core import latent_cache as cache
from d4_core.data import encode_episode, latent_statistics
from d4_core.latent_cache import latent_cache
from d4_datasets.errors import UserError


def pictures(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"front": np.random.default_rng(seed).integers(0, 256, (frames, 8, 12, 3), dtype=np.uint8)}


def test_latent_cache_is_written_once_and_named_after_the_tokenizer(
    tmp_path, make_logs, make_tokenizer
) -> None:
    lengths = (5, 1, 3) * 7  # several groups
    logs, tokenizer = make_logs(lengths, images=pictures(63)), make_tokenizer()
    latent_statistics(tokenizer, logs, np.arange(21), np.random.default_rng(0))
    z = latent_cache(tokenizer, logs, tmp_path / "cache", "abc")
    assert z.shape == (63, 2, 6)
    names = {"latents-abc.npy", "latents-abc.json"}
    assert {p.name for p in (tmp_path / "cache").iterdir()} == names
    for episode, start in enumerate(logs.episode_start):
        expected = tokenizer.pack(encode_episode(tokenizer, logs, episode))
        np.testing.assert_allclose(z[start : start + len(expected)], expected, rtol=2e-3, atol=2e-3)
    flat = torch.from_numpy(np.array(z)).float()
    torch.testing.assert_close(flat.mean(0), torch.zeros(2, 6), rtol=0, atol=5e-3)
    torch.testing.assert_close(flat.std(0), torch.ones(2, 6), rtol=0, atol=5e-3)
    with torch.no_grad():
        tokenizer.to_latent.bias.add_(1.0)
    assert np.array_equal(latent_cache(tokenizer, logs, tmp_path / "cache", "abc"), z)
    assert not np.array_equal(latent_cache(tokenizer, logs, tmp_path / "cache", "other"), z)


def test_an_interrupted_latent_cache_leaves_no_file_that_looks_whole(
    tmp_path, make_logs, make_tokenizer, monkeypatch
) -> None:
    logs, tokenizer = make_logs((1,) * 20, images=pictures(20)), make_tokenizer()
    encode, calls = tokenizer.encode, []

    def stop(obs: dict) -> torch.Tensor:
        calls.append(obs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(obs)

    monkeypatch.setattr(tokenizer, "encode", stop)
    monkeypatch.setattr(data, "_TOKENS", 1)  # many small passes
    with pytest.raises(KeyboardInterrupt):
        latent_cache(tokenizer, logs, tmp_path, "abc")
    assert not (tmp_path / "latents-abc.npy").exists()
    monkeypatch.undo()
    assert np.abs(latent_cache(tokenizer, logs, tmp_path, "abc")).min(axis=(1, 2)).all()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_more_processes_than_episodes_share_the_encoding(
    tmp_path, make_logs, make_tokenizer, monkeypatch, rank: int
) -> None:
    """One long bag on a machine with many devices: most of them have nothing to encode."""
    logs, tokenizer = make_logs((4, 5), images=pictures(9)), make_tokenizer()
    monkeypatch.setattr(cache.distributed, "rank", lambda: rank)
    monkeypatch.setattr(cache.distributed, "world_size", lambda: 3)
    out = np.zeros((9, 2, 6), np.float16)
    order = np.argsort(logs.episode_length, kind="stable")[rank::3]
    cache._fill(out, tokenizer, logs, order)
    filled = out.any((1, 2))
    assert filled.tolist() == {0: [True] * 4 + [False] * 5, 1: [False] * 4 + [True] * 5, 2: [False] * 9}[rank]


def test_a_full_disk_is_said_before_anything_is_encoded(
    tmp_path, make_logs, make_tokenizer, monkeypatch
) -> None:
    """A sparse file that cannot be filled would end the process by SIGBUS, without a word."""
    logs, tokenizer = make_logs((5,), images=pictures(5)), make_tokenizer()

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"disk full: .* needs 0 MB more for the latents"):
        latent_cache(tokenizer, logs, tmp_path, "abc")
    assert [p.name for p in tmp_path.iterdir()] == ["latents-abc.json"]  # what will be written, and no more


def test_latents_of_another_tokenizer_are_removed(tmp_path, make_logs, make_tokenizer) -> None:
    logs, tokenizer = make_logs((5, 7), images=pictures(12)), make_tokenizer()
    latent_cache(tokenizer, logs, tmp_path, "abc")
    (tmp_path / ".tmp-latents-old.npy").write_bytes(b"left by kill -9")
    (tmp_path / "latents-pieces").mkdir()
    (tmp_path / "notes.txt").write_text("not ours")
    latent_cache(tokenizer, logs, tmp_path, "def")
    assert {p.name for p in tmp_path.iterdir()} == {"latents-def.npy", "latents-def.json", "notes.txt"}


def test_what_a_killed_process_left_of_a_piece_is_removed(tmp_path, make_logs, make_tokenizer) -> None:
    logs, tokenizer = make_logs((5, 7), images=pictures(12)), make_tokenizer()
    logs.piece_bounds = np.array([0, 1, 2])
    frames = np.arange(12)
    whole = latent_cache(tokenizer, logs, tmp_path, "abc")[frames]
    folder = tmp_path / "latents-abc"
    (folder / "000001.npy").rename(folder / ".tmp-99999999-99999999-000001.npy")
    assert np.array_equal(latent_cache(tokenizer, logs, tmp_path, "abc")[frames], whole)
    assert sorted(p.name for p in folder.iterdir()) == ["000000.npy", "000001.npy"]


def test_latents_of_other_data_are_made_again(tmp_path, make_logs, make_tokenizer, capfd) -> None:
    """The dataset has grown, or another one is trained on: rows would stand for other frames."""
    tokenizer = make_tokenizer()
    old = latent_cache(tokenizer, make_logs((5, 7), images=pictures(12)), tmp_path, "abc", "one")
    assert old.shape[0] == 12
    grown = make_logs((5, 7, 4), images=pictures(16, seed=1))
    new = latent_cache(tokenizer, grown, tmp_path, "abc", "two")
    assert new.shape[0] == 16
    same_size = make_logs((5, 7, 4), images=pictures(16, seed=2))
    other = latent_cache(tokenizer, same_size, tmp_path, "abc", "three")
    assert not np.array_equal(new, other)
    assert capfd.readouterr().out.count("of other data: they are made again") == 2
    z = tokenizer.pack(encode_episode(tokenizer, same_size, 0))
    np.testing.assert_allclose(other[:5], z, rtol=2e-3, atol=2e-3)


def test_a_cut_file_is_made_again(tmp_path, make_logs, make_tokenizer) -> None:
    logs, tokenizer = make_logs((5, 7), images=pictures(12)), make_tokenizer()
    z = np.array(latent_cache(tokenizer, logs, tmp_path, "abc"))
    with (tmp_path / "latents-abc.npy").open("r+b") as file:
        file.truncate(200)
    assert np.array_equal(latent_cache(tokenizer, logs, tmp_path, "abc"), z)


@pytest.mark.parametrize("seed", [0, 1])
def test_latents_without_a_note_are_kept_only_if_they_are_right(
    tmp_path, make_logs, make_tokenizer, seed
) -> None:
    """As runs of before have them."""
    logs, tokenizer = make_logs((5, 7), images=pictures(12)), make_tokenizer()
    latent_cache(tokenizer, logs, tmp_path, "abc")
    (tmp_path / "latents-abc.json").unlink()
    os.utime(tmp_path / "latents-abc.npy", (1, 1))
    logs = make_logs((5, 7), images=pictures(12, seed))
    z = latent_cache(tokenizer, logs, tmp_path, "abc")
    assert ((tmp_path / "latents-abc.npy").stat().st_mtime == 1) == (seed == 0)
    np.testing.assert_allclose(
        z[:5], tokenizer.pack(encode_episode(tokenizer, logs, 0)), rtol=2e-3, atol=2e-3
    )


def test_statistics_are_measured_once(tmp_path, make_logs, make_tokenizer) -> None:
    """Later phases take them from the note: frames that are not at hand need not be read again."""
    logs, tokenizer, calls = make_logs((5, 7), images=pictures(12)), make_tokenizer(), []

    def measure() -> None:
        calls.append(1)
        latent_statistics(tokenizer, logs, np.arange(2), np.random.default_rng(0))

    latent_cache(tokenizer, logs, tmp_path, "abc", "one", measure)
    mean, std = tokenizer.latent_mean.clone(), tokenizer.latent_std.clone()
    tokenizer.latent_mean.zero_()
    latent_cache(tokenizer, logs, tmp_path, "abc", "one", measure)
    assert calls == [1]
    assert torch.equal(tokenizer.latent_mean, mean)
    assert torch.equal(tokenizer.latent_std, std)
