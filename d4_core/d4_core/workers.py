"""Data-parallel processes on one machine, without a listening port beyond it.

On a few CPU cores several single-threaded processes are nearly twice as fast as one process with several
threads: the operations of a small model are too short to share out. torchrun does the same for several GPUs
or machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def launch(module: str, argv: list[str], procs: int, run: Path) -> int:
    """Run ``python -m module argv`` as `procs` ranks and return the exit code of the first that failed, or 0.

    Rank 0 owns the terminal; the others write to <run>/rank-<n>.log. Signals are passed on to all of them.
    Ranks meet through a file and talk over the loopback interface. Each rank leads a process group of its
    own: Ctrl-C in a terminal would otherwise reach it twice, and the second signal means "stop at once".
    """
    run.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = []
        for rank in range(procs):
            log = None if rank == 0 else stack.enter_context((run / f"rank-{rank}.log").open("w"))
            command = [sys.executable, "-m", module, *argv]
            env = _environment(rank, procs, folder)
            workers.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, process_group=0))
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {s: signal.signal(s, lambda number, _: _signal(workers, number)) for s in numbers}
        try:
            return _wait(workers)
        finally:
            _signal(workers, signal.SIGKILL)
            for number, handler in previous.items():
                signal.signal(number, handler)


def follow_parent() -> None:
    """End this process when the one that launched it is gone, however it went."""
    parent = int(os.environ["D4_LAUNCHER"])  # getppid() would name another if it is gone already

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def _environment(rank: int, procs: int, folder: str) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(procs), "LOCAL_WORLD_SIZE": str(procs),
        "D4_RENDEZVOUS": f"file://{folder}/rendezvous", "D4_LAUNCHER": str(os.getpid()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0",
    }  # fmt: skip


def _signal(workers: list[subprocess.Popen], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)


def _wait(workers: list[subprocess.Popen], grace_s: float = 20.0) -> int:
    """Wait for all; when one fails, give the others a moment to say why, then end them."""
    deadline = None
    while True:
        codes = [worker.poll() for worker in workers]
        failed = next((code for code in codes if code), 0)
        if all(code is not None for code in codes):
            return codes[0] or failed if failed >= 0 else 128 - failed
        if failed and deadline is None:
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            _signal(workers, signal.SIGKILL)
        time.sleep(0.1)
