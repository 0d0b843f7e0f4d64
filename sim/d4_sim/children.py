"""Processes that end when this one does, however it ends. Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_END_S = 5.0
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be between fork and exec


def following(number: int) -> Callable[[], None]:
    """What a child is to do before its command (`preexec_fn`): ask for this signal when our thread ends."""
    parent = os.getpid()

    def before() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died meanwhile
            os._exit(1)

    return before


def start(
    command: Sequence[str], env: Mapping[str, str], log: Path, pass_fds: Sequence[int] = ()
) -> subprocess.Popen:
    """Start a command that the kernel kills with this thread; what it prints is added to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=pass_fds,
            start_new_session=True, preexec_fn=following(signal.SIGKILL), cwd=log.parent,
        )  # fmt: skip


def end(child: subprocess.Popen | None) -> None:
    """Kill a child and what is in its group, and reap it."""
    if child is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_END_S)
