"""What makes a Python loop keep time on Linux, as far as this user is permitted; the rest is said, not
hidden.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterable, Iterator

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_TIMERSLACK = 29


def prepare_thread(priority: int = 0, cores: tuple[int, ...] = (), lock_memory: bool = False) -> list[str]:
    """Ask for real-time treatment of the calling thread; returns a line for each thing that was not
    permitted.

    Args:
        priority: SCHED_FIFO priority 1 to 99; 0 leaves the scheduler alone.
        cores: run on these only; empty: anywhere.
        lock_memory: keep what is touched in memory (of the whole process).
    """
    refused = []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # ns: wake when asked, not up to 50 us later
    if cores:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            refused.append(
                f"cannot run on cores {_listed(cores)} alone ({error.strerror}): choose from "
                f"{_listed(os.sched_getaffinity(0))}, which this process may use of the machine's "
                f"{os.cpu_count()}; a container is given more with --cpuset-cpus"
            )
    if priority:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        except (OSError, ValueError) as error:
            refused.append(
                f"no SCHED_FIFO priority {priority} ({getattr(error, 'strerror', error)}): add your user to "
                "a group with `rtprio 99` in /etc/security/limits.d, or start a container with "
                "--cap-add=sys_nice --ulimit rtprio=99"
            )
    if lock_memory and libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        refused.append(
            f"cannot lock memory ({os.strerror(ctypes.get_errno())}): set `memlock unlimited` in "
            "/etc/security/limits.d, or start a container with --ulimit memlock=-1"
        )
    return refused


def _listed(cores: Iterable[int]) -> str:
    return ", ".join(str(core) for core in sorted(cores))


@contextlib.contextmanager
def quiet_interpreter() -> Iterator[None]:
    """No garbage collection by itself (see `sweep`), and short turns of the interpreter's threads."""
    interval, was_enabled = sys.getswitchinterval(), gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def sweep() -> None:
    """Free the cycles among the youngest objects, which is where a loop makes them, while `quiet_interpreter`
    holds: a run of a day must not grow by them.

    Takes microseconds, as it looks only at what was made since the last time; a whole collection is a pause.
    """
    gc.collect(0)
