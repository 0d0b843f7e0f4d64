"""The tokenizer node: a camera in, `d4_interfaces/msg/Latents` out, one message per picture.

A lifecycle node around `d4_nodes.encoding`; the tokenizer itself is in the inference server (`d4-serve RUN
--tokenizer`), another process with another Python. The executor's thread takes messages and hands them over;
another thread waits for the server and publishes.

    configure     read the contract, find the server, make topics
    activate      encode and publish
    deactivate    stop
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from d4_interfaces.msg import Latents
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile

from d4_datasets import fields, latents, messages
from d4_datasets.contract import Contract, Observation
from d4_datasets.errors import UserError
from d4_nodes import wire
from d4_nodes.encoding import Encoding, require_one_camera
from d4_nodes.health import ERROR, OK, Finding
from d4_nodes.link import TokenizerLink
from d4_nodes.ros import qos
from d4_nodes.ros.lifecycle import Complaints, diagnostics, told
from d4_nodes.ros.pictures import pick_decoder
from d4_nodes.ros.shell import INTERRUPTED, Parameter, clock_of, declare, local, message_class, spin
from d4_nodes.wire import WireError

_SUCCESS = TransitionCallbackReturn.SUCCESS

PARAMETERS = (
    Parameter("contract", "", "robot.yaml that the tokenizer was trained with"),
    Parameter("socket", "", "socket of the inference server; empty: where d4-serve --tokenizer listens by "
              "default"),
    Parameter("server_wait_s", 60.0, "how long configuring waits for the inference server, s", (0, 3600)),
    Parameter("codec", "float16", "how latents are written: float16, or uint8 with half its bytes and an "
              "error of at most 1/510 of the range of a frame's latents"),
    Parameter("image_decoder", "auto", "auto, opencv or cv_bridge; auto: cv_bridge where both agree"),
    Parameter("observation_deadline_ms", 0.0, "deadline requested of observations, ms; 0: none. From a "
              "camera that offers none nothing is received if one is requested", (0, 60_000)),
    Parameter("rate_warn", 0.9, "diagnostics warn if latents come at less of the contract's rate", (0, 1)),
)  # fmt: skip


class TokenizerNode(LifecycleNode):
    """See the module; parameters are `PARAMETERS`."""

    def __init__(self) -> None:
        super().__init__("tokenizer")
        declare(self, PARAMETERS)
        self.contract: Contract | None = None
        self.encoding: Encoding | None = None
        self.refusal = ""  # why the last transition was refused
        self._now = clock_of(self)
        self._complain = Complaints(self.get_logger().warning)
        self._entities: list[tuple[Callable[[Any], Any], Any]] = []
        self._counts, self._looked = Counter[str](), time.monotonic()
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._on_diagnostics)
        self.add_on_set_parameters_callback(self._on_parameters)

    # -- transitions --

    @told
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the contract, find the server, make topics."""
        self.refusal = ""
        path, codec = self._get("contract"), self._get("codec")
        if not path:
            raise UserError(
                "the parameter `contract` is not set: give the robot.yaml the tokenizer was trained with"
            )
        if codec not in latents.CODECS:
            raise UserError(f"the parameter `codec` is {codec!r}, not one of {', '.join(latents.CODECS)}")
        contract = Contract.load(os.path.expanduser(path))
        require_one_camera(contract)
        camera = contract.images[0]
        if camera.type == latents.TYPE:
            raise UserError(
                f"camera {camera.name} of {path} carries latents already: give the contract of its pictures"
            )
        self._decode, which = pick_decoder(self._get("image_decoder"))
        given = self._get("socket")
        self._socket = (
            Path(given).expanduser() if given else wire.default_socket(f"{contract.name}-tokenizer")
        )
        self._weights, about = self._find_server(contract)
        self.contract = contract
        self._open_topics(contract)
        self.get_logger().info(
            f"configured for {contract.name}: {camera.topic} to latents in {codec}, pictures decoded by "
            f"{which}, tokenizer {about} ({self._weights})"
        )
        return _SUCCESS

    @told
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Encode and publish."""
        assert self.contract is not None
        self.refusal = ""
        me = (self.get_name(), self.get_namespace())
        if self.get_node_names_and_namespaces().count(me) > 1:
            raise UserError(
                f"another node is called {self.get_fully_qualified_name()} too: start one of them only"
            )
        result = super().on_activate(state)  # the publisher lives before the first answer
        self._codec = self._get("codec")
        self.encoding = Encoding(
            self.contract, self._publish, self._connect, self._now, self._complain, self._decode
        )
        self._counts, self._looked = Counter(), time.monotonic()
        self._thread = threading.Thread(target=self.encoding.run, name="encoding", daemon=True)
        self._thread.start()
        return result

    @told
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop encoding, then the publisher."""
        self._halt()
        return super().on_deactivate(state)

    @told
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give topics back."""
        self._release()
        return _SUCCESS

    @told
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and let go of everything."""
        self.secure()
        return _SUCCESS

    @told
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a bug: stopped and torn down, to be configured anew."""
        self.secure()
        return _SUCCESS

    def secure(self) -> None:
        """Stop and let go of everything."""
        self._halt()
        self._release()

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

    def _release(self) -> None:
        while self._entities:
            destroy, entity = self._entities.pop()
            destroy(entity)
        self.contract = None

    # -- the server --

    def _find_server(self, contract: Contract) -> tuple[str, str]:
        """Weights and checkpoint of the server, once it answers; raises WireError when patience is over."""
        until = time.monotonic() + self._get("server_wait_s")
        while True:
            try:
                link = TokenizerLink(self._socket, contract)
            except WireError as error:
                if time.monotonic() > until or "refuses" in str(error) or INTERRUPTED.wait(0.2):
                    raise
                continue
            link.close()
            return link.weights, str(link.card.get("checkpoint"))

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

    def _open_topics(self, contract: Contract) -> None:
        for stream in contract.observations:
            if stream.role == "input":
                self._listen(stream.topic, stream.type, functools.partial(self._on_sample, stream),
                             qos.sensor(self._get("observation_deadline_ms")))  # fmt: skip
        if (start := contract.episode.start) is not None:
            self._listen(start.topic, start.type, self._on_start, qos.EVENT)
        topic = contract.images[0].topic + latents.SUFFIX
        events = qos.PublisherEventCallbacks(
            incompatible_qos=lambda event: self._complain(
                f"{topic}: a subscriber asks for a quality of service that is not offered: it gets nothing"
            )
        )
        self._publisher = self.create_lifecycle_publisher(
            Latents, local(topic), QoSProfile(depth=10),
            qos_overriding_options=qos.overrides(is_publisher=True), event_callbacks=events,
        )  # fmt: skip
        self._entities.append((self.destroy_lifecycle_publisher, self._publisher))

    def _listen(self, topic: str, type_: str, callback: Callable[[Any], None], profile: Any) -> None:
        subscription = self.create_subscription(
            message_class(type_), local(topic), callback, profile, qos_overriding_options=qos.overrides(),
            event_callbacks=qos.subscription_events(topic, self._complain),
        )  # fmt: skip
        self._entities.append((self.destroy_subscription, subscription))

    def _on_sample(self, stream: Observation, msg: Any) -> None:
        if self.encoding is None:
            return
        stamp = self._now() if stream.align.timeline == "receive" else messages.stamp_ns(msg)
        if not stamp:
            self._complain(f"{stream.topic} has no stamp, the contract dates it by its header: dropped")
            return
        value = msg
        if not stream.is_image:
            try:
                value = fields.read(msg, stream.select).astype(np.float32)
            except UserError as error:
                self._complain(f"{stream.topic}: {error}: dropped")
                return
        self.encoding.put(stream.name, stamp, value)

    def _on_start(self, msg: Any) -> None:
        if self.encoding is not None:
            self.encoding.begin(self._now())

    def _publish(self, picture: Any, values: np.ndarray, weights: str) -> None:
        """The latents of a picture; called from the encoding's thread."""
        parts = latents.pack(values, self._codec)
        data = parts.pop("data").tobytes()
        self._publisher.publish(Latents(header=picture.header, weights=weights, data=data, **parts))

    # -- parameters, and what it says --

    def _get(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        names = {p.name for p in PARAMETERS} - {"rate_warn"}
        for parameter in parameters:
            if self.contract is not None and parameter.name in names:
                return SetParametersResult(
                    successful=False, reason=f"{parameter.name} cannot change while the node is configured"
                )
        return SetParametersResult(successful=True)

    def _on_diagnostics(self) -> None:
        encoding, now = self.encoding, time.monotonic()
        if encoding is None:
            findings = [Finding("latents", ERROR if self.refusal else OK, self.refusal or "inactive", {})]
        else:
            seconds, self._looked = now - self._looked, now
            findings = [
                encoding.server(), encoding.camera(seconds, self._counts, self._get("rate_warn"))
            ]  # fmt: skip
            self._counts = Counter(encoding.counts)
        hardware = "" if self.contract is None else self.contract.name
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(diagnostics(findings, self.get_name(), hardware, stamp))


def main() -> None:
    """Entry point of `ros2 run d4_nodes tokenizer_node`."""
    sys.exit(spin(TokenizerNode))


if __name__ == "__main__":
    main()
