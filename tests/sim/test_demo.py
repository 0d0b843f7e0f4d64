"""The demo's chain of commands, with commands that only pretend to work."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from d4_core import report
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim import demo, stages
from d4_sim.demo import Args, own_keys, plan
from d4_sim.stages import State, clock, command

# Stands in for every public command: notes its call, leaves a file, behaves as FAKE_<phase or command> says.
FAKE = """
import os, pathlib, signal, sys, time
words = sys.argv[1:]
name = words[words.index("--phases") + 1] if "--phases" in words else os.environ["FAKE_SELF"]
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(" ".join([name, *words]) + chr(10))
made = {"d4_record": "--out", "d4_ingest": "--out"}.get(name)
if made:
    folder = pathlib.Path(words[words.index(made) + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made").write_text(" ".join(words))
if "--html" in words:
    pathlib.Path(words[words.index("--html") + 1]).write_text("a page")
if "--run" in words:
    folder = pathlib.Path(words[words.index("--run") + 1]) / "media"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (name + ".png")).write_bytes(b"")
behaviour = os.environ.get("FAKE_" + name, "0")
if behaviour == "wait":
    def leave(number, frame):
        print("saved after", number, flush=True)
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    print("waiting", flush=True)
    time.sleep(30)
if behaviour == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour != "0" and "--force" not in words:
    print("error: gate failed", file=sys.stderr)
    sys.exit(int(behaviour))
"""
NAMES = ("d4_record", "d4_ingest", "d4_audit", "d4_train", "d4_rollout", "d4_eval")


class Chain:
    """A demo whose commands are fakes."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.out, self.log = folder, folder / "out", folder / "log.txt"
        for name in NAMES:
            (folder / f"fake_{name}.py").write_text(f"import os; os.environ['FAKE_SELF'] = '{name}'\n" + FAKE)
        self.modules = {name.replace("_", "-"): f"fake_{name}" for name in NAMES}
        patch.setattr(stages, "MODULES", self.modules)
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("FAKE_LOG", str(self.log))
        self.args = Args(out=self.out, episodes=50, jobs=1)

    def run(self, **changes: object) -> tuple[int, list[str]]:
        """Exit code of a demo, and what it called: phase or command names."""
        self.log.write_text("")
        code = demo.Demo(replace(self.args, **changes)).run()
        return code, [line.split()[0] for line in self.log.read_text().splitlines()]


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    return Chain(tmp_path, monkeypatch)


ALL = [
    "d4_record", "d4_ingest", "d4_audit", "tokenizer", "d4_rollout", "dynamics", "d4_rollout", "agent",
    "d4_rollout", "d4_eval", "imagination", "d4_rollout", "d4_eval",
]  # fmt: skip


def test_a_run_calls_everything_in_order_and_a_second_run_nothing(chain: Chain, capfd) -> None:
    assert chain.run() == (0, ALL)
    said = capfd.readouterr().out
    assert "[1/10] record" in said
    assert "[10/10] report" in said
    assert f"$ d4-train {chain.out}/dataset --run {chain.out}/run --preset nano --seed 0 --scale 1.0" in said
    assert f"look at {chain.out}/audit.html" in said
    assert f"look at {chain.out}/run/media/tokenizer.png" in said
    assert said.rstrip().endswith(f"report: {chain.out}/run/report.html")
    assert (chain.out / "run" / "report.html").stat().st_size > 0
    assert Contract.load(chain.out / "robot.yaml").name == "yard"
    assert chain.run() == (0, [])
    assert capfd.readouterr().out.count("done before") == 9


def test_the_printed_commands_are_the_ones_that_run(chain: Chain, capfd) -> None:
    chain.run()
    printed = [line[2:] for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    called = [line.split(" ", 1)[1] for line in chain.log.read_text().splitlines()]
    assert [" ".join(shlex.split(line)[1:]) for line in printed] == called


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"eval_episodes": 7}, ["d4_eval", "d4_eval"]),
        ({"scale": 0.5}, ALL[3:]),
        ({"labelled": 0.5}, ALL),
        ({"jobs": 2}, []),
        ({"force": True}, []),
    ],
)
def test_changed_arguments_redo_what_depends_on_them(chain: Chain, changes, redone) -> None:
    chain.run()
    assert chain.run(**changes) == (0, redone)


def test_what_other_arguments_made_is_cleared_and_a_trained_run_is_kept_once(chain: Chain) -> None:
    chain.run()
    (chain.out / "run" / "mark").write_text("first")
    (chain.out / "bags" / "old").write_text("")
    chain.run(labelled=0.5)
    assert not (chain.out / "bags" / "old").exists()
    assert (chain.out / "bags" / "made").exists()
    assert not (chain.out / "run" / "mark").exists()
    assert (chain.out / "run.previous" / "mark").read_text() == "first"


def test_a_moved_folder_is_still_done(chain: Chain) -> None:
    chain.run()
    chain.out.rename(chain.folder / "moved")
    assert chain.run(out=chain.folder / "moved") == (0, [])


def test_a_failed_gate_stops_with_its_code_and_the_next_run_goes_on_there(
    chain: Chain, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("FAKE_dynamics", "2")
    assert chain.run() == (2, ALL[:6])
    said = capfd.readouterr()
    assert "error: gate failed" in said.err
    assert "stopped in stage dynamics: d4-train ended with exit code 2" in said.out
    assert chain.run() == (2, ["dynamics"])
    monkeypatch.setenv("FAKE_dynamics", "0")
    assert chain.run() == (0, ALL[5:])


def test_forced_gates_count_as_done_only_with_force(chain: Chain, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_agent", "2")
    assert chain.run(force=True) == (0, ALL)
    assert chain.run(force=True) == (0, [])
    assert chain.run() == (2, ALL[2:8])


def test_an_audit_error_stops_unless_forced(chain: Chain, monkeypatch, capfd) -> None:
    monkeypatch.setenv("FAKE_d4_audit", "1")
    assert chain.run() == (1, ALL[:3])
    assert chain.run(force=True)[0] == 0
    assert "the audit found errors" in capfd.readouterr().out


def test_a_killed_command_is_named(chain: Chain, monkeypatch, capfd) -> None:
    monkeypatch.setenv("FAKE_d4_ingest", "killed")
    assert chain.run()[0] == 128 + signal.SIGKILL
    assert "d4-ingest was killed by signal 9" in capfd.readouterr().out


@pytest.mark.parametrize(("number", "passed"), [(signal.SIGINT, 2), (signal.SIGTERM, 15), (signal.SIGHUP, 2)])
def test_a_signal_reaches_the_child_once_and_the_same_command_continues(chain: Chain, number, passed) -> None:
    program = (
        "import sys; from d4_sim import demo, stages; "
        f"stages.MODULES = {chain.modules!r}; "
        f"sys.argv = ['d4-demo', '--out', {str(chain.out)!r}, '--episodes', '50']; demo.main()"
    )
    env = os.environ | {"FAKE_dynamics": "wait"}
    pipe = subprocess.PIPE
    # whoever runs the tests under nohup has SIGHUP ignored, and children inherit that
    program = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); {program}"
    child = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=pipe, stderr=pipe, text=True)
    for line in child.stdout:
        if line == "waiting\n":
            break
    time.sleep(0.1)
    child.send_signal(number)
    rest, said = child.communicate(timeout=20)
    assert child.returncode == 128 + number
    assert f"saved after {passed}" in rest
    assert said == "stopped; what is done is kept and the same command continues\n"
    assert not json.loads((chain.out / "stages.json").read_text())["dynamics"]["done"]
    assert chain.run() == (0, ALL[5:])


def test_an_ignored_hangup_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stages.handled_by(lambda number, frame: None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_estimate_follows_what_was_measured(tmp_path: Path) -> None:
    args = Args(out=tmp_path)
    planned = plan(args, 1)
    state = State(args.out, planned, own_keys(args), force=False)
    total, first = sum(stage.typical_s for stage in planned), planned[0].typical_s
    assert state.left_s() == pytest.approx(total)
    state.note(planned[0], 2 * first, done=True)
    assert state.left_s() == pytest.approx(2 * (total - first))
    state.note(planned[1], 10.0, done=False)
    assert state.left_s() == pytest.approx(2 * (total - first) - 10.0)


def test_estimates_shrink_with_the_sizes_they_depend_on() -> None:
    full = {s.name: s.typical_s for s in plan(Args(), 1)}
    tiny = {s.name: s.typical_s for s in plan(Args(episodes=20, scale=0.01, eval_episodes=2), 1)}
    assert all(tiny[name] < full[name] for name in full)
    assert sum(full.values()) < 28 * 60  # as measured on two idle cores


def test_every_phase_and_policy_has_its_place() -> None:
    lines = [line for stage in plan(Args(), 1) for line in stage.commands]
    trained = [line[line.index("--phases") + 1] for line in lines if line[0] == "d4-train"]
    shown = [line[line.index("--phase") + 1] for line in lines if line[0] == "d4-rollout"]
    driven = [word for line in lines if line[0] == "d4-eval" for word in line if word in report.POLICIES]
    assert trained == shown == list(report.PHASES)
    assert driven == list(report.POLICIES)


def test_keys_depend_on_arguments_but_not_on_place_speed_or_force() -> None:
    plain = own_keys(Args())
    assert plain == own_keys(Args(out=Path("elsewhere"), jobs=7, force=True))
    assert not set(plain.values()) & set(own_keys(Args(seed=1)).values())


def test_command_spells_options() -> None:
    words = command("d4-x", Path("a b"), many=("p", "q"), yes=True, no=False, some_number=0.5)
    assert words == ("d4-x", "a b", "--many", "p", "q", "--yes", "--some-number", "0.5")


@pytest.mark.parametrize(
    "wrong",
    [{"episodes": 0}, {"eval_episodes": 0}, {"scale": 0.0}, {"scale": float("nan")}, {"labelled": 0.0},
     {"labelled": 1.5}, {"jobs": 0}, {"seed": -1}],
)  # fmt: skip
def test_useless_arguments_are_refused_at_once(wrong) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        demo._check(Args(**wrong))


def test_a_full_disk_is_said_before_the_work(chain: Chain) -> None:
    with pytest.raises(UserError, match="GB are needed"):
        chain.run(episodes=10**10)


def test_damaged_notes_are_one_sentence(chain: Chain) -> None:
    chain.out.mkdir()
    (chain.out / "stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages\.json is damaged"):
        chain.run()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
