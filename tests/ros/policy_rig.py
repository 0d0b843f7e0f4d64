"""A policy node in a process of its own, a scripted server, and everything around them as one ROS node."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from d4_interfaces.msg import PolicyStatus
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Twist
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState, Joy
from std_msgs.msg import Bool, Float64MultiArray

from d4_nodes.ros import qos

NODES = Path(__file__).parents[1] / "nodes"
ROBOT = NODES / "robot.yaml"
SERVER_PYTHON = os.environ.get("D4_PYTHON", sys.executable)
PERIOD_S = 0.05
TWO_PERIODS_S = 2 * PERIOD_S
SLACK_S = 0.06  # of a machine that is busy, and of messages on their way


class Server:
    """A scripted server process."""

    def __init__(self, folder: Path, weights: str = "w0", robot: Path = ROBOT) -> None:
        self.socket, self.faults = folder / "d4.sock", folder / "fault"
        command = [
            SERVER_PYTHON,
            str(NODES / "scripted_server.py"),
            str(robot),
            str(self.socket),
            str(self.faults),
        ]
        environment = {**os.environ, "PYTHONPATH": ""}
        self.process = subprocess.Popen([*command, weights], stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), "the server did not start"

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(10)


class PolicyProcess:
    """The policy node."""

    def __init__(self, folder: Path, *arguments: str, name: str = "policy") -> None:
        self.folder, self.log = folder, folder / f"{name}-{time.monotonic_ns()}.log"
        parameters = {"contract": str(ROBOT), "socket": str(folder / "d4.sock"), "server_wait_s": 5.0,
                      "report_folder": str(folder / "reports")}  # fmt: skip
        command = [sys.executable, "-m", "d4_nodes.ros.policy_node", "--ros-args"]
        for key, value in parameters.items():
            command += ["-p", f"{key}:={value}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(15)

    def said(self) -> str:
        return self.log.read_text()

    def reports(self) -> list[Path]:
        return sorted((self.folder / "reports").glob("*.json"))


class World:
    """Camera, joints, motors and operator as one node; times are this process's."""

    def __init__(self, namespace: str = "", node: str = "policy", simulated: bool = False) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("world", context=self.context, namespace=namespace)
        self.target, self.simulated = node, simulated
        self.offset_ns, self.pause, self.freeze, self.encoding = 0, False, False, "rgb8"
        self.say_joints = True
        self.size, self.pixel = (8, 12), 3  # bytes of one
        self.twists: list[tuple[int, float, float]] = []
        self.sent: list[int] = []  # when each twist left the node, whatever kept this process from looking
        self.arms: list[tuple[int, float]] = []
        self.status: list[PolicyStatus] = []
        self.diagnostics: dict[str, tuple[int, str]] = {}
        n = self.node
        self.eye = n.create_publisher(Image, "eye", qos.sensor())
        self.joints = n.create_publisher(JointState, "joints", qos.EVENT)
        self.joy = n.create_publisher(Joy, "joy", qos.EVENT)
        self.stop = n.create_publisher(Bool, "emergency_stop", qos.EVENT)
        self.clock = n.create_publisher(Clock, "/clock", qos.sensor())
        n.create_subscription(Twist, "cmd_vel", self._on_twist, qos.EVENT)
        n.create_subscription(Float64MultiArray, "arm", self._on_arm, qos.EVENT)
        n.create_subscription(PolicyStatus, f"{node}/status", self.status.append, qos.LATCHED)
        n.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, qos.EVENT)
        self._clients: dict[str, Any] = {}
        self._ended = threading.Event()
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(n)
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._spin, self._camera)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(5)
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def _spin(self) -> None:
        try:
            while not self._ended.is_set():
                self._executor.spin_once(timeout_sec=0.05)
        except ExternalShutdownException:
            pass

    def now(self) -> int:
        return time.time_ns() + self.offset_ns

    def _camera(self) -> None:
        rng, number, due = np.random.default_rng(0), 0, time.monotonic()
        pictures = rng.integers(0, 256, (16, 4096), np.uint8)
        while not self._ended.is_set():
            if self.simulated:
                while time.monotonic() < due and not self._ended.is_set():
                    time.sleep(0.002)
                    stamp = Clock()
                    stamp.clock.sec, stamp.clock.nanosec = divmod(self.now(), 10**9)
                    self.clock.publish(stamp)
            elif self._ended.wait(max(0.0, due - time.monotonic())):
                return
            due += PERIOD_S
            if not self.pause:
                self.see(pictures[0 if self.freeze else number % 16])
            number += 1

    def see(self, noise: np.ndarray) -> None:
        """Joints and a picture, captured now."""
        height, width = self.size
        sec, nanosec = divmod(self.now(), 10**9)
        if self.say_joints:
            self.joints.publish(self.joint_state(sec, nanosec))
        step = self.pixel * width
        image = Image(height=height, width=width, step=step, encoding=self.encoding)
        image.data = np.resize(noise, height * step).tobytes()
        image.header.stamp.sec, image.header.stamp.nanosec = sec, nanosec
        self.eye.publish(image)

    @staticmethod
    def joint_state(sec: int, nanosec: int) -> JointState:
        joints = JointState(name=["b", "a"], position=[0.1, 0.2])
        joints.header.stamp.sec, joints.header.stamp.nanosec = sec, nanosec
        return joints

    def _on_twist(self, msg: Twist, info: Any) -> None:
        self.twists.append((time.time_ns(), msg.linear.x, msg.angular.z))
        self.sent.append(info["source_timestamp"])

    def _on_arm(self, msg: Float64MultiArray) -> None:
        self.arms.append((time.time_ns(), msg.data[0]))

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            self.diagnostics[status.name] = (status.level[0], status.message)

    # -- what a test does --

    def call(self, type_: Any, name: str, request: Any, timeout_s: float = 20.0) -> Any:
        client = self._clients.get(name) or self.node.create_client(type_, name)
        self._clients[name] = client
        assert client.wait_for_service(timeout_s), f"no service {name}"
        future = client.call_async(request)
        self.until(future.done, timeout_s)
        return future.result()

    def change(self, transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return bool(self.call(ChangeState, f"{self.target}/change_state", request).success)

    def state(self) -> str:
        return str(self.call(GetState, f"{self.target}/get_state", GetState.Request()).current_state.label)

    def configure(self) -> bool:
        return self.change(Transition.TRANSITION_CONFIGURE)

    def activate(self) -> bool:
        return self.change(Transition.TRANSITION_ACTIVATE)

    def deactivate(self) -> bool:
        return self.change(Transition.TRANSITION_DEACTIVATE)

    def cleanup(self) -> bool:
        return self.change(Transition.TRANSITION_CLEANUP)

    def set(self, name: str, value: Any) -> tuple[bool, str]:
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        result = self.call(SetParameters, f"{self.target}/set_parameters", request).results[0]
        return result.successful, result.reason

    @staticmethod
    def until(condition: Any, timeout_s: float = 10.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.002)

    def until_state(self, state: str, timeout_s: float = 10.0) -> PolicyStatus:
        self.until(lambda: self.status and self.status[-1].state == state, timeout_s)
        return self.status[-1]

    def zero_after_s(self, since_ns: int) -> float:
        """Seconds from a moment to the first command at rest after it, which may still be on its way."""
        self.until(lambda: any(t > since_ns and x == 0 == z for t, x, z in self.twists), 5)
        return next(t - since_ns for t, x, z in self.twists if t > since_ns and x == 0 == z) / 1e9
