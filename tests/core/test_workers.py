"""Launching ranks on one machine: what they are told, whose exit code counts, and who gets which signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d4_core import workers
from d4_core.workers import launch

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def probe_is_importable(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def started(folder: Path, ranks: int = 2) -> list[dict]:
    """What each rank knows of itself, once all of them run."""
    eventually(lambda: all((folder / f"{rank}.json").exists() for rank in range(ranks)))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def launcher(folder: Path, *actions: str, **options: object) -> subprocess.Popen:
    """`launch` in a process of its own, as d4-train runs it."""
    code = (
        "import sys; from pathlib import Path; from d4_core.workers import launch; "
        "sys.exit(launch('worker_probe', sys.argv[1:], len(sys.argv) - 2, Path(sys.argv[1])))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(folder), *actions], **options)


def test_ranks_know_each_other_and_stay_single_threaded(tmp_path: Path, capfd) -> None:
    assert launch("worker_probe", [str(tmp_path), "0", "0"], 2, tmp_path / "run") == 0
    first, second = started(tmp_path)
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in (first, second)] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert first["D4_RENDEZVOUS"] == second["D4_RENDEZVOUS"]
    assert first["D4_RENDEZVOUS"].startswith("file:///")
    assert not Path(first["D4_RENDEZVOUS"].removeprefix("file://")).parent.exists()  # nothing is left
    assert first["OMP_NUM_THREADS"] == "1"
    assert first["GLOO_SOCKET_IFNAME"] == "lo"  # reachable from this machine only
    assert capfd.readouterr().out == "rank 0 says 0\n"  # one voice in the terminal
    assert (tmp_path / "run" / "rank-1.log").read_text() == "rank 1 says 0\n"


@pytest.mark.parametrize(("actions", "code"), [(("2", "2"), 2), (("0", "3"), 3), (("5", "0"), 5)])
def test_the_exit_code_is_that_of_a_rank_that_failed(tmp_path: Path, actions: tuple, code: int) -> None:
    assert launch("worker_probe", [str(tmp_path), *actions], 2, tmp_path) == code


def test_a_rank_that_waits_for_a_dead_one_is_ended(tmp_path: Path, monkeypatch) -> None:
    wait = workers._wait
    monkeypatch.setattr(workers, "_wait", lambda running: wait(running, grace_s=0.5))
    assert launch("worker_probe", [str(tmp_path), "follow", "3"], 2, tmp_path) != 0
    for rank in started(tmp_path):
        assert not Path(f"/proc/{rank['pid']}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_rank_gets_a_signal_once(tmp_path: Path, number: signal.Signals) -> None:
    """Twice would mean "stop at once": a terminal sends Ctrl-C to its group, the launcher passes it on."""
    parent = launcher(tmp_path, "wait", "wait", start_new_session=True)
    ranks = started(tmp_path)
    assert all(rank["group"] == rank["pid"] for rank in ranks)
    os.killpg(parent.pid, number)  # as a terminal does
    assert parent.wait(timeout=60) == 128 + number
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.signals").read_text()) == [number]


def test_the_launcher_gives_its_signal_handlers_back(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    launch("worker_probe", [str(tmp_path), "0"], 1, tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_no_rank_outlives_a_launcher_that_fails(tmp_path: Path, monkeypatch) -> None:
    ranks = []

    def fail(running: list[subprocess.Popen]) -> int:
        ranks.extend(started(tmp_path))
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr(workers, "_wait", fail)
    with pytest.raises(RuntimeError, match="unforeseen"):
        launch("worker_probe", [str(tmp_path), "wait", "wait"], 2, tmp_path)
    for rank in ranks:
        eventually(lambda pid=rank["pid"]: not is_running(pid), seconds=20)


def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    parent = launcher(tmp_path, "follow", "follow")
    ranks = started(tmp_path)
    parent.kill()
    parent.wait()
    for rank in ranks:
        eventually(lambda pid=rank["pid"]: not is_running(pid), seconds=20)


def test_a_rank_that_starts_after_its_launcher_was_killed_ends(tmp_path: Path) -> None:
    """It took whoever had adopted it for its launcher, and went on for ever."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = os.environ | {"RANK": "0", "D4_LAUNCHER": str(gone.pid)}
    command = [sys.executable, "-m", "worker_probe", str(tmp_path), "follow"]
    done = subprocess.run(command, env=environment, timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def is_running(pid: int) -> bool:
    """Whether it computes still; an orphan that nobody has collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
