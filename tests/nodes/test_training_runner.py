"""Training as child processes: the real commands at a tiny scale, and children that misbehave by a script."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from d4_datasets import progress as of_ingest
from d4_datasets.errors import UserError
from d4_nodes.training import Goal, Progress, Training, _read_ingest, newest_checkpoint

ROOT = Path(__file__).parents[2]
# `nano` for the pictures of the yard, small enough for a hundred steps in a second or two
TINY = (
    "--force", "--device", "cpu", "--procs", "1", "--set",
    "num_tokens=2", "num_latents=4", "latent_dim=4", "tokenizer.time_every=2", "tokenizer.depth=2",
    "tokenizer.dim=16", "tokenizer.context=4", "tokenizer_training.batch=8", "tokenizer_training.length=4",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "bags"
    command = [sys.executable, "-m", "d4_sim.record", "--world", "yard", "--episodes", "6", "--jobs", "1"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    return out


def goal(bags: Path, out: Path, steps: int) -> Goal:
    contract = str(ROOT / "sim" / "d4_sim" / "yard.yaml")
    settings = (*TINY, f"tokenizer_training.steps={steps}")
    return Goal(
        bags=(str(bags),), contract=contract, out=str(out), phase="tokenizer", preset="nano",
        overrides=settings,
    )  # fmt: skip


def train(goal: Goal, stop_at: int | None = None, **options) -> tuple[Training, list[Progress]]:
    """Run a goal, with a request to stop when a step is reached."""
    training = Training(goal, sys.executable, lambda line: None, **options)
    seen = []
    for progress in training.run():
        seen.append(progress)
        if stop_at is not None and progress.stage != "ingest" and progress.step >= stop_at:
            training.stop()
    return training, seen


# -- the real commands --


def test_bags_become_a_checkpoint_with_rising_steps(bags: Path, tmp_path: Path) -> None:
    said: list[str] = []
    wanted = goal(bags, tmp_path / "run", 300)
    training = Training(wanted, sys.executable, said.append)
    seen = list(training.run())
    assert seen[0] == Progress("ingest", 0, 100)
    steps = [progress.step for progress in seen if progress.stage == "tokenizer"]
    assert len(steps) > 1
    assert steps == sorted(set(steps))
    assert steps[-1] == 300
    last = seen[-1]
    assert (last.steps, last.seconds_left) == (300, 0.0)
    assert last.values["pixels"] > 0
    assert last.values["frames_per_s"] > 0
    outcome = training.outcome
    assert outcome.success
    assert outcome.message == "tokenizer is trained; next: the same goal with phase dynamics"
    assert Path(outcome.checkpoint) == tmp_path / "run" / "tokenizer"
    assert (tmp_path / "run" / "tokenizer" / "weights.safetensors").exists()
    assert said[0].startswith("$ d4-ingest ")
    assert any(line.startswith("tokenizer 300/300 ") for line in said)  # and the gates behind it
    assert any(line.strip().startswith("FAILED PSNR") for line in said)


def test_the_same_goal_goes_on_where_it_was_stopped(bags: Path, tmp_path: Path) -> None:
    wanted = goal(bags, tmp_path / "run", 100_000)
    training, seen = train(wanted, stop_at=20)
    outcome = training.outcome
    assert (outcome.success, outcome.stopped) == (False, True)
    assert outcome.checkpoint == str(tmp_path / "run" / "tokenizer")
    words = outcome.message.split()
    saved = int(words[words.index("step") + 1])
    assert saved >= 20
    assert outcome.message == (
        f"stopped; tokenizer is saved at step {saved} of 100000, the same goal goes on from there"
    )
    assert seen[-1].seconds_left > 0
    _, again = train(wanted, stop_at=1)
    assert next(progress.step for progress in again if progress.stage == "tokenizer") > saved


def test_what_d4_train_says_is_the_message(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    training, seen = train(Goal(dataset=str(missing), out=str(tmp_path / "run")))
    assert seen == []
    assert not training.outcome.success
    assert training.outcome.message == (
        f"{missing} is not a d4 dataset: meta/info.json is missing; make one with d4-ingest"
    )
    assert training.outcome.checkpoint == ""


def test_what_is_wrong_with_an_option_is_the_message(tmp_path: Path) -> None:
    training, _ = train(Goal(dataset="data", out=str(tmp_path / "run"), preset="huge"))
    assert training.outcome.message.startswith("d4-train: ")
    assert "invalid choice 'huge' for argument '--preset'" in training.outcome.message
    assert "│" not in training.outcome.message


def test_bad_bags_are_said_by_d4_ingest(tmp_path: Path) -> None:
    contract = str(ROOT / "sim" / "d4_sim" / "yard.yaml")
    wanted = Goal(bags=(str(tmp_path / "none"),), contract=contract, out=str(tmp_path / "run"))
    training, _ = train(wanted)
    assert str(tmp_path / "none") in training.outcome.message
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_lines_of_the_real_ingest_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(of_ingest, "_SAY_EVERY_S", 0.005)
    with of_ingest.Shown({tmp_path / "a": 100, tmp_path / "b": 300}) as shown:
        shown._began -= 6
        shown.finish(tmp_path / "a", 1234)
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert _read_ingest(["reading", *lines]) == Progress("ingest", 25, 100, 18.0, {"frames": 1234.0})
    assert _read_ingest(["1 bags -> 6 episodes"]) is None


# -- goals --


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": ""}, "`out` is empty"),
        ({"dataset": ""}, "give either `dataset`, or `bags`"),
        ({"bags": ("b",)}, "give either `dataset`, or `bags`"),
        ({"dataset": "", "bags": ("b",)}, "`bags` need a `contract`"),
        ({"phase": "tokeniser"}, "choose tokenizer, dynamics, agent, imagination or all"),
        ({"overrides": ("--run=elsewhere",)}, "--run=elsewhere does not belong into `overrides`"),
    ],
)
def test_a_goal_that_makes_no_sense_is_refused(changes: dict, said: str) -> None:
    wanted = Goal(**{"dataset": "d", "out": "o", **changes})
    with pytest.raises(UserError, match=said):
        wanted.check()
    training, seen = train(wanted)
    assert said in training.outcome.message
    assert seen == []


# -- children that misbehave --


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the d4-train of this folder do what a script says; `python -m` finds it there first."""

    def write(code: str) -> Goal:
        package = tmp_path / "fake" / "d4_core"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "train.py").write_text("import os, signal, sys, time\n" + textwrap.dedent(code))
        monkeypatch.chdir(tmp_path / "fake")
        return Goal(dataset="data", out=str(tmp_path / "run"), phase="agent")

    return write


def test_options_are_arguments_and_paths_are_expanded(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/of/ros")
    script("print(sys.argv[1:]); print('PYTHONPATH', repr(os.environ['PYTHONPATH']))")
    said: list[str] = []
    wanted = Goal(dataset="~/a b", out="~/run", overrides=("--set", "x=$(echo 1); y", "*"))
    training = Training(wanted, sys.executable, said.append)
    assert list(training.run()) == []
    arguments = [f"{tmp_path}/a b", "--run", f"{tmp_path}/run", "--set", "x=$(echo 1); y", "*"]
    assert said[1:] == [repr(arguments), "PYTHONPATH ''"]
    assert training.outcome.message == "d4-train ended without imagination: see `overrides`"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('error: one sentence', file=sys.stderr); sys.exit(2)", "one sentence"),
        ("raise RuntimeError('a bug')", "d4-train ended with exit code 1: RuntimeError: a bug"),
        ("os.kill(os.getpid(), 9)", "d4-train was killed by signal 9 (9 often means that memory ran out)"),
        ("sys.exit(3)", "d4-train ended with exit code 3: it did not say why"),
        ("import d4_nothing", f"{sys.executable} cannot run d4-train (ModuleNotFoundError: No module named"),
    ],
)
def test_how_a_child_ended_is_one_sentence(script, code: str, said: str) -> None:
    training, _ = train(script(code))
    assert training.outcome.message.startswith(said)
    assert not training.outcome.success


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    training = Training(Goal(dataset="d", out=str(tmp_path / "run")), "/no/python")
    assert list(training.run()) == []
    assert training.outcome.message.startswith("/no/python cannot be started (No such file or directory)")


def test_a_child_that_does_not_stop_is_killed(script) -> None:
    training, started = follow(script("signal.signal(signal.SIGINT, signal.SIG_IGN); " + WAIT), stop_s=0.3)
    assert started
    assert training.outcome.message.startswith("it did not stop within 0.3 s and was killed; stopped before")


WAIT = "print('pid', os.getpid(), flush=True); time.sleep(60)"


def follow(wanted: Goal, stop_s: float = 30.0) -> tuple[Training, list[int]]:
    """Run a child that prints its process id, and stop it when it has."""
    started: list[int] = []

    def say(line: str) -> None:
        if line.startswith("pid"):
            started.append(int(line.split()[1]))
            training.stop()

    training = Training(wanted, sys.executable, say, stop_s)
    list(training.run())
    return training, started


def test_a_stop_reaches_the_child_of_a_background_job(script) -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's & does
    try:
        began = time.monotonic()
        training, started = follow(script(WAIT))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert started
    assert time.monotonic() - began < 15
    assert training.outcome.message.startswith("stopped before the first checkpoint")


def test_a_stop_before_the_start_starts_nothing(tmp_path: Path) -> None:
    training = Training(Goal(dataset="d", out=str(tmp_path / "run")), "/no/python")
    training.stop()
    assert list(training.run()) == []
    assert training.outcome.message.startswith("stopped before the first checkpoint")


def test_closing_the_iterator_ends_the_child(bags: Path, tmp_path: Path) -> None:
    pids: set[int] = set()
    before = set(children(os.getpid()))  # of other tests, such as a tracker of shared resources
    wanted = goal(bags, tmp_path / "run", 100_000)
    training = Training(wanted, sys.executable, lambda line: None)
    with contextlib.closing(training.run()) as stages:
        for progress in stages:
            if progress.stage == "tokenizer":
                pids = set(children(os.getpid())) - before
                break
    assert pids
    assert not any(is_alive(pid) for pid in pids)


def children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = status.read_text()
            if int(text.rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(status.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_the_child_dies_with_a_killed_parent(script, tmp_path: Path) -> None:
    wanted = script("signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WAIT)
    parent = f"""
        from d4_nodes.training import Goal, Training
        goal = Goal(dataset="d", out={wanted.out!r}, phase="agent")
        say = lambda line: print(line, flush=True)
        list(Training(goal, {sys.executable!r}, say).run())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
        assert is_alive(pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 5
        while is_alive(pid):
            assert time.monotonic() < end, "the child outlives its parent"
            time.sleep(0.01)


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for number, name in enumerate(("dynamics", "tokenizer", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        os.utime(tmp_path / name / "config.json", (number, number))
    assert newest_checkpoint(tmp_path) == tmp_path / "tokenizer"
