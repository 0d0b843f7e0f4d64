"""What a launch says that cannot work, and what it leaves behind: as a user types it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytestmark = pytest.mark.ros

ROBOT = Path(__file__).parents[1] / "nodes" / "robot.yaml"


def launch(name: str, *arguments: str, until: str = "", timeout_s: float = 60.0) -> tuple[int, str]:
    """Exit code and output; with `until` it is interrupted once it has said that."""
    command = ["ros2", "launch", "d4_bringup", f"{name}.launch.py", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        end = time.monotonic() + timeout_s
        try:
            while until and until not in (said := _read(log)):
                assert time.monotonic() < end, said
                time.sleep(0.1)
            if until:
                process.send_signal(signal.SIGINT)
            return process.wait(timeout_s), _read(log)
        finally:
            process.kill()


def _read(log) -> str:
    position = log.tell()
    log.seek(0)
    text = log.read()
    log.seek(position)
    return text


def folders() -> set[Path]:
    return {p for p in Path(tempfile.gettempdir()).glob("d4-????????") if p.is_dir()}


def test_a_server_that_cannot_run_ends_the_launch_instead_of_being_started_for_ever(tmp_path):
    run = tmp_path / "run" / "imagination"
    run.mkdir(parents=True)
    (run / "contract.yaml").write_text(ROBOT.read_text())
    before = folders()
    python = os.environ.get("D4_PYTHON", sys.executable)
    code, said = launch("policy", f"checkpoint:={tmp_path / 'run'}", f"server_python:={python}")
    assert code == 1
    assert "the inference server cannot run" in said
    assert said.count("error:") == 1
    assert folders() == before


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("policy", ["checkpoint:=/nowhere"], "/nowhere holds no checkpoint"),
        ("policy", ["checkpoint:=/", f"contract:={ROBOT}", "server_python:=/nowhere"], "no program"),
        ("record", [], "give contract:=robot.yaml"),
        ("sim", ["world:=mars"], "unknown world 'mars'"),
        ("sim", ["results:=/proc/none/x.json"], "results: nothing can be written in /proc/none"),
        ("sim", ["results:=/tmp"], "results: /tmp is a folder, give a file"),
        ("sim", ["episodes:=many"], "episodes:=many is no number"),
        ("guard", [f"contract:={ROBOT}", "shadow:=perhaps"], "neither true nor false"),
    ],
)  # fmt: skip
def test_one_sentence(name, arguments, sentence):
    code, said = launch(name, *arguments)
    assert code == 1
    assert sentence in said
    assert "Traceback" not in said


def test_a_node_that_is_not_configured_says_what_to_do_and_ends_in_order():
    code, said = launch(
        "guard", f"contract:={ROBOT}", "input_prefix:=/", "namespace:=/left", until="not configured"
    )
    assert code == 0
    assert "`ros2 lifecycle set /left/guard configure`" in said
    assert "process has died" not in said


def test_a_second_node_of_one_name_is_not_launched():
    """Its transitions reached the first one: what somebody had deactivated would have driven again."""
    command = ["ros2", "launch", "d4_bringup", "guard.launch.py", f"contract:={ROBOT}", "autostart:=false"]
    first = subprocess.Popen(
        [*command, "namespace:=twin"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    try:
        until = time.monotonic() + 60
        while b"/twin/guard" not in subprocess.run(["ros2", "node", "list"], capture_output=True).stdout:
            assert time.monotonic() < until
        code, said = launch("guard", f"contract:={ROBOT}", "namespace:=twin")
        assert code == 1
        assert "a node /twin/guard runs already" in said
        assert "Traceback" not in said
    finally:
        first.send_signal(signal.SIGINT)
        try:
            first.wait(20)
        finally:
            first.kill()
