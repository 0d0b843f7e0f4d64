"""Training on lists of datasets: ranks read their parts, runs resume where they were, caches stay bounded."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run
from safetensors.torch import load_file
from test_pipeline import args

from d4_core import pipeline, train, workers
from d4_core.latent_cache import latent_cache
from d4_core.models import load, weights_hash
from d4_core.pipeline import Pipeline
from d4_datasets.windows import Windows

FRAME = 16 * 24 * 3
SMALL = 100 * FRAME / 1e9  # gigabytes of a cache that holds half of the data


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for name in ("one", "two"):
        toy_run.write_dataset(folder / name, (12,) * 8)
    (folder / "all.txt").write_text("one\ntwo\n")
    return [str(folder / "one"), str(folder / "two"), str(folder / "all.txt")]


def weights(run: Path, phase: str) -> dict[str, torch.Tensor]:
    return load_file(run / phase / "weights.safetensors")


def test_phases_train_on_a_list(roots, tmp_path) -> None:
    cache, phases = tmp_path / "cache", ("tokenizer", "dynamics", "agent")
    train.run(args(roots[2], tmp_path / "run", cache=cache, cache_gb=SMALL, phases=phases))
    about = (tmp_path / "run" / "config.yaml").read_text()
    assert "all.txt" in about
    assert "episodes: 16" in about
    tag = weights_hash(tmp_path / "run" / "tokenizer")
    assert len(list((tmp_path / "run/latents" / f"latents-{tag}").glob("*.npy"))) == 16
    frames = sum(file.stat().st_size for file in (cache / "frames").rglob("*.npy"))
    assert frames <= 100 * FRAME
    # named one by one, and with all frames at hand, they are the same data
    train.run(args(tuple(roots[:2]), tmp_path / "run", cache=cache, phases=("dynamics",)))
    assert not (tmp_path / "run" / "dynamics.previous").exists()


class Noted(Windows):
    """Notes which frames are read."""

    def sample_starts(self, rng, batch, length, episodes):
        starts = super().sample_starts(rng, batch, length, episodes)
        self.read = [*getattr(self, "read", []), starts.tolist()]
        return starts


def test_a_run_that_is_resumed_draws_what_it_would_have_drawn(roots, tmp_path, monkeypatch) -> None:
    """By position: pieces have come and gone meanwhile."""
    monkeypatch.setattr(pipeline, "Windows", Noted)
    settings = ("tokenizer_training.steps=24", "tokenizer_training.batch=8")
    drawn = {}
    for name, stop in (("whole", None), ("cut", 11)):
        run = Pipeline(args(roots[2], tmp_path / name, *settings, cache=tmp_path / "c", cache_gb=SMALL))
        assert run.course.at_once is not None
        phase = run._prepare("tokenizer")
        run.logs.read = []

        def sample(step: int, phase=phase) -> None:
            phase.sample(np.random.default_rng([7, step]), step)

        for step in range(24) if stop is None else range(stop, 24):
            sample(step)
        drawn[name] = run.logs.read
        run.close()
    assert drawn["whole"][11:] == drawn["cut"]
    assert len({frame // 12 for starts in drawn["whole"] for frame in starts}) > 10


def test_another_cache_begins_the_tokenizer_afresh_and_the_same_goes_on(roots, tmp_path, capfd) -> None:
    """Other pieces at a step are other data: exact or not at all."""
    run = tmp_path / "run"
    more = {"cache": tmp_path / "c", "phases": ("tokenizer",)}
    train.run(args(roots[2], run, cache_gb=SMALL, **more))
    before = weights(run, "tokenizer")
    train.run(args(roots[2], run, cache_gb=SMALL, **more))
    assert all(torch.equal(value, before[name]) for name, value in weights(run, "tokenizer").items())
    train.run(args(roots[2], run, cache_gb=2 * SMALL, **more))
    assert "trained with other config: starting afresh" in capfd.readouterr().out


def test_interrupted_latents_go_on_where_they_were(roots, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    train.run(args(roots[2], run, cache=tmp_path / "c", phases=("tokenizer",)))
    tokenizer, logs = load(run / "tokenizer").tokenizer, Windows(roots[2], tmp_path / "c")
    encode, calls = tokenizer.encode, []

    def stop(obs: dict) -> torch.Tensor:
        calls.append(obs)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(obs)

    monkeypatch.setattr(tokenizer, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        latent_cache(tokenizer, logs, tmp_path / "latents", "abc", "data")
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "latents/latents-abc").glob("0*.npy")}
    monkeypatch.undo()
    assert 3 <= len(done) < 16
    z = latent_cache(tokenizer, logs, tmp_path / "latents", "abc", "data")
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "latents/latents-abc").glob("0*.npy")}
    assert {name: after[name] for name in done} == done
    assert len(after) == 16
    whole = latent_cache(tokenizer, logs, tmp_path / "other", "abc", "data")
    np.testing.assert_array_equal(z[:], whole[:])
    assert z.shape == (192, 2, 8)
    logs.close()


RANK = """
import json, os, sys, pathlib
import numpy as np, torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[3].split(os.pathsep)
from test_pipeline import args
from test_shared_data import Noted, SMALL
from d4_core import distributed, pipeline
pipeline.Windows = Noted
folder, where = pathlib.Path(sys.argv[1]), sys.argv[2]
run = pipeline.Pipeline(args(where, folder / "run", cache=folder / "c", cache_gb=2 * SMALL))
run.run_phase("tokenizer")
read = [frame for starts in run.logs.read for frame in starts]
frames = {"part": run.course.part.tolist(), "train": run.train.tolist(), "read": read}
run.run_phase("dynamics")
frames["pieces"] = sorted(int(p) for p in run.logs.pieces._open)
(folder / f"{distributed.rank()}.json").write_text(json.dumps(frames))
run.close()
"""


def test_two_processes_read_their_parts_and_no_more(roots, tmp_path) -> None:
    """As torchrun or d4-train start them: gloo, equal weights, no frame drawn by both, the same steps."""
    (tmp_path / "rank.py").write_text(RANK)
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [str(tmp_path), roots[2], here]
    old = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), here])
    try:
        assert workers.launch("rank", words, 2, tmp_path / "logs") == 0, (
            tmp_path / "logs/rank-1.log"
        ).read_text()
    finally:
        os.environ.clear()
        os.environ.update(old)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert sorted(first["part"] + second["part"]) == first["train"] == second["train"]
    assert not set(first["part"]) & set(second["part"])
    for one in (first, second):
        assert {frame // 12 for frame in one["read"]} <= set(one["part"])
    assert len(first["read"]) == len(second["read"])  # neither waits for the other
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line["phase"] == "tokenizer"] == [1, 4]
    assert all(0 <= line["wait_share"] <= 1 for line in metrics)
