"""The training node as a process, with the real d4-train at a tiny scale."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

rclpy = pytest.importorskip("rclpy")

from action_msgs.msg import GoalStatus  # noqa: E402
from d4_interfaces.action import Train  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rcl_interfaces.srv import GetParameters  # noqa: E402
from rclpy.action import ActionClient  # noqa: E402
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor  # noqa: E402

pytestmark = pytest.mark.ros

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "sim" / "d4_sim" / "yard.yaml"
TRAIN_PYTHON = os.environ.get("D4_PYTHON", sys.executable)
TINY = [
    "--force", "--device", "cpu", "--procs", "1", "--set",
    "num_tokens=2", "num_latents=4", "latent_dim=4", "tokenizer.time_every=2", "tokenizer.depth=2",
    "tokenizer.dim=16", "tokenizer.context=4", "tokenizer_training.batch=8", "tokenizer_training.length=4",
]  # fmt: skip
LONG = [*TINY, "tokenizer_training.steps=100000"]
SHORT = [*TINY, "tokenizer_training.steps=200"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    environment = {**os.environ, "PYTHONPATH": ""}
    record = ["-m", "d4_sim.record", "--world", "yard", "--episodes", "6", "--jobs", "1"]
    ingest = ["-m", "d4_datasets.ingest", str(folder / "bags"), "--contract", str(CONTRACT), "--jobs", "1"]
    for words in ([*record, "--out", str(folder / "bags")], [*ingest, "--out", str(folder / "dataset")]):
        subprocess.run([TRAIN_PYTHON, *words], env=environment, check=True, capture_output=True)
    return folder / "dataset"


class Process:
    """The node."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / f"node-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "d4_nodes.ros.training_node", "--ros-args"]
        command += ["-p", f"server_python:={TRAIN_PYTHON}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def said(self) -> str:
        return self.log.read_text()


class Client:
    """Sends goals to a node that runs, and keeps what comes back."""

    def __init__(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("client", context=self.context)
        self.action = ActionClient(self.node, Train, "training/train")
        self.parameters = self.node.create_client(GetParameters, "training/get_parameters")
        self.feedback: list = []
        self.diagnostics: list = []
        self.node.create_subscription(
            DiagnosticArray, "/diagnostics", lambda m: self.diagnostics.extend(m.status), 10
        )
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        assert self.action.wait_for_server(20), "the node did not start"

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def close(self) -> None:
        rclpy.shutdown(context=self.context)
        self._thread.join(5)

    def send(self, **fields):
        """The handle of a goal, accepted or not; sent where its answer is taken: rclpy loses a quick one."""
        self.feedback = []
        goal = Train.Goal(**{"phase": "tokenizer", **fields})
        send = functools.partial(
            self.action.send_goal_async, goal, lambda m: self.feedback.append(m.feedback)
        )
        return wait_for(wait_for(self._executor.create_task(send)))

    def _hear(self, message) -> None:
        self.feedback.append(message.feedback)

    def until(self, condition, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)


def wait_for(future, timeout_s: float = 60.0):
    end = time.monotonic() + timeout_s
    while not future.done():
        assert time.monotonic() < end, "no answer in time"
        time.sleep(0.01)
    return future.result()


@pytest.fixture
def node(tmp_path):
    process = Process(tmp_path)
    yield process
    if process.process.poll() is None:
        process.end()


@pytest.fixture
def client(node):
    client = Client()
    yield client
    client.close()


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def saved_step(run: Path) -> int:
    return json.loads((run / "tokenizer" / "config.json").read_text())["step"]


def test_a_goal_trains_while_the_node_answers(node, client, dataset, tmp_path):
    run = tmp_path / "run"
    handle = client.send(dataset=str(dataset), out=str(run), overrides=SHORT)
    assert handle.accepted
    result = handle.get_result_async()
    slowest = 0.0
    while not result.done():
        began = time.monotonic()
        wait_for(client.parameters.call_async(GetParameters.Request(names=["stop_s"])), 10)
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    assert slowest < 1.0, "the training holds the executor up"
    answer = result.result()
    assert answer.status == GoalStatus.STATUS_SUCCEEDED
    assert answer.result.success
    assert answer.result.checkpoint == str(run / "tokenizer")
    assert answer.result.message == "tokenizer is trained; next: the same goal with phase dynamics"
    assert (run / "tokenizer" / "weights.safetensors").exists()
    steps = [feedback.step for feedback in client.feedback]
    assert len(steps) > 1
    assert steps == sorted(set(steps))
    assert {(f.stage, f.steps) for f in client.feedback} == {("tokenizer", 200)}
    assert dict(zip(client.feedback[-1].names, client.feedback[-1].values, strict=True))["pixels"] > 0
    client.until(lambda: client.diagnostics[-1].message == answer.result.message)
    assert any(status.message.startswith("tokenizer, step ") for status in client.diagnostics)


def test_after_a_cancel_the_same_goal_goes_on(node, client, dataset, tmp_path):
    run = tmp_path / "run"
    handle = client.send(dataset=str(dataset), out=str(run), overrides=LONG)
    client.until(lambda: client.feedback and client.feedback[-1].step >= 20)
    second = client.send(dataset=str(dataset), out=str(tmp_path / "other"), overrides=LONG)
    assert not second.accepted
    client.until(lambda: "a goal was rejected: another goal is being trained" in node.said())
    wait_for(handle.cancel_goal_async())
    answer = wait_for(handle.get_result_async())
    assert answer.status == GoalStatus.STATUS_CANCELED
    saved = saved_step(run)
    assert saved >= 20
    assert answer.result.checkpoint == str(run / "tokenizer")
    assert f"saved at step {saved} of 100000, the same goal goes on" in answer.result.message
    handle = client.send(dataset=str(dataset), out=str(run), overrides=LONG)
    client.until(lambda: client.feedback)
    assert client.feedback[0].step > saved
    wait_for(handle.cancel_goal_async())
    wait_for(handle.get_result_async())
    assert saved_step(run) > saved


def test_a_bad_dataset_is_one_sentence(node, client, tmp_path):
    handle = client.send(dataset=str(tmp_path / "none"), out=str(tmp_path / "run"))
    answer = wait_for(handle.get_result_async())
    assert answer.status == GoalStatus.STATUS_ABORTED
    assert answer.result.message == (
        f"{tmp_path}/none is not a d4 dataset: meta/info.json is missing; make one with d4-ingest"
    )
    assert answer.result.checkpoint == ""
    client.until(lambda: client.diagnostics and client.diagnostics[-1].level == b"\x02")
    handle = client.send(out=str(tmp_path / "run"))  # and it is ready for the next
    message = wait_for(handle.get_result_async()).result.message
    assert message == "give either `dataset`, or `bags` and `contract`"


def test_the_end_of_the_node_is_a_cancel(node, client, dataset, tmp_path):
    run = tmp_path / "run"
    handle = client.send(dataset=str(dataset), out=str(run), overrides=LONG)
    client.until(lambda: client.feedback)
    pids = children(node.process.pid)
    answer = handle.get_result_async()
    assert node.end(signal.SIGINT) == 0
    assert "the same goal goes on from there" in wait_for(answer, 5).result.message
    assert saved_step(run) >= client.feedback[0].step
    assert pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_killed_node_leaves_no_child(node, client, dataset, tmp_path):
    client.send(dataset=str(dataset), out=str(tmp_path / "run"), overrides=LONG)
    client.until(lambda: client.feedback)
    pids = children(node.process.pid)
    assert pids
    node.end(signal.SIGKILL)
    client.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5)


def test_by_the_command_line(node, dataset, tmp_path):
    goal = {"dataset": str(dataset), "out": str(tmp_path / "run"), "phase": "tokenizer", "overrides": SHORT}
    command = ["ros2", "action", "send_goal", "--feedback", "/training/train", "d4_interfaces/action/Train"]
    done = subprocess.run([*command, json.dumps(goal)], capture_output=True, text=True, timeout=90)
    assert "Goal finished with status: SUCCEEDED" in done.stdout
    assert "stage: tokenizer\nstep: " in done.stdout.replace("    ", "")
    assert f"checkpoint: {tmp_path}/run/tokenizer" in done.stdout


@pytest.mark.skipif(shutil.which("ros2") is None, reason="needs ros2 launch")
def test_the_launch_file_trains_and_ends(dataset, tmp_path):
    command = ["ros2", "launch", "d4_bringup", "train.launch.py", f"server_python:={TRAIN_PYTHON}"]
    goal = [f"out:={tmp_path}/run", "phase:=tokenizer", "overrides:=" + " ".join(SHORT)]
    done = subprocess.run(
        [*command, f"dataset:={dataset}", *goal], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert saved_step(tmp_path / "run") == 200
    done = subprocess.run([*command, "dataset:=/none", *goal], capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "/none is not a d4 dataset" in done.stdout + done.stderr
