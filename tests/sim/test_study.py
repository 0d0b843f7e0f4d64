"""The study's plan, and its runner with commands that only pretend to work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from d4_core.config import PRESETS, override
from d4_datasets.errors import UserError
from d4_sim import stages
from d4_sim.stages import Stage, keys
from d4_sim.study import (
    CASCADE,
    FRESH,
    FRESH_SCALES,
    IMPROVEMENT,
    LABELS,
    SEEDS,
    SHORTCUT,
    WORLDS,
    Args,
    Study,
    plan,
)  # fmt: skip

# Stands in for every command: notes its name and run, fails or waits if a file beside it says so.
FAKE = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
words = sys.argv[1:]
what = words[words.index("--phases") + 1] if "--phases" in words else words[0] if words[0] == "fork" else ""
with open(folder / "log.txt", "a") as log:
    log.write(" ".join([os.environ["FAKE_SELF"], what]).strip() + chr(10))
if (folder / f"fail_{what}").exists():
    sys.exit(2)
if "--run" in words:
    pathlib.Path(words[words.index("--run") + 1]).mkdir(parents=True, exist_ok=True)
if (folder / f"wait_{what}").exists():
    def leave(number, frame):
        print("saved", flush=True)
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, leave)
    (folder / "waiting").touch()
    time.sleep(30)
"""


class Fakes:
    """A study whose commands are fakes."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.args = folder, Args(out=folder / "out", jobs=2, only=("yard-0",))
        self.modules = {name: f"fake_{name.replace('-', '_')}" for name in stages.MODULES}
        for name, module in self.modules.items():
            (folder / f"{module}.py").write_text(f"import os; os.environ['FAKE_SELF'] = '{name}'\n" + FAKE)
        patch.setattr(stages, "MODULES", self.modules)
        patch.setenv("PYTHONPATH", str(folder))

    def run(self, **changes: object) -> tuple[int, list[str]]:
        """Exit code, and what was called in which order."""
        log = self.folder / "log.txt"
        log.write_text("")
        code = Study(replace(self.args, **changes)).run()
        return code, log.read_text().splitlines()


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path, monkeypatch)


def words_of(stage: Stage, flag: str) -> list[str]:
    """Values of an option over all commands of a stage."""
    return [c[c.index(flag) + 1] for c in stage.commands if flag in c]


# ---- plan


def test_every_stage_needs_only_earlier_ones_and_makes_folders_of_its_own() -> None:
    planned = plan(Args(out=Path("out")))
    names = [s.name for s in planned]
    assert len(set(names)) == len(names)
    for i, stage in enumerate(planned):
        assert set(stage.needs) <= set(names[:i]), stage.name
    made = [path for s in planned for path in s.makes]
    assert len(set(made)) == len(made)


def test_every_world_and_seed_has_a_whole_chain_seeded_throughout() -> None:
    planned = {s.name: s for s in plan(Args(out=Path("out")))}
    assert len(SEEDS) >= 3
    for world in WORLDS:
        for seed in SEEDS:
            stages_of = [s for name, s in planned.items() if name.startswith(f"{world}-{seed}/")]
            trained = [phase for s in stages_of for phase in words_of(s, "--phases")]
            assert trained == ["tokenizer", "dynamics", "agent", "imagination"]
            for stage in stages_of:  # what is driven on the same starts has no --seed
                assert set(words_of(stage, "--seed")) <= {str(seed)}, stage.name
            assert words_of(planned[f"{world}-{seed}/data"], "--seed") == [str(seed)]


def test_all_arms_of_a_comparison_get_the_same_training() -> None:
    planned = plan(Args(out=Path("out")))
    fresh = [f"{kind}-{seed}-" for kind in FRESH_SCALES for seed in FRESH]
    for arm in ("labels-", "looks-", "cascade-", "improve-", "shortcut-", *fresh):
        scales = {tuple(words_of(s, "--scale")[:1]) for s in planned if s.name.startswith(arm)}
        assert len(scales) == 1, arm
    assert {float(s.name.removeprefix("labels-")) for s in planned if s.name.startswith("labels-")} == set(
        LABELS
    )


@pytest.mark.parametrize("settings", [*CASCADE.values(), *IMPROVEMENT.values(), *SHORTCUT.values()])
def test_every_ablation_changes_the_preset(settings: tuple[str, ...]) -> None:
    nano = PRESETS["nano"]
    changed = override(nano, list(settings))
    assert (changed != nano) == bool(settings)


def test_keys_do_not_depend_on_the_place_or_the_lanes(tmp_path: Path) -> None:
    a = Study(Args(out=tmp_path / "a", jobs=1))
    b = Study(Args(out=tmp_path / "b", jobs=3, only=("yard-0",)))
    assert a.state._keys == b.state._keys
    assert a.state._keys != keys(plan(Args(out=Path("out"), episodes=7)))


def test_a_stage_is_done_again_when_the_settings_that_shaped_it_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(plan(Args(out=Path("out"))))
    changed = override(PRESETS["nano"], ["imagination_training.settings.beta=0.77"])
    monkeypatch.setitem(PRESETS, "nano", changed)
    after = keys(plan(Args(out=Path("out"))))
    assert before["yard-0/agent"] == after["yard-0/agent"]
    assert before["labels-0"] == after["labels-0"]
    for name in ("yard-0/imagination", "yard-0/policies", "labels-0.1", "improve-seed_1"):
        assert before[name] != after[name], name


# ---- running


def test_a_chain_runs_in_order_and_once(fakes: Fakes) -> None:
    code, called = fakes.run()
    assert code == 0
    assert called[:3] == ["d4-record", "d4-ingest", "d4-train tokenizer"]
    assert called[3:6] == ["d4-train dynamics", "d4-train agent", "d4-train imagination"]
    assert called.count("d4-eval") == 3
    assert fakes.run() == (0, [])


def test_a_failure_is_reported_and_stops_only_what_needs_it(fakes: Fakes, capfd) -> None:
    (fakes.folder / "fail_imagination").touch()
    code, called = fakes.run(only=("yard-0", "ladder"))
    assert code == 1
    assert "d4-eval" not in called
    assert "ladder" in called
    said = capfd.readouterr().out
    assert "yard-0/imagination failed with exit code 2, see" in said
    (fakes.folder / "fail_imagination").unlink()
    code, called = fakes.run(only=("yard-0", "ladder"))
    assert (code, called[0]) == (0, "d4-train imagination")


def test_stages_run_side_by_side(fakes: Fakes) -> None:
    (fakes.folder / "wait_dynamics").touch()
    study = Study(replace(fakes.args, only=("yard-0", "yard-1")))
    most = 0
    original = study._start

    def start() -> None:
        nonlocal most
        original()
        most = max(most, len(study.lanes))
        if (fakes.folder / "waiting").exists():
            os.kill(os.getpid(), signal.SIGINT)

    study._start = start
    with pytest.raises(stages.Interrupted):
        study.run()
    assert most == 2


def test_an_interruption_reaches_the_commands_and_the_study_goes_on_there(fakes: Fakes) -> None:
    """Also in the background of a script, where SIGINT is ignored."""
    (fakes.folder / "wait_agent").touch()
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "import sys, pathlib; from d4_sim import stages, study; "
        f"stages.MODULES = {fakes.modules!r}; "
        f"study.Study(study.Args(out=pathlib.Path({str(fakes.args.out)!r}), jobs=2, only=('yard-0',))).run()"
    )
    child = waiting(fakes, program)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=20)
    assert b"Interrupted" in said
    assert "saved" in (fakes.args.out / "logs" / "yard-0.agent.log").read_text()
    (fakes.folder / "wait_agent").unlink()
    assert fakes.run()[1][0] == "d4-train agent"


def waiting(fakes: Fakes, program: str) -> subprocess.Popen:
    """A process that runs `program`, in which a command waits now."""
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (fakes.folder / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return child


def test_a_killed_study_leaves_nothing_running(fakes: Fakes) -> None:
    """Its commands went on, and a second run in the same folder got in their way."""
    (fakes.folder / "wait_agent").touch()
    child = waiting(
        fakes,
        "import pathlib; from d4_sim import stages, study; "
        f"stages.MODULES = {fakes.modules!r}; "
        f"study.Study(study.Args(out=pathlib.Path({str(fakes.args.out)!r}), jobs=2, only=('yard-0',))).run()",
    )
    child.kill()
    child.communicate(timeout=20)
    log, deadline = fakes.args.out / "logs" / "yard-0.agent.log", time.monotonic() + 20
    while "saved" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "saved" in log.read_text()


def test_a_folder_is_held_until_the_last_of_its_commands_has_left(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(30)")
    monkeypatch.setattr(stages, "MODULES", {"slow": "slow"})
    env, log = {"PYTHONPATH": str(tmp_path)}, tmp_path / "log"
    with stages.alone(tmp_path), log.open("wb") as output:
        child = stages.start(("slow",), env, output)
    try:
        with pytest.raises(UserError, match="another run works"), stages.alone(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with stages.alone(tmp_path):
        pass
