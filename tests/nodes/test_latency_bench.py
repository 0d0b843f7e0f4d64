"""d4-bench latency: what it computes is written, whoever ends it and whenever."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scripted_server import Scripted
from untrained_run import save

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes import bench, server
from d4_nodes.loop import Loop
from d4_nodes.memory import Memory
from d4_nodes.server import Delayed

ROBOT = Path(__file__).with_name("robot.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with an untrained policy for the test robot."""
    return save(Contract.load(ROBOT), tmp_path_factory.mktemp("run"))


def start(run: Path, out: Path, *options: str) -> subprocess.Popen:
    """The command, in a group of its own, as a terminal has it."""
    command = [sys.executable, "-u", "-m", "d4_nodes.bench", "latency", str(run), "--out", str(out)]
    command += ["--threads", "1", "--allow-slow", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def interrupt_driving(process: subprocess.Popen, send) -> tuple[str, str]:
    """Let it drive for two seconds, then interrupt it; returns what it printed."""
    line = ""
    while not line.startswith("driving"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
    time.sleep(2.0)
    send(process.pid, signal.SIGINT)
    return process.communicate(timeout=30)


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_ctrl_c_keeps_what_was_measured(run, tmp_path, send) -> None:
    """It was lost: no table, no file. A terminal tells the server, too, which ends beside it."""
    out = tmp_path / "deep" / "report.json"
    with start(run, out, "--seconds", "600") as process:
        printed, complaint = interrupt_driving(process, send)
    assert process.returncode == 130
    assert complaint.splitlines()[-1] == "interrupted"
    assert "capture to command" in printed
    assert "lateness of a bare sleep" in printed
    result = json.loads(out.read_text())
    assert result["interrupted"] is True
    assert 1.5 < result["seconds"] < 60
    assert result["counts"]["commands"] > 20
    assert os.listdir(out.parent) == [out.name]


def test_everything_computed_is_in_the_file(run, tmp_path) -> None:
    """Half of it was only in memory. The server is made slow, and the session inside it is not."""
    out = tmp_path / "report.json"
    options = ["--seconds", "2", "--server-delay-ms", "7", "--server-jitter-ms", "1", "--seed", "3"]
    with start(run, out, *options) as process:
        printed, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    result = json.loads(out.read_text())
    assert result["interrupted"] is False
    assert result["decision_ms"]["p99"] >= result["decision_ms"]["p50"] > 7
    assert result["command_gap_ms"]["p50"] == pytest.approx(50, rel=0.2)
    assert result["commands_outside_contract"] == 0
    assert result["reference_sleep_ms"]["count"] == 100
    for name, ratio in result["ratios"].items():
        assert f"{name}: {ratio:.3f}" in printed
    stages, about = result["stages_ms"], result["metadata"]
    assert stages["answer"]["p50"] > stages["encode"]["p50"] + stages["plan"]["p50"] + 6
    assert (about["delay_ms"], about["jitter_ms"], about["seed"]) == (7.0, 1.0, 3)
    assert about["arguments"]["server_delay_ms"] == "7.0"
    assert about["allow_slow"] is (result["decision_ms"]["p99"] > result["decision_ms"]["budget"])


def test_the_loop_knows_what_a_decision_takes(run, monkeypatch) -> None:
    """As in the policy node: a frame may come as late as leaves time for it."""
    loops: list[Loop] = []
    monkeypatch.setattr(bench, "_drive", lambda args, loop, camera: not loops.append(loop))
    result = bench.latency(bench.LatencyArgs(checkpoint=run, threads=1, allow_slow=True))
    assert loops[0].config.decision_ms == result["decision_ms"]["p99"]


def delays(contract: Contract, folder: Path, monkeypatch, seed: int) -> list[float]:
    """Seconds that 50 answers are held back."""
    slept: list[float] = []
    brain = Delayed(Scripted(contract, folder / "fault"), 2.0, 4.0, seed)
    assert brain.card["delay_ms"] == 2.0
    shared = Memory(brain.fields)
    with monkeypatch.context() as patch:
        patch.setattr(server.time, "sleep", slept.append)
        for _ in range(50):
            brain.decide(shared)
    assert shared["plan"][0, 0] == np.float32(0.05)
    shared.close()
    return slept


def test_delays_follow_from_the_seed(contract, tmp_path, monkeypatch) -> None:
    first, again, other = (delays(contract, tmp_path, monkeypatch, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert min(first) == 0.0
    assert 0.001 < np.mean(first) < 0.006


@pytest.mark.parametrize(("delay_ms", "jitter_ms"), [(-1, 0), (0, -1), (1001, 0), (0, 1001), (np.nan, 0)])
def test_a_delay_is_a_number_of_milliseconds(contract, tmp_path, delay_ms, jitter_ms) -> None:
    with pytest.raises(UserError, match="give 0 to 1000 ms"):
        Delayed(Scripted(contract, tmp_path / "fault"), delay_ms, jitter_ms)


def test_a_server_that_was_not_ready_at_ctrl_c_ends(tmp_path) -> None:
    """Nobody else knew of it."""
    note = tmp_path / "pid"
    slow = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = "import sys; from d4_nodes.bench import ServerProcess\n"
    code += f"ServerProcess([sys.executable, '-c', {slow!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 20
        while not (note.exists() and note.read_text()):
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
    assert not Path(f"/proc/{note.read_text()}").exists()
