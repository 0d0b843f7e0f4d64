"""The report: fixed memory, quantiles within two percent, JSON that every reader takes."""

import json
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_nodes.guard import Guard
from d4_nodes.report import Histogram, Report, can_write
from d4_nodes.runner import Runner


@given(st.lists(st.floats(1e3, 1e11), min_size=1, max_size=300), st.sampled_from([0.5, 0.99, 0.999]))
def test_quantiles_are_right_to_two_percent(values, q) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = np.sort(values)[math.ceil(q * len(values)) - 1] / 1e6
    assert exact * 0.999 <= histogram.quantile_ms(q) <= exact * 1.0201
    assert histogram.summary_ms()["max"] == pytest.approx(max(values) / 1e6)
    assert histogram.summary_ms()["mean"] == pytest.approx(np.mean(values) / 1e6)


def test_an_empty_report_is_valid_json(tmp_path) -> None:
    report = Report(20.0, 30.0)
    report.write(tmp_path / "deep" / "report.json")
    data = json.loads((tmp_path / "deep" / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["NUM_MISSED_FRAMES"] == 0
    assert "0 commands" in report.text()


def test_the_report_says_what_happened(tmp_path) -> None:
    report = Report(20.0, 30.0, {"checkpoint": "x"})
    for k in range(21):
        report.command(k * 50_000_000 + 1)
        report.add("lateness", 1e5)
    report.counts["missed"] = 3
    rules = {"stale": {"count": 2, "reason": "eye is old"}, "limit": {"count": 0, "reason": ""}}
    data = report.to_dict(rules)
    assert data["MEAN_FRAME_RATE"] == pytest.approx(20)
    assert data["metadata"]["checkpoint"] == "x"
    text = report.text(rules)
    assert "3 missed" in text
    assert "stale acted 2 times" in text
    assert "limit" not in text


def test_two_runs_in_one_second_leave_two_reports(contract, tmp_path, monkeypatch) -> None:
    """The file of the second replaced that of the first."""
    loop = SimpleNamespace(contract=contract, lock=threading.RLock(), report=Report(20.0, 30.0))
    loop.guard = Guard(contract)
    seconds = iter([1_700_000_000_100_000_000, 1_700_000_000_350_000_000])
    monkeypatch.setattr("d4_nodes.runner.time.time_ns", lambda: next(seconds))
    runner = Runner(loop, log=lambda _: None)
    assert runner.conclude(tmp_path) != runner.conclude(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_the_system_refused_is_a_warning_and_in_the_report(contract, tmp_path, monkeypatch) -> None:
    loop = SimpleNamespace(contract=contract, lock=threading.RLock(), report=Report(20.0, 30.0))
    loop.guard, loop.run = Guard(contract), lambda: None
    monkeypatch.setattr("d4_nodes.runner.realtime.prepare_thread", lambda *_: ["no priority", "no cores"])
    said: list[str] = []
    runner = Runner(loop, log=said.append)
    runner._run()
    assert said == ["warning: no priority", "warning: no cores"]
    path = runner.conclude(tmp_path)
    assert path is not None
    assert json.loads(path.read_text())["metadata"]["realtime_refused"] == runner.refused == [
        "no priority", "no cores",
    ]  # fmt: skip


def test_whether_a_folder_can_be_written_is_found_out_without_a_trace(tmp_path) -> None:
    """A parameter that was refused left its folder behind."""
    (tmp_path / "file").touch()
    assert can_write(tmp_path)
    assert can_write(tmp_path / "new" / "folder")
    assert not can_write(tmp_path / "file" / "folder")
    assert not can_write(Path("/proc/none"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_looked_into_takes_no_files(tmp_path) -> None:
    """To all but root it was a PermissionError, and who set the parameter waited for an answer for ever."""
    secret, is_root = tmp_path / "secret", os.geteuid() == 0
    secret.mkdir(mode=0)
    if is_root:
        os.seteuid(65534)
    try:
        assert not can_write(secret / "new" / "folder")
    finally:
        if is_root:
            os.seteuid(0)
        secret.chmod(0o700)
