"""Measures a policy node from outside: a camera that stamps exactly, and a stopwatch on the commands.

Publishes noise in the size and at the rate that you choose on the topics of a contract, takes the commands,
and says how late each came after capture + `latency_ms`, transport included. Independent of the policy node's
own report, for which it is the check. Without a robot: do not run it beside one.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from bisect import bisect_right
from collections import deque
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rclpy.node import Node

from d4_datasets import fields
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes.report import Histogram, write_json
from d4_nodes.ros import qos
from d4_nodes.ros.shell import Parameter, RosTypes, declare, local, message_class, spin

PARAMETERS = (
    Parameter("contract", "", "robot.yaml of the policy"),
    Parameter("seconds", 60.0, "how long, s", (1, 86_400)),
    Parameter("rate_hz", 0.0, "pictures per second; 0: the contract's rate", (0, 1000)),
    Parameter("height", 0, "of the pictures, pixels; 0: the contract's", (0, 8192)),
    Parameter("width", 0, "of the pictures, pixels; 0: the contract's", (0, 8192)),
    Parameter("reliable", False, "offer pictures reliably instead of as sensor data"),
    Parameter("out", "", "write the result as JSON here"),
)

_PICTURES = 16
_MINUTE_NS = 60_000_000_000


class ProbeNode(Node):
    """See the module."""

    def __init__(self) -> None:
        super().__init__("probe")
        declare(self, PARAMETERS)
        path = self._get("contract")
        if not path:
            raise UserError("the parameter `contract` is not set")
        self.contract = Contract.load(os.path.expanduser(path))
        self.ended = threading.Event()
        self._types = RosTypes()
        self._stamps: deque[int] = deque(maxlen=64)
        self._late, self._gaps = Histogram(), Histogram()
        self._minutes: list[Histogram] = []
        self._last_ns = self._early = self._first_ns = 0
        profile = qos.EVENT if self._get("reliable") else qos.sensor()
        self._topics = {
            s.name: self.create_publisher(message_class(s.type), local(s.topic), profile)
            for s in self.contract.observations
            if s.role == "input"
        }
        self._pictures = self._make_pictures()
        action = self.contract.actions[0]
        self.create_subscription(
            message_class(action.type), local(action.topic), self._on_command, qos.command(None)
        )
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def _get(self, name: str) -> Any:
        return self.get_parameter(name).value

    def secure(self) -> None:
        """Say and write what was measured."""
        self.ended.set()
        self._thread.join(5)
        result = self._result()
        self.get_logger().info(json.dumps(result))
        if self._get("out"):
            write_json(Path(self._get("out")).expanduser(), result)

    def _make_pictures(self) -> list[Any]:
        camera = self.contract.images[0]
        assert camera.size is not None
        height, width = self._get("height") or camera.size[0], self._get("width") or camera.size[1]
        noise = np.random.default_rng(0).integers(0, 256, (_PICTURES, height, width, 3), np.uint8)
        return [self._picture(camera.type, pixels) for pixels in noise]

    def _picture(self, type_: str, pixels: np.ndarray) -> Any:
        msg = self._types.new(type_)
        if hasattr(msg, "encoding"):
            height, width, _ = pixels.shape
            msg.height, msg.width, msg.encoding, msg.step = height, width, "rgb8", 3 * width
            msg.data = pixels.tobytes()
        else:
            msg.format = "rgb8; jpeg compressed bgr8"
            msg.data = cv2.imencode(".jpg", pixels)[1].tobytes()
        return msg

    def _run(self) -> None:
        period = round(1e9 / (self._get("rate_hz") or self.contract.rate_hz))
        due, end, number = time.time_ns() + period, time.time_ns() + round(1e9 * self._get("seconds")), 0
        while not self.ended.wait(max(0.0, (due - time.time_ns()) / 1e9)) and due < end:
            self._take(due, number)
            number += 1
            due += period
        self.ended.set()

    def _take(self, stamp_ns: int, number: int) -> None:
        for stream in self.contract.vectors("input"):
            msg = self._types.new(stream.type)
            fields.write(msg, stream.select, np.zeros(len(stream.select)), self._types.element)
            self._publish(stream.name, msg, stamp_ns)
        self._stamps.append(stamp_ns)
        self._publish(self.contract.images[0].name, self._pictures[number % _PICTURES], stamp_ns)

    def _publish(self, name: str, msg: Any, stamp_ns: int) -> None:
        if hasattr(msg, "header"):
            msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
        self._topics[name].publish(msg)

    def _on_command(self, msg: Any) -> None:
        now, latency = time.time_ns(), self.contract.latency_ns
        stamps = list(self._stamps)
        if self._last_ns:
            self._gaps.add(now - self._last_ns)
        self._last_ns = now
        # the picture that this command answers: the newest whose moment has come, give or take
        place = bisect_right(stamps, now - latency + self.contract.period_ns // 4) - 1
        if place < 0:
            return
        late = now - stamps[place] - latency
        self._first_ns = self._first_ns or now
        minute = (now - self._first_ns) // _MINUTE_NS
        while len(self._minutes) <= minute:
            self._minutes.append(Histogram())
        self._early += late < 0
        for histogram in (self._late, self._minutes[minute]):
            histogram.add(late)

    def _result(self) -> dict[str, Any]:
        return {
            "command_after_its_moment_ms": self._late.summary_ms(), "early": int(self._early),
            "gap_between_commands_ms": self._gaps.summary_ms(),
            "p50_ms_per_minute": [round(h.quantile_ms(0.5), 4) for h in self._minutes],
            "p99_ms_per_minute": [round(h.quantile_ms(0.99), 4) for h in self._minutes],
        }  # fmt: skip


main = functools.partial(spin, ProbeNode)

if __name__ == "__main__":
    sys.exit(main())
