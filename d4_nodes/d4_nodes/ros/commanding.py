"""What nodes share that command a robot: the guard and its latched stop, command topics, status, report.

Everything that keeps a robot safe is here once, for the policy node and for the guard node alike.
"""

from __future__ import annotations

import abc
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from d4_interfaces.msg import PolicyStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.duration import Duration
from rclpy.wait_for_message import wait_for_message
from sensor_msgs.msg import Joy
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes import realtime
from d4_nodes.codec import Codec
from d4_nodes.complaints import Complaints
from d4_nodes.driver import Driver
from d4_nodes.guard import RULES, Guard, GuardConfig, Verdict
from d4_nodes.health import OK, WARN, Finding, Thresholds
from d4_nodes.parameters import Parameter
from d4_nodes.report import can_write
from d4_nodes.ros import qos
from d4_nodes.ros.lifecycle import ManagedNode
from d4_nodes.ros.shell import RosTypes, message_class
from d4_nodes.runner import Realtime, Runner

_Driver = TypeVar("_Driver", bound=Driver)
_DELIVERY_S = 0.2
_STATUS_S = 1.0  # a status is said twice a second
_STOP_TYPE = "std_msgs/msg/Bool"


def _report_folder(given: str) -> Path:
    """The folder that was given, or one in the ROS log folder."""
    return Path(os.path.expanduser(given or f"{os.environ.get('ROS_LOG_DIR', '~/.ros/log')}/d4"))


def _refuse_report_folder(given: str) -> str:
    """Why no report can be written there; empty: it can."""
    folder = _report_folder(given)
    return "" if can_write(folder) else f"report_folder: nothing can be written in {folder}"


class CommandingNode(ManagedNode, Generic[_Driver]):
    """A node in which a guard has the last word on what a `Driver` sends.

    Attributes:
        runner: the driver's, None while nothing runs.
        guard: of the contract the node is configured for.
    """

    def __init__(self, name: str, parameters: Sequence[Parameter]) -> None:
        super().__init__(name, parameters)
        self.runner: Runner[_Driver] | None = None
        self.guard: Guard | None = None
        self._stop_reason = ""  # outlives guards: a stop holds from the first moment of the node to its reset
        self._publishers_of: dict[str, Any] = {}
        self._said_state, self._status_due = "", 0.0
        self._mention = Complaints(lambda text: self.get_logger().info(text), 1.0)
        self._status = self.create_publisher(PolicyStatus, "~/status", qos.LATCHED)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/reset_stop", self._on_reset_stop)
        for profile in qos.STOP:
            subscription = self.create_subscription(
                Bool, "emergency_stop", self._on_emergency_stop, profile, event_callbacks=qos.silent()
            )
        self._stop_topic = subscription.topic_name
        self._every(0.05, self._on_status)

    # -- transitions --

    def _command(self, contract: Contract) -> None:
        """Make the guard and the command topics.

        Raises:
            UserError: the report could not be written after the robot has moved.
        """
        if refusal := _refuse_report_folder(self._get("report_folder")):
            raise UserError(refusal)
        self._codec = Codec(contract, RosTypes(), self._get("command_frame_id"))
        self.guard = Guard(contract, self._guard_config())
        if self._stop_reason:
            self.guard.stop(self._stop_reason)
        if self._get("dead_man_button") >= 0:
            self._listen("joy", "sensor_msgs/msg/Joy", self._on_joy, qos.EVENT)
        profile = qos.command(None if self._is_simulated else contract.period_ns)
        self._publishers_of = {
            topic.name: self._publisher_for(
                message_class(topic.type), topic.name, profile,
                qos.publisher_events(topic.name, self._complain_driving),
            )
            for topic in self._codec.topics
        }  # fmt: skip

    def _run(self, driver: _Driver) -> None:
        """Let a driver command the robot."""
        cores = tuple(core for core in self._get("cores") if core >= 0)
        settings = Realtime(priority=self._get("priority"), cores=cores, lock_memory=self._get("lock_memory"))
        logger = self.get_logger()
        self.runner = Runner(driver, settings, logger.info, logger.warning)
        self.runner.start()

    def _halt(self) -> None:
        runner, self.runner = self.runner, None
        if runner is None:
            return
        has_ended = runner.stop()
        self._await_delivery()
        try:
            path = runner.conclude(_report_folder(self._get("report_folder")))
            self.get_logger().info(f"report: {path}")
        except OSError as error:
            self.get_logger().error(f"the report cannot be written: {error}")
        if has_ended:  # a thread that still runs still waits on it
            runner.loop.inbox.close()

    def _await_delivery(self) -> None:
        """The safety action was last: see that it arrives before publishers fall silent."""
        until = time.monotonic() + _DELIVERY_S
        with contextlib.suppress(Exception):  # a failing middleware must not cost the report
            for publisher in self._publishers_of.values():
                publisher.wait_for_all_acked(Duration(seconds=max(0.0, until - time.monotonic())))

    def _release(self) -> None:
        super()._release()
        self._publishers_of = {}
        self.guard = None

    # -- commands --

    def _send(self, verdict: Verdict, now_ns: int) -> None:
        """What moves the robot; called from the driver's thread, and from the watchdog's."""
        assert self.guard is not None
        if not self.guard.config.send:
            return
        for topic, message in self._codec.messages(verdict.values, verdict.send, now_ns):
            self._publishers_of[topic].publish(message)

    def _refuse_rivals(self) -> None:
        """Refuse to command what another node of this kind commands now; it may be there, and wait.

        Raises:
            UserError: one does. Others, such as a joystick's, are only complained of.
        """
        if self._get("allow_rivals") or self._get("shadow"):
            return
        rivals: dict[str, list[str]] = {}  # each is asked once, whatever it publishes
        for topic, publisher in self._publishers_of.items():
            infos = self.get_publishers_info_by_topic(publisher.topic_name)
            for name in {f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in infos}:
                rivals.setdefault(name, []).append(topic)
        rivals.pop(self.get_fully_qualified_name(), None)
        for name, topics in sorted(rivals.items()):
            if self._commands_now(name):
                raise UserError(
                    f"{name} commands {', '.join(topics)} already: deactivate it first, let one command "
                    "through the other (guard node), or set allow_rivals"
                )

    def _commands_now(self, node: str) -> bool:
        """Whether a node is one of this kind that sends commands, as its status says."""
        topic = f"{node}/status"
        kinds = dict(self.get_topic_names_and_types()).get(topic, [])
        if "d4_interfaces/msg/PolicyStatus" not in kinds:
            return False
        try:
            is_heard, status = wait_for_message(PolicyStatus, self, topic, time_to_wait=_STATUS_S)
        except Exception as error:  # access control may forbid to listen
            self.get_logger().warning(f"{topic} cannot be heard: {error}")
            return False
        return bool(is_heard) and status.state != "inactive" and not status.shadow

    def _look_for_rivals(self) -> None:
        """Who else commands the robot goes past the guard."""
        for topic, publisher in self._publishers_of.items():
            others = self.count_publishers(publisher.topic_name) - 1
            if others > 0:
                who = f"others publish on {topic} ({others}), past the {self.get_name()}"
                self._complain(f"{who}: {self._advice(topic)}")

    def _advice(self, topic: str) -> str:
        """What to do about those who command a topic, too."""
        return "which one does the robot obey?"

    def _complain_driving(self, text: str) -> None:
        """The promises of a command publisher count while commands are sent, not before the first."""
        if self.runner is not None and self.runner.loop.report.counts["commands"] > 1:
            self._complain(text)

    # -- stop and dead-man switch --

    def _standing(self) -> list[Finding]:
        return [self._pressable(), *self._treatment()]

    def _pressable(self) -> Finding:
        """Who can press the emergency stop, whether the node is active or not."""
        infos = self.get_publishers_info_by_topic(self._stop_topic)
        deaf = [info for info in infos if info.topic_type != _STOP_TYPE]  # every quality of service fits
        heard = len(infos) - len(deaf)
        values = {"topic": self._stop_topic, "publishers": str(len(infos)), "heard": str(heard)}
        if deaf:
            who = f"{deaf[0].node_namespace.rstrip('/')}/{deaf[0].node_name} publishes {deaf[0].topic_type}"
            text = f"{len(deaf)} of {len(infos)} publishers cannot be heard: {who}, not {_STOP_TYPE}"
            self._complain(f"{self._stop_topic}: {text}")
            return Finding("emergency stop", WARN, text, values)
        text = f"heard from {heard} publishers" if heard else "no publisher, only the service can stop"
        return Finding("emergency stop", OK, text, values)

    def _on_emergency_stop(self, msg: Bool) -> None:
        if msg.data:
            self._stop("the topic emergency_stop says so")

    def _on_stop(self, request: Any, response: Any) -> Any:
        self._stop("the service stop was called")
        response.success, response.message = True, "stopped; ~/reset_stop releases it"
        return response

    def _on_reset_stop(self, request: Any, response: Any) -> Any:
        self._stop_reason = ""
        self._tell(lambda guard: guard.reset_stop())
        response.success, response.message = True, "released"
        return response

    def _stop(self, reason: str) -> None:
        if not self._stop_reason:  # one press is heard by several subscriptions, and a button may repeat it
            self.get_logger().warning(f"emergency stop: {reason}")
        self._stop_reason = self._stop_reason or reason
        self._tell(lambda guard: guard.stop(reason))

    def _on_joy(self, msg: Joy) -> None:
        button = self._get("dead_man_button")
        held = 0 <= button < len(msg.buttons) and bool(msg.buttons[button])
        self._tell(lambda guard: guard.switch(held, self._now()))

    def _tell(self, act: Callable[[Guard], None]) -> None:
        """Tell the guard something, if there is one; under the driver's lock while that runs."""
        if self.runner is not None:
            self.runner.loop.tell(act)
        elif self.guard is not None:
            act(self.guard)

    # -- parameters --

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name == "report_folder" and (refusal := _refuse_report_folder(parameter.value)):
                return SetParametersResult(successful=False, reason=refusal)
        return super()._on_parameters(parameters)

    @property
    def is_running(self) -> bool:
        """Whether a driver commands the robot."""
        return self.runner is not None

    @property
    def _is_simulated(self) -> bool:
        return bool(self._get("use_sim_time"))

    def _guard_config(self, **more: Any) -> GuardConfig:
        return GuardConfig(
            enabled=self._get("guard"), frozen_frames=self._get("frozen_frames"),
            ahead_ms=self._get("ahead_ms"), dead_man=self._get("dead_man_button") >= 0,
            dead_man_ms=self._get("dead_man_ms"), send=not self._get("shadow"), **more,
        )  # fmt: skip

    def _about(self) -> dict[str, Any]:
        """What a report must say of how its run was driven."""
        return {"node": self.get_name(), "shadow": self._get("shadow"), "guard": self._get("guard")}

    def _thresholds(self) -> Thresholds:
        return Thresholds(
            missed_warn=self._get("missed_warn"), missed_error=self._get("missed_error"),
            rate_warn=self._get("rate_warn"),
        )  # fmt: skip

    # -- what it says --

    def _treatment(self) -> list[Finding]:
        """What the system did not permit the driver's thread."""
        if self.runner is None:
            return []
        refused = self.runner.refused
        text = "; ".join(refused) or "nothing was refused"
        return [Finding("real time", WARN if refused else OK, text, {})]

    def _log_driver(self, line: str) -> None:
        if line.startswith("safety action"):
            self._complain(line)
        else:
            self._mention(line)

    @property
    def state(self) -> str:
        """As in PolicyStatus."""
        return "inactive" if self.runner is None else self.runner.loop.state

    def _on_status(self) -> None:
        state, now = self.state, time.monotonic()
        if state == self._said_state and now < self._status_due:
            return
        self._said_state, self._status_due = state, now + 0.5
        if self.runner is not None:
            realtime.sweep()  # rclpy leaves a little garbage behind with every turn
        self._status.publish(self._make_status(state))

    def _make_status(self, state: str) -> PolicyStatus:
        msg = PolicyStatus(state=state, reason=self.refusal)
        msg.header.stamp = self.get_clock().now().to_msg()
        if self.runner is None or self.guard is None:
            return msg
        report = self.runner.loop.report
        if state in RULES:
            msg.reason = self.guard.tally[state].reason
        msg.shadow = not self.guard.config.send
        msg.commands, msg.missed = report.counts["commands"], report.counts["missed"]
        msg.safe, msg.rate_hz = report.counts["safe"], report.achieved_hz
        self._tell_more(msg, self.runner.loop)
        return msg

    @abc.abstractmethod
    def _tell_more(self, msg: PolicyStatus, driver: _Driver) -> None:
        """What this kind of node adds to the status of a running driver."""
