"""Forks of a run, and the detailed open-loop measurement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run

from d4_core.clone import about, require_run
from d4_core.latent_cache import latent_cache
from d4_core.models import load, weights_hash
from d4_core.open_loop import ssim
from d4_datasets.errors import UserError
from d4_datasets.windows import Windows
from d4_sim.measure import Fork, OpenLoop, fork, open_loop


def test_ssim_against_its_properties() -> None:
    gen = torch.Generator().manual_seed(0)
    a = torch.rand(2, 24, 24, 3, generator=gen)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-5)
    noisy = [ssim(a, (a + s * torch.randn(a.shape, generator=gen)).clamp(0, 1)) for s in (0.05, 0.2, 0.6)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > -1
    flat = torch.full_like(a, 0.5)
    brighter = torch.full_like(a, 0.6)
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)  # no structure: the luminance term alone
    assert ssim(flat, brighter) == pytest.approx(expected, abs=1e-3)  # float32 variances of nothing


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A dataset and a run with a tokenizer, a dynamics model and the latents between them."""
    toy = toy_run.write_dataset(tmp_path / "data", lengths=(12,) * 40)
    for phase in ("tokenizer", "dynamics"):
        toy_run.write_checkpoint(tmp_path / "run", phase, toy)
    tokenizer = load(tmp_path / "run" / "tokenizer").tokenizer
    tag = weights_hash(tmp_path / "run" / "tokenizer")
    latent_cache(tokenizer, Windows(tmp_path / "data"), tmp_path / "run" / "latents", tag)
    return tmp_path


def test_a_fork_has_the_networks_up_to_a_phase_and_changes_nothing_in_its_source(place: Path) -> None:
    source, run = place / "run", place / "fork"
    (source / "config.yaml").write_text("seed: 3\n")
    (source / "contract.yaml").touch()
    fork(Fork(source=source, run=run, phase="tokenizer"))
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml", "contract.yaml", "latents", "tokenizer"
    ]  # fmt: skip
    require_run(run)
    assert about(run)["seed"] == 3  # baselines in a fork had seed 0, whatever the chain's
    (run / "config.yaml").write_text("seed: 4\n")  # as d4-train does
    assert about(source)["seed"] == 3
    weights = [path.read_bytes() for path in sorted(source.glob("*/*.safetensors"))]
    toy_run.write_checkpoint(run, "tokenizer", Windows(place / "data").contract)  # trained again
    assert [path.read_bytes() for path in sorted(source.glob("*/*.safetensors"))] == weights
    (run / "tokenizer" / "mark").touch()
    fork(Fork(source=source, run=run, phase="dynamics"))  # again, after an interruption
    assert (run / "tokenizer" / "mark").exists()
    assert weights_hash(run / "dynamics") == weights_hash(source / "dynamics")


def test_open_loop_measures_every_number_of_steps(place: Path) -> None:
    args = OpenLoop(run=place / "run", dataset=place / "data", steps=(1, 4), clips=8, device="cpu")
    open_loop(args)
    result = json.loads((place / "run" / "open_loop.json").read_text())["by_steps"]
    assert list(result) == ["1", "4"]
    for curves in result.values():
        assert curves["horizons"] == [1, 2, 4, 8]
        assert np.isfinite(curves["psnr"]["model"] + curves["ssim"]["model"]).all()
        assert curves["frames_per_s"] > 0
    assert result["1"]["psnr"]["model"] != result["4"]["psnr"]["model"]
    assert result["1"]["psnr"]["copy_last"] == result["4"]["psnr"]["copy_last"]


def test_withheld_commands_do_not_reach_the_model(place: Path) -> None:
    made = {}
    for unknown in (False, True):
        args = OpenLoop(run=place / "run", dataset=place / "data", clips=8, unknown=unknown, device="cpu")
        open_loop(args)
        made[unknown] = json.loads((place / "run" / "open_loop.json").read_text())["by_steps"]["4"]
    assert made[False]["psnr"]["model"] != made[True]["psnr"]["model"]


def test_recordings_that_hold_nothing_are_named(place: Path) -> None:
    args = OpenLoop(run=place / "run", dataset=place / "data", bags="dusk-*", device="cpu")
    with pytest.raises(UserError, match="no held-out episode of recordings 'dusk-\\*'"):
        open_loop(args)
