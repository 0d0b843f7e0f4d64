"""Runs a command and sees to it that nothing of it is left: `python keeper.py FD LIFE COMMAND...`.

Games start processes in sessions of their own (MineRL its Java, Xvfb, watchers), which neither a process
group nor a parent's death reaches. So a keeper stands between: whatever its descendants leave behind becomes
its own child (PR_SET_CHILD_SUBREAPER). When the command ends, or nobody holds the other end of the pipe LIFE
any more, because the benchmark has let go of it or was killed, the keeper kills all of them and leaves.

FD is handed on to the command. Its temporary files belong into a folder of their own (TMPDIR), which the
keeper removes at the end. The keeper uses the standard library only, and Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LONGEST_S = 10.0
BY_SIGNAL = 128  # and the number of a signal is the exit code if the command was ended by it, as in a shell


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Process ids of everything below a process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # the name in brackets may hold anything, brackets too
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, ahead = [], [root]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def _kill_all() -> None:
    """Kill all descendants, also those that appear meanwhile, and reap them."""
    deadline = time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline:
        left = descendants(os.getpid())
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def main() -> int:
    """Run the command until it ends or the benchmark lets go; returns its exit code."""
    handed_on, life, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever sends these also lets go of the pipe
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def before() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # even if the keeper itself is killed

    folder = tempfile.mkdtemp(prefix="d4-game-")
    try:
        child = subprocess.Popen(
            command, pass_fds=(handed_on,), start_new_session=True, preexec_fn=before,
            env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        return _keep(child, handed_on, life)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(child: subprocess.Popen, handed_on: int, life: int) -> int:
    """Wait for the command's end, or for that of whoever wanted it, and kill what is left."""
    os.close(handed_on)  # or the benchmark would never learn that the command has ended
    ended = os.pidfd_open(child.pid)
    select.select([life, ended], [], [])
    code = child.poll()
    _kill_all()
    if code is None:
        return 0
    return code if code >= 0 else BY_SIGNAL - code


if __name__ == "__main__":
    sys.exit(main())
