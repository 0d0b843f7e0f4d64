"""A simulated robot as a node: the contract's topics, as a real one would have them, by the clock.

Needs MuJoCo, so it runs with the Python that has d4 installed (`sim_python` of the launch file), the only
node that does. Starts, tasks and order are those of `d4-eval`, so that success rates can be compared.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock

from d4_datasets import fields
from d4_datasets.contract import Action, Contract
from d4_datasets.errors import UserError
from d4_nodes.report import can_write, write_json
from d4_nodes.ros import qos
from d4_nodes.ros.shell import Parameter, RosTypes, declare, local, message_class, spin
from d4_sim.evaluate import EVAL_SEED
from d4_sim.live import Frame, LiveWorld
from d4_sim.world import contract_text

PARAMETERS = (
    Parameter("world", "yard", "world of d4_sim"),
    Parameter("episodes", 0, "episodes until the node ends; 0: for ever", (0, 1_000_000)),
    Parameter("seed", 0, "decides the start states, as in d4-eval", (0, 10_000)),
    Parameter("results", "", "write return and success of every episode here, as JSON"),
    Parameter("speed", 1.0, "simulated seconds per second; other than 1 needs publish_clock", (0.05, 20)),
    Parameter("publish_clock", False, "be the clock: publish /clock and stamp with simulated time"),
    Parameter("wait_for_commands", True, "begin only when commands come"),
)

_SLICE_S = 0.002
_START_LEAD_NS = 12_000_000  # tick 0 comes so long after its frame was captured, as in recordings
_LAST_TO_FIRST_NS = 99_000_000  # from the last frame of an episode to the first of the next
_SIMULATED_START_NS = 1_000_000_000_000


class SimNode(Node):
    """Publishes what the contract observes, takes what it commands."""

    def __init__(self) -> None:
        super().__init__("sim")
        declare(self, PARAMETERS)
        self.contract = Contract.from_dict(yaml.safe_load(contract_text(self._get("world"))))
        self.live: LiveWorld | None = None  # made by the thread that draws it
        self._arrived: deque[tuple[np.ndarray, int]] = deque()
        self.ended, self.failed = threading.Event(), False
        self._types = RosTypes()
        self._is_clock, self._speed = bool(self._get("publish_clock")), float(self._get("speed"))
        if self._speed != 1.0 and not self._is_clock:
            raise UserError("a speed other than 1 needs publish_clock: other nodes could not tell")
        self._results = Path(os.path.expanduser(self._get("results"))) if self._get("results") else None
        if self._results is not None and not can_write(self._results.parent):
            raise UserError(f"results: nothing can be written in {self._results.parent}")
        if self._results is not None and self._results.is_dir():
            raise UserError(f"results: {self._results} is a folder, give a file")
        self._origin = time.monotonic_ns()
        self._topics: dict[str, Any] = {}
        self._last: dict[str, np.ndarray] = {
            c.name: np.zeros(c.dim, np.float32) for c in self.contract.actions
        }
        self._advertise()
        for channel in self.contract.actions:
            self.create_subscription(
                message_class(channel.type), local(channel.topic),
                functools.partial(self._on_command, channel), QoSProfile(depth=10),
            )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="world", daemon=True)
        self._thread.start()

    def _get(self, name: str) -> Any:
        return self.get_parameter(name).value

    def now(self) -> int:
        """The clock of this robot, ns: the system's, or its own if it publishes that."""
        if not self._is_clock:
            return time.time_ns()
        return _SIMULATED_START_NS + round((time.monotonic_ns() - self._origin) * self._speed)

    def secure(self) -> None:
        """Stop the world and write what was driven."""
        self.ended.set()
        self._thread.join(5)

    def _advertise(self) -> None:
        contract = self.contract
        entries: list[Any] = [*contract.observations, contract.tasks, contract.reward]
        entries += [contract.episode.start, contract.episode.terminal]
        for entry in entries:
            if entry is not None:
                sensor = entry in contract.observations
                profile = QoSProfile(depth=10) if sensor else qos.EVENT
                self._topics[entry.topic] = self.create_publisher(
                    message_class(entry.type), local(entry.topic), profile
                )
        if self._is_clock:
            self._clock_topic = self.create_publisher(Clock, "/clock", qos.sensor())

    def _on_command(self, channel: Action, msg: Any) -> None:
        try:
            self._last[channel.name] = fields.read(msg, channel.select).astype(np.float32)
        except UserError as error:
            self.get_logger().warning(f"{channel.topic}: {error}")
            return
        values = np.concatenate([self._last[c.name] for c in self.contract.actions])
        self._arrived.append((values, self.now()))

    # -- the world's own thread --

    def _run(self) -> None:
        try:
            self.live = LiveWorld(self._get("world"))
            self._wait_for_company()
            episodes, number, begin = self._get("episodes"), 0, self.now() + 500_000_000
            while not self.ended.is_set() and (episodes == 0 or number < episodes):
                begin = self._episode(number, begin) + _LAST_TO_FIRST_NS
                number += 1
                if number % 10 == 0 or number == episodes:
                    self.get_logger().info(self._summary())
        except Exception:
            self.failed = True
            self.get_logger().error(traceback.format_exc())
        try:
            self._write()
        except OSError as error:
            self.failed = True
            self.get_logger().error(f"the results cannot be written: {error}")
        self.ended.set()

    def _wait_for_company(self) -> None:
        if self._get("wait_for_commands"):
            topics = ", ".join(sorted({channel.topic for channel in self.contract.actions}))
            self.get_logger().info(f"waiting for commands on {topics}; wait_for_commands:=false does not")
        while self._get("wait_for_commands") and not self._arrived and not self.ended.is_set():
            self._tick_clock()
            time.sleep(0.02)

    def _episode(self, number: int, begin: int) -> int:
        """Drive one episode from `begin` on; returns when its last frame was captured."""
        assert self.live is not None
        live, count = self.live, len(self.contract.task_names)
        self._sleep_until(begin)
        self._arrived.clear()
        # the starts of d4-eval: episode i has seed i and task i modulo their number
        frame = live.begin(EVAL_SEED + 10_000 * self._get("seed") + number, number % count, begin)
        if self.contract.tasks is not None:
            self._say(self.contract.tasks, self.contract.task_names[number % count])
        self._show(frame)
        self._sleep_until(begin + _START_LEAD_NS)
        if self.contract.episode.start is not None:
            self._say(self.contract.episode.start, number)
        self._pay(frame)
        while not frame.is_last and not self.ended.is_set():
            self._sleep_until(min(live.next_ns, self.now() + round(_SLICE_S * 1e9 * self._speed)))
            while self._arrived:
                live.command(*self._arrived.popleft())
            following = live.advance(self.now())
            if following is not None:
                frame = following
                self._show(frame)
                self._pay(frame)
        if self.contract.episode.terminal is not None:
            self._say(self.contract.episode.terminal, frame.is_terminal)
        return frame.stamp_ns

    def _sleep_until(self, time_ns: int) -> None:
        while (left := time_ns - self.now()) > 0 and not self.ended.is_set():
            time.sleep(min(left / 1e9 / self._speed, _SLICE_S))
            self._tick_clock()
        self._tick_clock()

    def _tick_clock(self) -> None:
        if self._is_clock:
            msg = Clock()
            msg.clock.sec, msg.clock.nanosec = divmod(self.now(), 1_000_000_000)
            self._clock_topic.publish(msg)

    # -- topics --

    def _show(self, frame: Frame) -> None:
        for stream in self.contract.vectors():
            values = frame.observation.vectors if stream.role == "input" else frame.probes
            msg = self._types.new(stream.type)
            fields.write(msg, stream.select, values[stream.name], self._types.element)
            self._publish(stream.topic, msg, frame.stamp_ns)
        camera = self.contract.images[0]
        msg = self._types.new(camera.type)
        image = frame.observation.image.copy()
        # No real camera ever sends the same picture twice, and a guard takes one that does for frozen.
        image[0, frame.number % image.shape[1]] ^= 1
        if hasattr(msg, "encoding"):
            msg.height, msg.width, msg.encoding, msg.step = *image.shape[:2], "rgb8", 3 * image.shape[1]
            msg.data = image.tobytes()
        else:
            msg.format = "rgb8; png compressed bgr8"
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            msg.data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        self._publish(camera.topic, msg, frame.stamp_ns)

    def _publish(self, topic: str, msg: Any, stamp_ns: int) -> None:
        header = getattr(msg, "header", None)
        if header is not None:
            header.frame_id = "map"
            header.stamp.sec, header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
        self._topics[topic].publish(msg)

    def _pay(self, frame: Frame) -> None:
        if self.contract.reward is not None:
            self._say(self.contract.reward, frame.rewards.astype(np.float64).tolist())

    def _say(self, signal: Any, value: Any) -> None:
        msg = self._types.new(signal.type)
        setattr(msg, signal.select, value)
        self._topics[signal.topic].publish(msg)

    # -- results --

    def _summary(self) -> str:
        done = [] if self.live is None else self.live.outcomes
        success = np.mean([outcome.success for outcome in done])
        ret = np.mean([outcome.ret for outcome in done])
        return f"{len(done)} episodes, success {success:.2f}, return {ret:.2f}"

    def _write(self) -> None:
        done = [] if self.live is None else self.live.outcomes
        if self._results is None or not done:
            return
        rows = {
            "world": self._get("world"), "seeds": [outcome.seed for outcome in done],
            "task": [outcome.task for outcome in done], "return": [outcome.ret for outcome in done],
            "success": [int(outcome.success) for outcome in done],
            "fallen": [int(outcome.terminal) for outcome in done],
        }  # fmt: skip
        write_json(self._results, rows)


def main() -> None:
    """Entry point of `ros2 run d4_nodes sim_node`; ends by itself after `episodes`."""
    sys.exit(spin(SimNode))


if __name__ == "__main__":
    main()
