"""Thread count: what the machine, its control groups and its load leave free."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d4_core import threads


def test_import_is_free_of_torch() -> None:
    code = "import sys, d4_core.threads; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_free_cores_are_within_affinity() -> None:
    assert 1 <= threads.free_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("busy", "expected"), [(0, 2), (4, 2), (10, 1), (20, 1)])
def test_a_busy_core_is_not_free(monkeypatch: pytest.MonkeyPatch, busy: int, expected: int) -> None:
    samples = iter([{0: (100, 100), 1: (100, 100)}, {0: (120 - busy, 120), 1: (120, 120)}])
    monkeypatch.setattr(threads, "_ticks", lambda cores: next(samples))
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(threads, "cgroup_quota", lambda: math.inf)
    assert threads.free_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1.9, 1), (3.0, 3), (math.inf, 4)])
def test_quota_limits_the_count(monkeypatch: pytest.MonkeyPatch, quota: float, expected: int) -> None:
    monkeypatch.setattr(threads, "_idle_cores", lambda cores: 4.0)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "cgroup_quota", lambda: quota)
    assert threads.free_cores() == expected


def test_quota_files(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads._quota_v2(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads._quota_v2(tmp_path) == math.inf
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert threads._quota_v1(tmp_path) == math.inf
    (tmp_path / "cpu.cfs_quota_us").write_text("200000\n")
    assert threads._quota_v1(tmp_path) == 2.0


def configured(code: str, **env: str) -> list[str]:
    """What a fresh process prints that ran `code` with `env` and no OpenMP settings of ours."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", f"import os\nfrom d4_core import threads\n{code}"]
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_configure_before_torch() -> None:
    code = (
        "n = threads.configure()\nimport torch\n"
        "print(n == torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    )
    assert configured(code) == ["True", "PASSIVE", "0"]


def test_configure_after_torch() -> None:
    assert configured("import torch\nprint(threads.configure(1), torch.get_num_threads())") == ["1", "1"]


def test_the_users_number_wins() -> None:
    assert configured("print(threads.configure())", OMP_NUM_THREADS="3") == ["3"]
