"""A process whose output nobody reads goes on."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

_WRITER = """
import ctypes, sys, threading, time
from d4_nodes.output import never_blocking

libc = ctypes.PyDLL(None)  # holds Python's lock while it writes, as ROS's logger does
line = b"x" * 99 + b"\\n"
longest, ended = 0.0, threading.Event()

def watch():
    global longest
    before = time.monotonic()
    while not ended.wait(0.005):
        now = time.monotonic()
        longest, before = max(longest, now - before), now

with never_blocking():
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(int(sys.argv[2])):
        libc.write(1, line, len(line)) if sys.argv[3] == "held" else print("x" * 99)
    time.sleep(0.3)
    ended.set()
    watcher.join()
    open(sys.argv[1], "w").write(str(longest))
"""


def run(note: Path, lines: int, lock: str) -> subprocess.Popen:
    command = [sys.executable, "-c", _WRITER, str(note), str(lines), lock]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


both = pytest.mark.parametrize("lock", ["held", "free"])


@both
def test_a_terminal_that_nobody_reads_stops_no_thread(tmp_path, lock) -> None:
    """The logger filled a pipe that nobody emptied: loop and watchdog stood still until somebody did."""
    process = run(tmp_path / "note", 40_000, lock)  # 4 MB
    process.wait(30)
    assert float((tmp_path / "note").read_text()) < 1.0
    assert process.returncode == 0


@both
def test_what_is_read_is_all_there_in_order(tmp_path, lock) -> None:
    out = run(tmp_path / "note", 2000, lock).communicate(timeout=30)[0].decode().splitlines()
    assert out == ["x" * 99] * 2000


def test_what_nobody_read_is_said_when_somebody_reads_again(tmp_path) -> None:
    process = run(tmp_path / "note", 40_000, "free")
    while not (tmp_path / "note").exists():
        assert process.poll() is None
        time.sleep(0.01)
    out = process.communicate(timeout=30)[0].decode()
    assert "bytes of output are missing here" in out
