"""The tokenizer node: a camera in, `d4_interfaces/msg/Latents` out, one message per picture.

A lifecycle node around `d4_nodes.encoding`; the tokenizer itself is in the inference server (`d4-serve RUN
--tokenizer`), another process with another Python. The executor's thread takes messages and hands them over;
another thread waits for the server and publishes.

    configure     read the contract, find the server, make topics
    activate      encode and publish
    deactivate    stop
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
from d4_interfaces.msg import Latents
from rclpy.qos import QoSProfile

from d4_datasets import latents
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes.encoding import Encoding, require_one_camera
from d4_nodes.health import Finding
from d4_nodes.link import TokenizerLink
from d4_nodes.parameters import Parameter
from d4_nodes.ros import qos
from d4_nodes.ros.lifecycle import ManagedNode
from d4_nodes.ros.pictures import pick_decoder
from d4_nodes.ros.shell import spin
from d4_nodes.wire import WireError

PARAMETERS = (
    Parameter("contract", "", "robot.yaml that the tokenizer was trained with", fixed="configured"),
    Parameter("socket", "", "socket of the inference server; empty: where d4-serve --tokenizer listens by "
              "default", fixed="configured"),
    Parameter("server_wait_s", 60.0, "how long configuring waits for the inference server, s", (0, 3600),
              fixed="configured"),
    Parameter("codec", "float16", "how latents are written: float16, or uint8 with half its bytes and an "
              "error of at most 1/510 of the range of a frame's latents", fixed="configured"),
    Parameter("image_decoder", "auto", "auto, opencv or cv_bridge; auto: cv_bridge where both agree",
              fixed="configured"),
    Parameter("observation_deadline_ms", 0.0, "deadline requested of observations, ms; 0: none. From a "
              "camera that offers none nothing is received if one is requested", (0, 60_000),
              fixed="configured"),
    Parameter("rate_warn", 0.9, "diagnostics warn if latents come at less of the contract's rate", (0, 1),
              fixed="never"),
)  # fmt: skip


class TokenizerNode(ManagedNode):
    """See the module; parameters are `PARAMETERS`."""

    subject = "latents"

    def __init__(self) -> None:
        self.encoding: Encoding | None = None
        super().__init__("tokenizer", PARAMETERS)
        self._counts, self._looked = Counter[str](), time.monotonic()

    # -- transitions --

    def _configure(self, contract: Contract) -> str:
        self._codec = self._get("codec")
        if self._codec not in latents.CODECS:
            known = ", ".join(latents.CODECS)
            raise UserError(f"the parameter `codec` is {self._codec!r}, not one of {known}")
        require_one_camera(contract)
        camera = contract.images[0]
        if camera.type == latents.TYPE:
            raise UserError(
                f"camera {camera.name} of {self._get('contract')} carries latents already: give the contract "
                "of its pictures"
            )
        self._decode, which = pick_decoder(self._get("image_decoder"))
        self._socket = self._socket_of(f"{contract.name}-tokenizer")
        link = self._await_server(lambda: TokenizerLink(self._socket, contract))
        self._weights = link.weights
        self._observe(contract)
        if (start := contract.episode.start) is not None:
            self._listen(start.topic, start.type, self._on_start, qos.EVENT)
        topic = camera.topic + latents.SUFFIX
        events = qos.offer_events(topic, self._complain)
        self._publisher = self._publisher_for(Latents, topic, QoSProfile(depth=10), events)
        return (
            f"{camera.topic} to latents in {self._codec}, pictures decoded by {which}, tokenizer "
            f"{link.card.get('checkpoint')} ({self._weights})"
        )

    def _prepare(self, contract: Contract) -> None:
        self._next = Encoding(contract, self._publish, self._connect, self._now, self._complain, self._decode)

    def _start(self) -> None:
        self.encoding = self._next
        self._counts, self._looked = Counter(), time.monotonic()
        self._thread = threading.Thread(target=self.encoding.run, name="encoding", daemon=True)
        self._thread.start()

    def _halt(self) -> None:
        encoding, self.encoding = self.encoding, None
        if encoding is None:
            return
        encoding.stop()
        self._thread.join(5)
        if self._thread.is_alive():
            self.get_logger().error("the encoding thread did not end in time")
            return
        encoding.inbox.close()
        counts = ", ".join(f"{count} {name}" for name, count in sorted(encoding.counts.items()) if count)
        self.get_logger().info(f"stopped: {counts or 'no pictures'}")

    @property
    def is_running(self) -> bool:
        """Whether pictures are encoded."""
        return self.encoding is not None

    def _connect(self) -> TokenizerLink:
        """A link for the encoding: to a server with the weights found at configuration, and no others."""
        assert self.contract is not None
        link = TokenizerLink(self._socket, self.contract, timeout_s=1.0)
        if link.weights != self._weights:
            link.close()
            raise WireError(
                f"the inference server holds another tokenizer than at configuration ({link.weights}, not "
                f"{self._weights}): deactivate, clean up and configure the node"
            )
        return link

    # -- topics --

    def _take(self, stream: str, stamp_ns: int, value: Any) -> None:
        if self.encoding is not None:
            self.encoding.put(stream, stamp_ns, value)

    def _on_start(self, msg: Any) -> None:
        if self.encoding is not None:
            self.encoding.begin(self._now())

    def _publish(self, picture: Any, values: np.ndarray, weights: str) -> None:
        """The latents of a picture; called from the encoding's thread."""
        parts = latents.pack(values, self._codec)
        data = parts.pop("data").tobytes()
        self._publisher.publish(Latents(header=picture.header, weights=weights, data=data, **parts))

    # -- what it says --

    def _findings(self) -> list[Finding]:
        encoding, now = self.encoding, time.monotonic()
        if encoding is None:
            return []
        seconds, self._looked = now - self._looked, now
        before, self._counts = self._counts, Counter(encoding.counts)
        return [encoding.server(), encoding.camera(seconds, before, self._get("rate_warn"))]


def main() -> None:
    """Entry point of `ros2 run d4_nodes tokenizer_node`."""
    sys.exit(spin(TokenizerNode))


if __name__ == "__main__":
    main()
