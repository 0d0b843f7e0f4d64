"""The guard as a node of its own: in front of any policy, last before the robot.

What the other policy wants comes on `policy/<command topic>`; what the contract allows goes out on the
command topics themselves, and the safety action when nothing comes. A lifecycle node around `d4_nodes.relay`.

    configure     read the contract, make topics
    activate      watch and pass on
    deactivate    stop, wait (bounded), safety action last; report
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d4_interfaces.msg import PolicyStatus
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import Joy
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from d4_datasets import messages
from d4_datasets.contract import Contract, Observation
from d4_datasets.errors import UserError
from d4_nodes.codec import Codec, Topic
from d4_nodes.guard import RULES, Guard, GuardConfig, Verdict
from d4_nodes.health import ERROR, OK, Finding, Thresholds
from d4_nodes.inbox import Inbox
from d4_nodes.relay import Relay, RelayExaminer, read
from d4_nodes.report import Report
from d4_nodes.ros import qos
from d4_nodes.ros.guard_parameters import FIXED_WHILE_ACTIVE, PARAMETERS
from d4_nodes.ros.lifecycle import Complaints, diagnostics, told
from d4_nodes.ros.shell import RosTypes, clock_of, declare, local, message_class, spin
from d4_nodes.runner import Realtime, Runner

_SUCCESS = TransitionCallbackReturn.SUCCESS


class GuardNode(LifecycleNode):
    """See the module; parameters are those of `guard_parameters`."""

    def __init__(self) -> None:
        super().__init__("guard")
        declare(self, PARAMETERS)
        self.contract: Contract | None = None
        self.runner: Runner[Relay] | None = None
        self.refusal = ""  # why the last transition was refused
        self._now = clock_of(self)
        self._entities: list[tuple[Callable[[Any], Any], Any]] = []
        self._complain = Complaints(self.get_logger().warning)
        self._said_state, self._status_due = "", 0.0
        group = MutuallyExclusiveCallbackGroup()
        self._status = self.create_publisher(PolicyStatus, "~/status", qos.LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(Trigger, "~/stop", self._on_stop, callback_group=group)
        self.create_service(Trigger, "~/reset_stop", self._on_reset_stop, callback_group=group)
        self.create_timer(0.05, self._on_status, callback_group=group)
        self.create_timer(1.0, self._on_diagnostics, callback_group=group)
        self.add_on_set_parameters_callback(self._on_parameters)

    # -- transitions --

    @told
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the contract and make topics."""
        self.refusal = ""
        path = self._get("contract")
        if not path:
            raise UserError("the parameter `contract` is not set: give the robot.yaml of the robot")
        contract = Contract.load(os.path.expanduser(path))
        codec = Codec(contract, RosTypes(), self._get("command_frame_id"))
        prefix = self._get("input_prefix").strip("/")
        if not prefix:
            raise UserError("input_prefix is empty: the guard would listen to its own commands")
        self._codec, self.contract = codec, contract
        self.guard = Guard(contract, self._guard_config())
        self._observe(contract)
        for topic in codec.topics:
            self._listen(f"{prefix}/{local(topic.name)}", topic.type,
                         functools.partial(self._on_command, topic), qos.sensor())  # fmt: skip
        self._publish_to(contract)
        wanted = ", ".join(f"{prefix}/{local(topic.name)}" for topic in codec.topics)
        self.get_logger().info(f"configured for {contract.name}: commands are expected on {wanted}")
        return _SUCCESS

    @told
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Watch, and pass on."""
        assert self.contract is not None
        self.refusal = ""
        contract = self.contract
        self._alone()
        self.guard.config = self._guard_config()
        is_simulated = self.get_parameter("use_sim_time").value
        relay = Relay(
            contract, self.guard, Inbox(tuple(s.name for s in contract.observations if s.role != "probe")),
            self._send, self._now, Report(contract.rate_hz, contract.latency_ms, {"node": self.get_name()}),
            self._log_relay, self._now if is_simulated else time.monotonic_ns,
            0.002 if is_simulated else 0.02,
        )  # fmt: skip
        self._examiner = RelayExaminer(relay, Thresholds(missed_warn=self._get("missed_warn"),
                                                         missed_error=self._get("missed_error"),
                                                         rate_warn=self._get("rate_warn")))  # fmt: skip
        cores = tuple(core for core in self._get("cores") if core >= 0)
        settings = Realtime(priority=self._get("priority"), cores=cores, lock_memory=self._get("lock_memory"))
        result = super().on_activate(state)  # publishers live before the first command
        self.runner = Runner(relay, settings, self.get_logger().info)
        self.runner.start()
        return result

    @told
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop, wait, safety action last; then publishers off and the report."""
        self._halt()
        return super().on_deactivate(state)

    @told
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give topics back."""
        self._release()
        return _SUCCESS

    @told
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop as in deactivate, whatever else fails."""
        self.secure()
        return _SUCCESS

    @told
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a bug: stopped and torn down, to be configured anew."""
        self.secure()
        return _SUCCESS

    def secure(self) -> None:
        """Safety action last, then let go of everything; each step even if the one before fails."""
        for step in (self._halt, self._release):
            try:
                step()
            except Exception:
                self.get_logger().error(traceback.format_exc())

    def _halt(self) -> None:
        runner, self.runner = self.runner, None
        if runner is None:
            return
        if not runner.stop():
            self.get_logger().error("the relay did not end in time; the safety action was sent in its place")
        folder = self._get("report_folder") or os.path.join(os.environ.get("ROS_LOG_DIR", "~/.ros/log"), "d4")
        try:
            path = runner.conclude(Path(folder).expanduser())
            self.get_logger().info(f"report: {path}")
        except OSError as error:
            self.get_logger().error(f"the report cannot be written: {error}")
        runner.loop.inbox.close()

    def _release(self) -> None:
        while self._entities:
            destroy, entity = self._entities.pop()
            destroy(entity)
        self._publishers_of: dict[str, Any] = {}
        self.contract = None

    def _alone(self) -> None:
        """Who else commands the robot goes past the guard."""
        for topic, publisher in self._publishers_of.items():
            others = self.count_publishers(publisher.topic_name) - 1
            if others > 0:
                self.get_logger().warning(
                    f"{others} other publishers command {topic}, past the guard: let them publish on "
                    f"{self._get('input_prefix').strip('/')}/{local(topic)}"
                )

    # -- topics --

    def _observe(self, contract: Contract) -> None:
        for stream in contract.observations:
            if stream.role == "input":
                self._listen(stream.topic, stream.type, functools.partial(self._on_sample, stream),
                             qos.sensor(self._get("observation_deadline_ms")))  # fmt: skip
        self._listen("emergency_stop", "std_msgs/msg/Bool", self._on_emergency_stop, qos.EVENT)
        if self._get("dead_man_button") >= 0:
            self._listen("joy", "sensor_msgs/msg/Joy", self._on_joy, qos.EVENT)

    def _listen(self, topic: str, type_: str, callback: Callable[[Any], None], profile: Any) -> None:
        subscription = self.create_subscription(
            message_class(type_), local(topic), callback, profile, qos_overriding_options=qos.overrides(),
            event_callbacks=qos.subscription_events(topic, self._complain),
        )  # fmt: skip
        self._entities.append((self.destroy_subscription, subscription))

    def _publish_to(self, contract: Contract) -> None:
        period_ns = None if self.get_parameter("use_sim_time").value else contract.period_ns
        self._publishers_of = {}
        for topic in self._codec.topics:
            publisher = self.create_lifecycle_publisher(
                message_class(topic.type), local(topic.name), qos.command(period_ns),
                qos_overriding_options=qos.overrides(is_publisher=True),
                event_callbacks=qos.publisher_events(topic.name, self._complain),
            )  # fmt: skip
            self._entities.append((self.destroy_lifecycle_publisher, publisher))
            self._publishers_of[topic.name] = publisher

    def _send(self, verdict: Verdict, now_ns: int) -> None:
        """What moves the robot; called from the relay's thread, and from the watchdog's."""
        if not self.guard.config.send:
            return
        for topic, message in self._codec.messages(verdict.values, verdict.send, now_ns):
            self._publishers_of[topic].publish(message)

    def _on_command(self, topic: Topic, msg: Any) -> None:
        if self.runner is None:
            return
        try:
            self.runner.loop.command(topic.name, read(topic, msg))
        except UserError as error:
            self._complain(f"{topic.name}: {error}: dropped")

    def _on_sample(self, stream: Observation, msg: Any) -> None:
        if self.runner is None:
            return
        stamp = self._now() if stream.align.timeline == "receive" else messages.stamp_ns(msg)
        if not stamp:
            self._complain(f"{stream.topic} has no stamp, the contract dates it by its header: dropped")
            return
        self.runner.loop.put(stream.name, stamp, msg if stream.is_image else None)

    def _on_emergency_stop(self, msg: Bool) -> None:
        if msg.data:
            self._stop("the topic emergency_stop says so")

    def _on_joy(self, msg: Joy) -> None:
        button = self._get("dead_man_button")
        held = 0 <= button < len(msg.buttons) and bool(msg.buttons[button])
        self._tell(lambda guard: guard.switch(held, self._now()))

    # -- services --

    def _on_stop(self, request: Any, response: Any) -> Any:
        response.success = self._stop("the service stop was called")
        response.message = (
            "stopped; ~/reset_stop releases it" if response.success else "the node is not configured"
        )
        return response

    def _on_reset_stop(self, request: Any, response: Any) -> Any:
        response.success = self._tell(lambda guard: guard.reset_stop())
        response.message = "released" if response.success else "the node is not configured"
        return response

    def _stop(self, reason: str) -> bool:
        self.get_logger().warning(f"emergency stop: {reason}")
        return self._tell(lambda guard: guard.stop(reason))

    def _tell(self, act: Callable[[Guard], None]) -> bool:
        """Tell the guard something; False if there is none."""
        if self.contract is None:
            return False
        if self.runner is None:
            act(self.guard)
        else:
            self.runner.loop.tell(act)
        return True

    # -- parameters --

    def _get(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _guard_config(self) -> GuardConfig:
        return GuardConfig(
            enabled=self._get("guard"), frozen_frames=self._get("frozen_frames"),
            ahead_ms=self._get("ahead_ms"), dead_man=self._get("dead_man_button") >= 0,
            dead_man_ms=self._get("dead_man_ms"), send=not self._get("shadow"),
        )  # fmt: skip

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        for parameter in parameters:
            if self.runner is not None and parameter.name in FIXED_WHILE_ACTIVE:
                return SetParametersResult(
                    successful=False, reason=f"{parameter.name} cannot change while the node is active"
                )
        return SetParametersResult(successful=True)

    # -- what it says --

    def _log_relay(self, line: str) -> None:
        # rclpy refuses one place in the code that logs with changing severity
        if "safety action" in line:
            self._complain(line)
        else:
            self.get_logger().info(line, throttle_duration_sec=1.0)

    @property
    def state(self) -> str:
        """As in PolicyStatus."""
        return "inactive" if self.runner is None else self.runner.loop.state

    def _on_status(self) -> None:
        state, now = self.state, time.monotonic()
        if state == self._said_state and now < self._status_due:
            return
        self._said_state, self._status_due = state, now + 0.5
        self._status.publish(self._make_status(state))

    def _make_status(self, state: str) -> PolicyStatus:
        msg = PolicyStatus(state=state, reason=self.refusal)
        msg.header.stamp = self.get_clock().now().to_msg()
        if self.runner is None:
            return msg
        report = self.runner.loop.report
        if state in RULES:
            msg.reason = self.guard.tally[state].reason
        msg.shadow = not self.guard.config.send
        msg.commands, msg.missed = report.counts["commands"], report.counts["missed"]
        msg.safe, msg.rate_hz = report.counts["safe"], report.achieved_hz
        return msg

    def _on_diagnostics(self) -> None:
        if self.runner is None:
            found = [Finding("commands", ERROR if self.refusal else OK, self.refusal or "inactive", {})]
        else:
            found = self._examiner.look()
        robot = "" if self.contract is None else self.contract.name
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(diagnostics(found, self.get_name(), robot, stamp))


def main() -> None:
    """Entry point of `ros2 run d4_nodes guard_node`."""
    sys.exit(spin(GuardNode))


if __name__ == "__main__":
    main()
