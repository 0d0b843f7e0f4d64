"""The measurements of reading run, and what they measure is a dataset. Nothing here is timed."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from d4_datasets import bench, bench_reading
from d4_datasets.errors import UserError
from d4_datasets.windows import Windows

ROBOT = bench.contract(10.0, 16)


def test_the_made_dataset_is_one(tmp_path):
    """Its cache is taken for the one of its files, and windows are cut from it as from any other."""
    bench_reading.make_dataset(tmp_path / "data", ROBOT, 2100, 5, pictures=True)
    windows = Windows(tmp_path / "data")
    assert windows.num_frames == 10_500
    assert (windows.episode_length == 5).all()
    assert windows.images["front"][[0, 10_499]].any()
    np.testing.assert_array_equal(windows.episode_index, np.repeat(np.arange(2100), 5))
    assert len(windows.split()[1]) == 105


def test_windows_are_timed_by_shape(capsys, monkeypatch):
    monkeypatch.setattr(bench_reading, "SHAPES", ((4, 2),))
    found = bench_reading.bench_windows(ROBOT, seconds=0.01, frames=480)
    assert found.keys() == {"4 x 2"}
    assert all(value > 0 for value in found["4 x 2"])
    assert re.search(
        r"windows of  2 frames,  4 a batch: +[\d,]+ frames/s on one core", capsys.readouterr().out
    )


def test_opening_is_timed_in_a_process_of_its_own(capsys):
    seconds, ratio, memory = bench_reading.bench_open(ROBOT, repeats=1, hours=0.5)
    assert seconds > 0
    assert ratio > 0
    assert 20 < memory < 1000
    assert "0.5 h, 18,000 frames in 50 episodes: opened in" in capsys.readouterr().out


def test_waiting_is_read_from_a_run(tmp_path, capsys):
    lines = [
        {"phase": "tokenizer", "step": 1, "wait_share": 0.9},
        {"phase": "tokenizer", "step": 21, "wait_share": 0.01},
        {"phase": "tokenizer", "step": 31, "wait_share": 0.04},
        {"phase": "dynamics", "step": 1, "wait_share": 0.5},
        {"phase": "dynamics", "step": 21, "wait_share": 0.002},
        {"phase": "agent", "step": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = bench_reading.bench_wait(ROBOT, tmp_path)
    assert shares == {"tokenizer": pytest.approx(0.02), "dynamics": pytest.approx(0.002)}
    assert "tokenizer    waited 2.00% of the time" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", '{"phase": "agent", "step": 1}\n'])
def test_what_is_no_run_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"is no run folder|has no metrics\.jsonl with"):
        bench_reading.bench_wait(ROBOT, tmp_path)
