"""A stand-in for a training process: `python -m worker_probe <folder> <action per rank> ...`.

Actions: a number exits with it; `wait` waits for a signal, notes it and exits as the training loop does;
`follow` hangs until the launcher is gone.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from d4_core.workers import follow_parent


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    action = sys.argv[2 + rank]
    seen: list[int] = []
    if action == "wait":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: seen.append(number))
    if action == "follow":
        follow_parent()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "D4_RENDEZVOUS", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    about = {name: os.environ.get(name) for name in names} | {"pid": os.getpid(), "group": os.getpgrp()}
    aside = folder / f".tmp-{rank}"
    aside.write_text(json.dumps(about))
    aside.rename(folder / f"{rank}.json")
    print(f"rank {rank} says {action}", flush=True)
    deadline = time.monotonic() + 60
    while action in ("wait", "follow") and not seen and time.monotonic() < deadline:
        time.sleep(0.02)
    if seen:
        time.sleep(0.3)  # a second signal would arrive by now
        (folder / f"{rank}.signals").write_text(json.dumps(seen))
        sys.exit(128 + seen[0])
    sys.exit(int(action) if action.isdecimal() else 1)


if __name__ == "__main__":
    main()
