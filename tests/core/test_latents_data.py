"""Training on a dataset of latents: as on its pictures, with the tokenizer that made them and no other."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run
from test_pipeline import TINY, args

from d4_core import info, rollout, train
from d4_core.data import encode_episodes, latent_statistics
from d4_core.latent_cache import latent_cache
from d4_core.models import load, weights_hash
from d4_datasets.errors import UserError
from d4_datasets.latents import TYPE, Origin
from d4_datasets.lerobot import Dataset, LeRobotWriter
from d4_datasets.windows import Windows

LENGTHS = (24,) * 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "pictures"
    toy_run.write_dataset(root, LENGTHS)
    return root


@pytest.fixture(scope="module")
def maker(pictures, tmp_path_factory) -> Path:
    """A run whose tokenizer makes the latents."""
    run = tmp_path_factory.mktemp("maker") / "run"
    train.run(args(pictures, run, phases=("tokenizer",)))
    return run


@pytest.fixture(scope="module")
def latents(pictures, maker, tmp_path_factory) -> Path:
    """The dataset of `pictures` as a robot would have recorded it with a tokenizer node."""
    root = tmp_path_factory.mktemp("data") / "latents"
    record(pictures, maker, root, toy_run.contract())
    return root


def record(pictures: Path, maker: Path, root: Path, contract) -> None:
    tokenizer, logs, source = load(maker / "tokenizer").tokenizer, Windows(pictures), Dataset(pictures)
    numbers = range(len(logs.episode_start))
    with LeRobotWriter(root, contract) as writer:
        for number, z in zip(numbers, encode_episodes(tokenizer, logs, np.array(numbers)), strict=True):
            columns, provenance = source.columns(number), source.d4["episodes"][number]
            names = ("action", "action_mask", "reward", "task_index", "is_terminal")
            writer.add_episode(toy_run.Episode(
                images={}, **{name: columns[name] for name in names}, source=provenance["source"],
                latents=z.numpy().astype(np.float16),
                origin=Origin(weights_hash(maker / "tokenizer"), "float16", *z.shape[1:]),
            ))  # fmt: skip


def call(monkeypatch, capsys, main, *line: str) -> str:
    """What a command says on its way out with code 2."""
    monkeypatch.setattr(sys, "argv", ["d4", *map(str, line)])
    monkeypatch.setattr(train.threads, "configure", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


def test_cached_latents_are_those_of_the_pictures_to_half_precision(
    pictures, latents, maker, tmp_path
) -> None:
    caches = []
    for number, root in enumerate((pictures, latents)):
        tokenizer, logs = load(maker / "tokenizer").tokenizer, Windows(root)
        latent_statistics(tokenizer, logs, np.arange(8), np.random.default_rng(0))
        caches.append(np.asarray(latent_cache(tokenizer, logs, tmp_path / str(number), "x"), np.float32))
        smallest = float(tokenizer.latent_std.min())
    # latents in (-1, 1) are stored to 2^-12, and standardising enlarges that; the cache rounds once more
    np.testing.assert_allclose(caches[1], caches[0], rtol=2**-10, atol=2 * 2**-12 / smallest)
    assert np.abs(caches[1]).max() > 1


def test_all_phases_train_on_latents(latents, maker, tmp_path) -> None:
    run = tmp_path / "run"
    train.run(args(latents, run, tokenizer=maker))
    assert weights_hash(run / "tokenizer") == weights_hash(maker / "tokenizer")
    assert all(torch.isfinite(p).all() for p in load(run / "imagination").dynamics.parameters())
    gates = json.loads((run / "gates.json").read_text())
    assert gates["tokenizer"][0]["name"] == "PSNR above the mean image (not measured)"
    train.run(args(latents, run))  # again: the tokenizer is there and need not be named


def test_the_run_that_made_the_latents_goes_on_with_them(latents, maker, tmp_path) -> None:
    run = Path(shutil.copytree(maker, tmp_path / "run"))
    train.run(args(latents, run, phases=("dynamics",)))
    assert (run / "dynamics" / "config.json").exists()


def test_a_contract_that_names_latents_takes_the_same_tokenizer(pictures, maker, tmp_path) -> None:
    toy = toy_run.contract()
    camera = dataclasses.replace(toy.images[0], topic="/cam/latents", type=TYPE)
    other = dataclasses.replace(toy, observations=(camera,))
    record(pictures, maker, tmp_path / "data", other)
    train.run(args(tmp_path / "data", tmp_path / "run", phases=("tokenizer", "dynamics"), tokenizer=maker))
    assert load(tmp_path / "run" / "dynamics").contract.hash == other.hash != toy.hash


def test_without_a_tokenizer_it_says_whose_is_needed(latents, maker, tmp_path, monkeypatch, capsys) -> None:
    line = (latents, "--run", tmp_path / "run", "--procs", "1", "--phases", "tokenizer", "--set", *TINY)
    said = call(monkeypatch, capsys, train.main, *line)
    assert f"give the run folder of tokenizer {weights_hash(maker / 'tokenizer')}" in said
    assert "--tokenizer RUN" in said
    assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.fixture(scope="module")
def stranger(pictures, tmp_path_factory) -> Path:
    """A run with another tokenizer."""
    run = tmp_path_factory.mktemp("stranger") / "run"
    train.run(args(pictures, run, phases=("tokenizer",), seed=1))
    return run


REFUSED = r"holds latents of tokenizer \w+, and .* is tokenizer \w+: they mean nothing to it"


def test_another_tokenizer_that_is_given_is_refused(latents, stranger, tmp_path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        train.run(args(latents, tmp_path / "run", tokenizer=stranger))
    assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.parametrize("phase", ["tokenizer", "dynamics"])
def test_another_tokenizer_in_the_run_is_refused(latents, stranger, phase) -> None:
    with pytest.raises(UserError, match=REFUSED):
        train.run(args(latents, stranger, phases=(phase,)))


def test_a_tokenizer_of_another_shape_is_refused(latents, maker, tmp_path) -> None:
    with pytest.raises(UserError, match="does not fit preset and contract in num_tokens: 2, not 4"):
        train.run(args(latents, tmp_path / "run", "num_tokens=4", tokenizer=maker))


def test_a_tokenizer_for_pictures_is_refused(pictures, maker, tmp_path) -> None:
    with pytest.raises(UserError, match="--tokenizer is for datasets of latents"):
        train.run(args(pictures, tmp_path / "run", tokenizer=maker))


def test_what_needs_pictures_says_so(latents, maker, monkeypatch, capsys) -> None:
    said = call(monkeypatch, capsys, rollout.main, maker, "--dataset", latents)
    assert "holds latents and no pictures to show" in said
    facts = {fact.name: fact.value for fact in info.dataset_facts(latents)}
    assert facts["as"] == f"latents of {Windows(latents).origin}"
