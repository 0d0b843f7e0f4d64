"""The tokenizer node over real topics: pictures in, the latents of training out, into a bag and out of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytestmark = pytest.mark.ros

from d4_interfaces.msg import Latents  # noqa: E402
from policy_rig import ROBOT, SERVER_PYTHON, World  # noqa: E402
from rcl_interfaces.srv import DescribeParameters, ListParameters  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from sensor_msgs.msg import Image, JointState  # noqa: E402
from std_msgs.msg import Int64  # noqa: E402

from d4_datasets import latents  # noqa: E402

SCRIPT = Path(__file__).with_name("tokenizer_run.py")
FRAMES, PERIOD_S = 8, 0.05  # more frames than the tokenizer's window of 4 holds
ENVIRONMENT = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
START = "episode: {start: {topic: /episode, type: std_msgs/msg/Int64, select: data}}\n"


def by_torch(*command: object) -> str:
    done = subprocess.run(
        [SERVER_PYTHON, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An untrained run for the toy robot with episodes, pictures, and what training makes of them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "robot.yaml").write_text(ROBOT.read_text() + START)
    by_torch(SCRIPT, "make", folder / "robot.yaml", folder, FRAMES)
    return folder


class Server:
    def __init__(self, made: Path, socket: Path) -> None:
        command = [SERVER_PYTHON, "-m", "d4_nodes.server", str(made / "run"), "--tokenizer"]
        command += ["--socket", str(socket), "--threads", "1", "--device", "cpu"]
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), "the server did not start"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


class Rig(World):
    """A camera that shows what it is told, whoever asks for latents, and the node between them."""

    def __init__(self, made: Path, folder: Path, namespace: str = "", **parameters: object) -> None:
        super().__init__(namespace, node="tokenizer")
        self.pause, self.folder, self.made = True, folder, made
        self.got: list[Latents] = []
        self.node.create_subscription(Latents, "eye/latents", self.got.append, QoSProfile(depth=50))
        self.start_topic = self.node.create_publisher(Int64, "episode", 10)
        self.data = np.load(made / "episodes.npz")
        values = {"contract": made / "robot.yaml", "socket": made / "d4.sock", "server_wait_s": 2.0}
        command = [
            sys.executable,
            "-m",
            "d4_nodes.ros.tokenizer_node",
            "--ros-args",
            "-r",
            f"__ns:=/{namespace}",
        ]
        for name, value in {**values, **parameters}.items():
            command += ["-p", f"{name}:={value}"]
        self.log = folder / "node.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def up(self) -> None:
        assert self.configure(), self.log.read_text()
        assert self.activate(), self.log.read_text()
        for topic in (self.eye, self.joints, self.start_topic):
            self.until(topic.get_subscription_count)
        self.until(lambda: self.node.count_publishers("eye/latents"))
        self.until(lambda: self.diagnostics.get("tokenizer: inference server", (9, ""))[0] == 0)

    def show(self, number: int, cut: int = 0) -> int:
        """Joints and picture `number`, captured now; returns the stamp, ns."""
        stamp = time.time_ns()
        joints = JointState(name=["a", "b"], position=self.data["joints"][number].astype(float).tolist())
        image = Image(height=8, width=12, step=36, encoding="rgb8")
        image.data = self.data["eye"][number].tobytes()[: 288 - cut]
        image.header.frame_id = "lens"
        for msg in (joints, image):
            msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(stamp, 10**9)
        self.joints.publish(joints)
        time.sleep(0.012)  # topics do not wait for each other
        self.eye.publish(image)
        return stamp

    def drive(self) -> list[int]:
        """Both episodes; returns the stamps."""
        stamps, due = [], time.monotonic()
        for number in range(2 * FRAMES):
            time.sleep(max(0.0, due - time.monotonic()))
            due += PERIOD_S
            stamps.append(self.show(number))
            if number % FRAMES == 0:
                time.sleep(0.005)
                self.start_topic.publish(Int64(data=number))
        return stamps

    def latest(self) -> dict[int, Latents]:
        """The last message of every stamp."""
        return {m.header.stamp.sec * 10**9 + m.header.stamp.nanosec: m for m in self.got}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(15)
        super().close()
        print(self.log.read_text())


@pytest.fixture(scope="module")
def server(made):
    """One for all tests that do not end it; it serves one node at a time."""
    server = Server(made, made / "d4.sock")
    yield server
    server.kill()


@pytest.fixture
def make(made, tmp_path):
    """Starts rigs; ends them."""
    rigs = []

    def start(*arguments, **parameters) -> Rig:
        rigs.append(Rig(made, tmp_path, *arguments, **parameters))
        return rigs[-1]

    yield start
    for rig in rigs:
        rig.close()


@pytest.mark.parametrize(
    ("namespace", "codec", "error"), [("", "float16", 2**-11), ("east", "uint8", 1 / 250)]
)
def test_the_camera_comes_out_as_the_latents_of_training(make, server, namespace, codec, error) -> None:
    rig = make(namespace, codec=codec)
    rig.up()
    stamps = rig.drive()
    rig.until(lambda: len(rig.got) >= 2 * FRAMES + 2)
    found = rig.latest()
    assert sorted(found) == stamps
    assert {m.header.frame_id for m in rig.got} == {"lens"}
    assert {m.codec for m in rig.got} == {codec}
    assert len(rig.got) == 2 * FRAMES + 2  # the first frame of each episode a second time, without a past
    values = np.stack([latents.unpack(found[stamp]) for stamp in stamps])
    np.testing.assert_allclose(values, rig.data["latents"], atol=error)
    rig.until(lambda: "tokenizer: eye" in rig.diagnostics)


def test_a_bag_becomes_a_dataset_with_the_same_latents(make, server, tmp_path) -> None:
    rig = make()
    rig.up()
    command = ["ros2", "bag", "record", "--storage", "mcap", "--output", str(tmp_path / "bags" / "one")]
    with (tmp_path / "record.log").open("w") as log:
        record = subprocess.Popen(
            [*command, "/eye/latents", "/joints", "/episode"], stdout=log, stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        rig.until(lambda: rig.node.count_subscribers("eye/latents") > 1, 20)
        rig.until(lambda: rig.start_topic.get_subscription_count() > 1, 20)
        rig.until(lambda: rig.joints.get_subscription_count() > 1, 20)
        rig.drive()
        rig.until(lambda: len(rig.got) >= 2 * FRAMES + 2)
        time.sleep(0.2)
    finally:
        record.send_signal(signal.SIGINT)
        record.wait(20)
    contract, out = rig.made / "robot.yaml", tmp_path / "data"
    said = by_torch("-m", "d4_datasets.ingest", tmp_path / "bags", "--contract", contract, "--out", out)
    assert "its frames are latents of tokenizer" in said
    said = by_torch(SCRIPT, "check", out, rig.made)
    episodes, weights, codec, difference = said.split()
    assert (episodes, weights, codec) == ("2", rig.got[0].weights, "float16")
    assert float(difference) < 2**-11


def test_a_lost_server_is_said_and_found_again(make, made, tmp_path) -> None:
    server = Server(made, tmp_path / "d4.sock")
    rig = make(socket=tmp_path / "d4.sock")
    rig.up()
    rig.show(0)
    rig.until(lambda: len(rig.got) == 1)
    server.kill()
    rig.until(lambda: rig.diagnostics["tokenizer: inference server"][0] == 2)
    rig.show(1)
    again = Server(made, tmp_path / "d4.sock")
    try:
        rig.until(lambda: len(rig.got) == 2)  # the newest picture waited for it
        rig.until(lambda: rig.diagnostics["tokenizer: inference server"][0] == 0)
        rig.show(2)
        rig.until(lambda: len(rig.got) == 3)
    finally:
        again.kill()


def test_a_damaged_picture_is_dropped_with_a_warning(make, server) -> None:
    rig = make()
    rig.up()
    for number, cut in enumerate((0, 1, 7, 0)):
        rig.show(number, cut)
        time.sleep(0.1)
    rig.until(lambda: len(rig.got) == 2)
    assert rig.log.read_text().count(": dropped") == 1  # and not twice within 5 s


def test_refusals_are_one_sentence(make, made, server, tmp_path) -> None:
    rig = make(codec="jpeg")
    assert not rig.configure()
    assert rig.set("codec", "uint8") == (True, "")
    assert rig.set("socket", str(tmp_path / "nowhere.sock")) == (True, "")
    assert not rig.configure()
    assert rig.set("socket", str(made / "d4.sock")) == (True, "")
    other = tmp_path / "other.yaml"
    other.write_text((made / "robot.yaml").read_text().replace("rate_hz: 20", "rate_hz: 21"))
    assert rig.set("contract", str(other)) == (True, "")
    assert not rig.configure()
    assert rig.set("contract", str(made / "robot.yaml")) == (True, "")
    assert rig.configure()
    assert rig.set("codec", "float16") == (False, "codec cannot change while the node is configured")
    said = rig.log.read_text()
    assert "`codec` is 'jpeg', not one of float16, uint8" in said
    assert "no inference server listens" in said
    assert "another contract (toy" in said
    assert "Traceback" not in said


def test_it_can_be_taken_down_and_up_again_and_ends_by_a_signal(make, server) -> None:
    rig = make()
    for number in range(2):
        rig.up()
        rig.show(number)
        rig.until(lambda n=number: len(rig.got) == n + 1)
        assert rig.deactivate()
        assert rig.cleanup()
        assert rig.state() == "unconfigured"
        rig.diagnostics.clear()
    rig.up()
    rig.process.send_signal(signal.SIGINT)
    assert rig.process.wait(10) == 0
    assert "Traceback" not in rig.log.read_text()


def test_the_launch_file_explains_its_arguments() -> None:
    command = ["ros2", "launch", "d4_bringup", "tokenizer.launch.py", "--show-args"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    names = ("run", "contract", "codec", "server_python", "socket", "autostart", "namespace", "use_sim_time")
    assert [name for name in names if f"'{name}':\n" not in said] == []
    assert "no description" not in said


def test_every_parameter_says_what_it_is(make) -> None:
    rig = make()
    names = rig.call(ListParameters, "tokenizer/list_parameters", ListParameters.Request()).result.names
    own = [n for n in names if not n.startswith(("qos_overrides", "start_type")) and n != "use_sim_time"]
    request = DescribeParameters.Request(names=own)
    found = rig.call(DescribeParameters, "tokenizer/describe_parameters", request).descriptors
    assert len(found) >= 7
    assert all(descriptor.description for descriptor in found)
