"""How many threads to compute with. Import and call `configure` before torch.

OpenMP threads wait for each other by spinning. Beside another busy process a spinning thread burns the time
that its partner needs, and two threads become several times slower than one. Hence: count the cores that are
free now, and let waiting threads sleep.
"""

import math
import os
import sys
import time
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_SAMPLE_S = 0.2  # /proc/stat counts in ticks of 10 ms, so this resolves 5 % of a core


def configure(threads: int | None = None) -> int:
    """Set the number of compute threads and make waiting threads sleep; returns the number.

    Args:
        threads: the number; None takes OMP_NUM_THREADS if the user set it, else the free cores.

    Called after torch was imported it can still set the number, but not how threads wait.
    """
    if threads is None:
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(wanted) if wanted.isdecimal() and int(wanted) > 0 else free_cores()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    return threads


def free_cores() -> int:
    """Cores this process may use that nobody else uses now, at least 1; takes 0.2 s."""
    cores = os.sched_getaffinity(0)
    idle = _idle_cores(cores)
    # A core idle for at least three quarters of the time counts as free.
    return max(1, math.floor(min(len(cores), idle + 0.25, cgroup_quota())))


def cgroup_quota() -> float:
    """CPU limit in cores set by control groups (containers, batch systems); infinity if there is none."""
    limits = [_quota_v2(folder) for folder in _folders("", _CGROUP)]
    limits += [_quota_v1(folder) for folder in _folders("cpu", _CGROUP / "cpu")]
    return min(limits, default=math.inf)


def _idle_cores(cores: set[int]) -> float:
    """Mean number of idle cores among `cores` over a short sample; all where it cannot be measured."""
    before = _ticks(cores)
    time.sleep(_SAMPLE_S)
    after = _ticks(cores)
    idle = 0.0
    for core, (idle_before, total_before) in before.items():
        idle_after, total_after = after.get(core, (idle_before, total_before))
        elapsed = total_after - total_before
        idle += (idle_after - idle_before) / elapsed if elapsed > 0 else 1.0  # no tick at all: asleep
    return idle if before else float(len(cores))


def _ticks(cores: set[int]) -> dict[int, tuple[int, int]]:
    """(idle, total) clock ticks of each core since boot, from /proc/stat."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return {}
    result = {}
    for line in lines:
        name, *fields = line.split()
        core = name.removeprefix("cpu")
        if name != core and core.isdecimal() and int(core) in cores:
            ticks = [int(f) for f in fields[:8]]  # user nice system idle iowait irq softirq steal
            result[int(core)] = (ticks[3] + ticks[4], sum(ticks))
    return result


def _folders(controller: str, root: Path) -> list[Path]:
    """This process's control group and its ancestors; each may set a limit."""
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return [root]
    path = next((Path(p) for _, names, p in entries if controller in names.split(",")), Path("/"))
    return [root / parent.relative_to("/") for parent in (path, *path.parents)]


def _quota_v2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return math.inf
    return quota / period if quota > 0 else math.inf
