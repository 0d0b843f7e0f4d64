"""What our lifecycle nodes are: one way through the transitions, refusals in one sentence, warnings without
floods, findings on /diagnostics.
"""

from __future__ import annotations

import abc
import functools
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from d4_datasets import fields, messages
from d4_datasets.contract import Contract, Observation
from d4_datasets.errors import UserError, sentence
from d4_nodes import wire
from d4_nodes.complaints import Complaints
from d4_nodes.health import ERROR, OK, Finding
from d4_nodes.parameters import Parameter
from d4_nodes.ros import qos
from d4_nodes.ros.shell import INTERRUPTED, clock_of, declare, local, message_class
from d4_nodes.wire import WireError

_Transition = Callable[[Any, LifecycleState], TransitionCallbackReturn]


def told(transition: _Transition) -> _Transition:
    """rclpy swallows what a transition raises: here a refusal is one sentence, kept as `refusal` of the node,
    and a bug has its traceback.
    """

    @functools.wraps(transition)
    def run(self: Any, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(self, state)
        except Exception as error:
            text = str(error) if isinstance(error, WireError) else sentence(error)
            self.refusal = text or repr(error)
            self.get_logger().error(text or traceback.format_exc())
            return TransitionCallbackReturn.ERROR if text is None else TransitionCallbackReturn.FAILURE

    return run


def diagnostics(findings: Iterable[Finding], node: str, hardware: str, stamp: Any) -> DiagnosticArray:
    """Findings as a message of /diagnostics; `stamp` is a builtin_interfaces/Time."""
    array = DiagnosticArray()
    array.header.stamp = stamp
    for finding in findings:
        status = DiagnosticStatus(
            level=bytes([finding.level]), name=f"{node}: {finding.name}", message=finding.message
        )
        status.hardware_id = hardware
        status.values = [KeyValue(key=key, value=value) for key, value in finding.values.items()]
        array.status.append(status)
    return array


class _Link(Protocol):
    def close(self) -> None: ...


_AnyLink = TypeVar("_AnyLink", bound=_Link)


class ManagedNode(LifecycleNode, abc.ABC):
    """A lifecycle node that reads a contract, opens topics, and runs something while it is active.

    Args:
        name: of the node.
        parameters: to declare; `contract` must be one of them.

    Attributes:
        contract: None until the node is configured.
        refusal: why the last transition was refused.
        subject: what diagnostics speak of while nothing runs.
    """

    subject = "commands"

    def __init__(self, name: str, parameters: Sequence[Parameter]) -> None:
        super().__init__(name)
        declare(self, parameters)
        self.contract: Contract | None = None
        self.refusal = ""
        self._fixed = {p.name: p.fixed for p in parameters}
        self._now = clock_of(self)
        self._entities: list[tuple[Callable[[Any], Any], Any]] = []
        # rclpy refuses one place in the code that logs with changing severity: each has a lambda of its own
        self._complain = Complaints(lambda text: self.get_logger().warning(text))
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._every(1.0, self._on_diagnostics)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._answer_wrong_transitions()

    def _answer_wrong_transitions(self) -> None:
        """rclpy raises where a transition is asked for that there is none of now, and the caller waits for an
        answer for ever.
        """
        service = getattr(self, "_service_change_state", None)
        if service is None:
            return
        change = service.callback

        def answer(request: Any, response: Any) -> Any:
            try:
                return change(request, response)
            except Exception as error:
                self.get_logger().warning(f"no such transition now: {error}")
                response.success = False
                return response

        service.callback = answer

    def _every(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back by a clock that goes on while a simulation is paused."""
        self.create_timer(seconds, callback, clock=Clock(clock_type=ClockType.STEADY_TIME))

    # -- what a kind of node gives --

    @abc.abstractmethod
    def _configure(self, contract: Contract) -> str:
        """Read parameters and open topics; returns what to tell of it."""

    @abc.abstractmethod
    def _prepare(self, contract: Contract) -> None:
        """Make what runs; may refuse. Publishers are not live yet."""

    @abc.abstractmethod
    def _start(self) -> None:
        """Run it; publishers are live."""

    @abc.abstractmethod
    def _halt(self) -> None:
        """Stop it if it runs; publishers are still live."""

    @abc.abstractmethod
    def _findings(self) -> list[Finding]:
        """What diagnostics say of what runs; empty if nothing does."""

    def _standing(self) -> list[Finding]:
        """What diagnostics say besides, whether anything runs or not."""
        return []

    @property
    @abc.abstractmethod
    def is_running(self) -> bool:
        """Whether the node is active."""

    # -- transitions --

    @told
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the contract and open topics; nothing stays open if that is refused."""
        self.refusal = ""
        path = self._get("contract")
        if not path:
            raise UserError("the parameter `contract` is not set: give the robot.yaml of the robot")
        contract = Contract.load(os.path.expanduser(path))
        try:
            about = self._configure(contract)
        except Exception:
            self._release()
            raise
        self.contract = contract
        self.get_logger().info(f"configured for {contract.name}: {about}")
        return TransitionCallbackReturn.SUCCESS

    @told
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run, unless another node has the same name or the kind of node refuses."""
        assert self.contract is not None
        self.refusal = ""
        me = (self.get_name(), self.get_namespace())
        if self.get_node_names_and_namespaces().count(me) > 1:
            raise UserError(
                f"another node is called {self.get_fully_qualified_name()} too: start one of them only"
            )
        self._prepare(self.contract)
        result = super().on_activate(state)
        self._start()
        return result

    @told
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop, then publishers off."""
        self._halt()
        return super().on_deactivate(state)

    @told
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give topics back."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    @told
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop as in deactivate, whatever else fails."""
        return self._secured()

    @told
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a bug: stopped and torn down, to be configured anew; an error if that fails, too."""
        return self._secured()

    def _secured(self) -> TransitionCallbackReturn:
        is_clean = self.secure()
        return TransitionCallbackReturn.SUCCESS if is_clean else TransitionCallbackReturn.ERROR

    def secure(self) -> bool:
        """Stop, then let go of everything, each step even if the one before fails; whether none did."""
        is_clean = True
        for step in (self._halt, self._release):
            try:
                step()
            except Exception:
                is_clean = False
                self.get_logger().error(traceback.format_exc())
        return is_clean

    def _release(self) -> None:
        while self._entities:
            destroy, entity = self._entities.pop()
            destroy(entity)
        self.contract = None

    # -- topics --

    def _listen(self, topic: str, type_: str, callback: Callable[[Any], None], profile: Any) -> None:
        subscription = self.create_subscription(
            message_class(type_), local(topic), callback, profile, qos_overriding_options=qos.overrides(),
            event_callbacks=qos.subscription_events(topic, self._complain),
        )  # fmt: skip
        self._entities.append((self.destroy_subscription, subscription))

    def _listen_latched(self, topic: str, type_: str, callback: Callable[[Any], None]) -> None:
        """Besides another subscription: what a latching publisher said before this node began."""
        subscription = self.create_subscription(
            message_class(type_), local(topic), callback, qos.LATCHED, event_callbacks=qos.silent()
        )
        self._entities.append((self.destroy_subscription, subscription))

    def _observe(self, contract: Contract) -> None:
        """Listen to the inputs of the contract."""
        profile = qos.sensor(self._get("observation_deadline_ms"))
        for stream in contract.observations:
            if stream.role != "input":
                continue
            callback = functools.partial(self._on_sample, stream)
            self._listen(stream.topic, stream.type, callback, profile)
            if stream.holds_for_ever:
                self._listen_latched(stream.topic, stream.type, callback)

    def _publisher_for(self, type_: Any, topic: str, profile: Any, events: Any) -> Any:
        publisher = self.create_lifecycle_publisher(
            type_, local(topic), profile, event_callbacks=events,
            qos_overriding_options=qos.overrides(is_publisher=True),
        )  # fmt: skip
        self._entities.append((self.destroy_lifecycle_publisher, publisher))
        return publisher

    def _on_sample(self, stream: Observation, msg: Any) -> None:
        """Date a sample, read its numbers if it is a vector, and hand it to `_take`."""
        stamp = self._now() if stream.align.timeline == "receive" else messages.stamp_ns(msg)
        if not stamp:
            self._complain(f"{stream.topic} has no stamp, the contract dates it by its header: dropped")
            return
        try:
            value = msg if stream.is_image else fields.read(msg, stream.select).astype("float32")
        except UserError as error:
            self._complain(f"{stream.topic}: {error}: dropped")
            return
        self._take(stream.name, stamp, value)

    @abc.abstractmethod
    def _take(self, stream: str, stamp_ns: int, value: Any) -> None:
        """A sample of an input: a message of a camera, or the numbers of a vector, float32 (k,)."""

    # -- the inference server --

    def _socket_of(self, name: str) -> Path:
        """The socket that was given, or where a server of this name listens."""
        given = self._get("socket")
        return Path(given).expanduser() if given else wire.default_socket(name)

    def _await_server(self, connect: Callable[[], _AnyLink]) -> _AnyLink:
        """A link, closed again, to a server that answers; WireError when it refuses or patience is over."""
        until = time.monotonic() + self._get("server_wait_s")
        while True:
            try:
                link = connect()
            except WireError as error:
                if time.monotonic() > until or "refuses" in str(error) or INTERRUPTED.wait(0.2):
                    raise
                continue
            link.close()
            return link

    # -- parameters, and what it says --

    def _get(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        """Refuses what would change nothing; called before any of them is set."""
        reasons = {"configured": self.contract is not None, "active": self.is_running}
        for parameter in parameters:
            fixed = self._fixed.get(parameter.name, "never")
            if reasons.get(fixed, False):
                reason = f"{parameter.name} cannot change while the node is {fixed}"
                return SetParametersResult(successful=False, reason=reason)
            if parameter.name == "use_sim_time" and parameter.value != self._get("use_sim_time"):
                reason = "use_sim_time is read when the node starts: start it with the other one"
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _on_diagnostics(self) -> None:
        level = ERROR if self.refusal else OK
        idle = [Finding(self.subject, level, self.refusal or "inactive", {})]
        robot = "" if self.contract is None else self.contract.name
        stamp = self.get_clock().now().to_msg()
        findings = [*(self._findings() or idle), *self._standing()]
        self._diagnostics.publish(diagnostics(findings, self.get_name(), robot, stamp))
