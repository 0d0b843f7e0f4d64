"""The policy node: cameras and joints in, guarded commands out, each at capture time plus `latency_ms`.

A lifecycle node around `d4_nodes.loop`; the policy itself is in the inference server, another process with
another Python. The executor's thread takes messages and hands them over; the loop's thread decides and
publishes; neither waits for the other.

    configure     read the contract, find the server, make topics
    activate      measure a decision, refuse if it does not fit into the contract, drive
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

import numpy as np
from d4_interfaces.msg import PolicyStatus
from d4_interfaces.srv import SetTask
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import Joy
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from d4_datasets import fields, messages, signals
from d4_datasets.contract import Contract, Observation
from d4_datasets.errors import UserError
from d4_nodes import activation, wire
from d4_nodes.codec import Codec
from d4_nodes.guard import RULES, Guard, GuardConfig, Verdict
from d4_nodes.health import ERROR, OK, Examiner, Finding, Thresholds
from d4_nodes.inbox import Inbox
from d4_nodes.link import Link
from d4_nodes.loop import Loop, LoopConfig
from d4_nodes.report import Histogram, Report
from d4_nodes.ros import qos
from d4_nodes.ros.lifecycle import Complaints, diagnostics, told
from d4_nodes.ros.pictures import pick_decoder
from d4_nodes.ros.policy_parameters import FIXED_WHILE_ACTIVE, PARAMETERS
from d4_nodes.ros.shell import INTERRUPTED, RosTypes, clock_of, declare, local, message_class, spin
from d4_nodes.runner import Realtime, Runner
from d4_nodes.wire import WireError

_SUCCESS = TransitionCallbackReturn.SUCCESS
_ENOUGH = 10  # pictures until their median transport means something


class PolicyNode(LifecycleNode):
    """See the module; parameters are those of `policy_parameters`."""

    def __init__(self) -> None:
        super().__init__("policy")
        declare(self, PARAMETERS)
        self.contract: Contract | None = None
        self.runner: Runner | None = None
        self.refusal = ""  # why the last transition was refused
        self._now = clock_of(self)
        self._entities: list[tuple[Callable[[Any], Any], Any]] = []
        self._complain = Complaints(self.get_logger().warning)
        self._before: dict[str, tuple[Any, Histogram]] = {}  # newest message and transport while inactive
        self._said_state = ""
        group = MutuallyExclusiveCallbackGroup()
        self._status = self.create_publisher(PolicyStatus, "~/status", qos.LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(SetTask, "~/set_task", self._on_set_task, callback_group=group)
        self.create_service(Trigger, "~/stop", self._on_stop, callback_group=group)
        self.create_service(Trigger, "~/reset_stop", self._on_reset_stop, callback_group=group)
        self.create_timer(0.05, self._on_status, callback_group=group)
        self.create_timer(1.0, self._on_diagnostics, callback_group=group)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._status_due = 0.0
        self._stopped = ""  # the emergency stop outlives guards: it holds from the first moment of the node
        self._publishers_of: dict[str, Any] = {}
        for profile in (qos.EVENT, qos.LATCHED):  # one that was pressed before this node began counts too
            self.create_subscription(Bool, "emergency_stop", self._on_emergency_stop, profile)

    # -- transitions --

    @told
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the contract, find the server, make topics."""
        self.refusal = ""
        path = self._get("contract")
        if not path:
            raise UserError(
                "the parameter `contract` is not set: give the robot.yaml the policy was trained with"
            )
        contract = Contract.load(os.path.expanduser(path))
        self._codec = Codec(contract, RosTypes(), self._get("command_frame_id"))
        self._decode, which = pick_decoder(self._get("image_decoder"))
        self._chosen = self._task_of(contract, self._get("task"))
        given = self._get("socket")
        self._socket = Path(given).expanduser() if given else wire.default_socket(contract.name)
        self._card = self._find_server(contract)
        self.contract = contract
        self.guard = Guard(contract, self._guard_config())
        if self._stopped:
            self.guard.stop(self._stopped)
        try:
            self._subscribe()
            self._publish_to()
        except Exception:
            self._release()
            raise
        self.get_logger().info(
            f"configured for {contract.name}: {contract.rate_hz:g} Hz, {contract.latency_ms:g} ms from "
            f"capture to command, pictures decoded by {which}, policy {self._card['checkpoint']}"
        )
        return _SUCCESS

    @told
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Measure a decision, refuse if it does not fit, and drive."""
        assert self.contract is not None
        self.refusal = ""
        contract = self.contract
        self._alone()
        self._card = self._measure(contract)
        self.guard.config = self._guard_config()
        report = Report(contract.rate_hz, contract.latency_ms, {**self._card, "node": self.get_name()})
        is_simulated = self.get_parameter("use_sim_time").value
        config = LoopConfig(
            max_misses=self._get("max_misses"), recover_after=self._get("recover_after"),
            commands_per_tick=self._get("commands_per_tick"), longest_wait_s=0.002 if is_simulated else 0.02,
            early_ns=0 if is_simulated else 300_000, decision_ms=self._measured.p99,
        )  # fmt: skip
        loop = Loop(
            contract, self.guard, Inbox(tuple(s.name for s in contract.observations if s.role != "probe")),
            self._send, self._connect, self._now, report, config, self._log_loop, self._decode,
        )  # fmt: skip
        loop.task = self._chosen
        self._examiner = Examiner(loop, Thresholds(missed_warn=self._get("missed_warn"),
                                                   missed_error=self._get("missed_error"),
                                                   rate_warn=self._get("rate_warn")))  # fmt: skip
        cores = tuple(core for core in self._get("cores") if core >= 0)
        settings = Realtime(priority=self._get("priority"), cores=cores, lock_memory=self._get("lock_memory"))
        result = super().on_activate(state)  # publishers live before the first command
        self.runner = Runner(loop, settings, self.get_logger().info)
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
            self.get_logger().error("the loop did not end in time; the safety action was sent in its place")
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
        self._publishers_of = {}
        self._before.clear()
        self.contract = None

    # -- the server --

    def _find_server(self, contract: Contract) -> dict[str, Any]:
        """What the server says about itself, once it answers; raises WireError when the patience is over."""
        until = time.monotonic() + self._get("server_wait_s")
        while True:
            try:
                link = Link(self._socket, contract)
            except WireError as error:
                if time.monotonic() > until or "refuses" in str(error) or INTERRUPTED.wait(0.2):
                    raise
                continue
            link.close()
            return link.card

    def _connect(self) -> Link:
        """A link for the loop: to a server with the weights that were measured, and no others."""
        assert self.contract is not None
        link = Link(self._socket, self.contract, timeout_s=1.0)
        if link.card.get("weights") != self._card.get("weights"):
            link.close()
            raise WireError(
                "the inference server runs another policy than at activation ("
                f"{link.card.get('weights')}, not {self._card.get('weights')}): deactivate and activate it"
            )
        return link

    def _measure(self, contract: Contract) -> dict[str, Any]:
        link = Link(self._socket, contract)
        try:
            camera = contract.images[0]
            message, transport = self._before.get(camera.name, (None, Histogram()))
            size = None if message is None else self._decode(message).shape[:2]
            # the first pictures after a start are late, and would speak for all if there are few
            few = transport.count < _ENOUGH
            arrives = transport.smallest / 1e6 if few else transport.quantile_ms(0.5)
            arrives = max(0.0, arrives) if transport.count else 0.0
            measured = activation.measure(link, contract, size, arrives)
            self._measured = measured
            text = activation.require(measured, contract, self._get("allow_slow"))
            if measured.fits:
                self.get_logger().info(text)
            else:
                self.get_logger().warning(text)
        finally:
            link.close()
        return link.card

    def _alone(self) -> None:
        """Two nodes with one name are a mistake that looks like a ghost."""
        me = (self.get_name(), self.get_namespace())
        if self.get_node_names_and_namespaces().count(me) > 1:
            raise UserError(
                f"another node is called {self.get_fully_qualified_name()} too: start one of them only"
            )

    def _look_for_rivals(self) -> None:
        for topic, publisher in self._publishers_of.items():
            others = self.count_publishers(publisher.topic_name) - 1
            if others > 0:
                self._complain(
                    f"{others} other publishers command {topic} too; which one does the robot obey?"
                )

    # -- topics --

    def _subscribe(self) -> None:
        assert self.contract is not None
        c = self.contract
        for stream in c.observations:
            if stream.role == "input":
                self._listen(stream.topic, stream.type, functools.partial(self._on_sample, stream),
                             qos.sensor(self._get("observation_deadline_ms")))  # fmt: skip
        if c.tasks is not None:
            self._listen(c.tasks.topic, c.tasks.type, self._on_task, qos.EVENT)
        if c.episode.start is not None:
            self._listen(c.episode.start.topic, c.episode.start.type, self._on_start, qos.EVENT)
        if self._get("dead_man_button") >= 0:
            self._listen("joy", "sensor_msgs/msg/Joy", self._on_joy, qos.EVENT)

    def _listen(self, topic: str, type_: str, callback: Callable[[Any], None], profile: Any) -> None:
        subscription = self.create_subscription(
            message_class(type_), local(topic), callback, profile, qos_overriding_options=qos.overrides(),
            event_callbacks=qos.subscription_events(topic, self._complain),
        )  # fmt: skip
        self._entities.append((self.destroy_subscription, subscription))

    def _publish_to(self) -> None:
        assert self.contract is not None
        period_ns = None if self.get_parameter("use_sim_time").value else self.contract.period_ns
        self._publishers_of = {}
        for topic in self._codec.topics:
            publisher = self.create_lifecycle_publisher(
                message_class(topic.type), local(topic.name), qos.command(period_ns),
                qos_overriding_options=qos.overrides(is_publisher=True),
                event_callbacks=qos.publisher_events(topic.name, self._complain_driving),
            )  # fmt: skip
            self._entities.append((self.destroy_lifecycle_publisher, publisher))
            self._publishers_of[topic.name] = publisher

    def _send(self, verdict: Verdict, now_ns: int) -> None:
        """What moves the robot; called from the loop's thread, and from the watchdog's."""
        if not self.guard.config.send:
            return
        for topic, message in self._codec.messages(verdict.values, verdict.send, now_ns):
            self._publishers_of[topic].publish(message)

    def _on_sample(self, stream: Observation, msg: Any) -> None:
        now = self._now()
        stamp = now if stream.align.timeline == "receive" else messages.stamp_ns(msg)
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
        if self.runner is not None:
            self.runner.loop.put(stream.name, stamp, value)
        else:
            _, transport = self._before.setdefault(stream.name, (value, Histogram()))
            transport.add(now - stamp)
            self._before[stream.name] = (value, transport)

    def _on_task(self, msg: Any) -> None:
        assert self.contract is not None
        try:
            number = signals.task(self.contract, msg)
        except UserError as error:
            self._complain(str(error))
            return
        self._choose(number)

    def _on_start(self, msg: Any) -> None:
        if self.runner is not None:
            self.runner.loop.begin(self._now())

    def _on_emergency_stop(self, msg: Bool) -> None:
        if msg.data:
            self._stop("the topic emergency_stop says so")

    def _on_joy(self, msg: Joy) -> None:
        button = self._get("dead_man_button")
        held = button < len(msg.buttons) and bool(msg.buttons[button])
        self._with_guard(lambda guard: guard.switch(held, self._now()))

    # -- services --

    def _on_set_task(self, request: Any, response: Any) -> Any:
        if self.contract is None:
            response.success, response.message = False, "the node is not configured"
            return response
        try:
            self._choose(self._task_of(self.contract, request.task))
            response.success, response.message = True, request.task
        except UserError as error:
            response.success, response.message = False, str(error)
        return response

    def _on_stop(self, request: Any, response: Any) -> Any:
        self._stop("the service stop was called")
        response.success, response.message = True, "stopped; ~/reset_stop releases it"
        return response

    def _on_reset_stop(self, request: Any, response: Any) -> Any:
        self._stopped = ""
        self._with_guard(lambda guard: guard.reset_stop())
        response.success, response.message = True, "released"
        return response

    def _stop(self, reason: str) -> None:
        self._stopped = self._stopped or reason
        self.get_logger().warning(f"emergency stop: {reason}")
        self._with_guard(lambda guard: guard.stop(reason))

    def _with_guard(self, act: Callable[[Guard], None]) -> bool:
        """Tell the guard something, under the loop's lock while there is one; False if there is no guard."""
        if self.contract is None:
            return False
        runner = self.runner
        if runner is None:
            act(self.guard)
        else:
            with runner.loop.lock:
                act(self.guard)
        return True

    def _choose(self, number: int) -> None:
        assert self.contract is not None
        self._chosen = number
        runner = self.runner
        if runner is not None and runner.loop.task != number:
            runner.loop.task = number  # the server begins anew by itself when the task changes

    @staticmethod
    def _task_of(contract: Contract, name: str) -> int:
        names = contract.task_names
        if not name:
            return 0
        if name not in names:
            raise UserError(f"task {name!r} is not among the tasks of the contract: {', '.join(names)}")
        return names.index(name)

    # -- parameters --

    def _get(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _guard_config(self) -> GuardConfig:
        return GuardConfig(
            enabled=self._get("guard"), frozen_frames=self._get("frozen_frames"),
            ahead_ms=self._get("ahead_ms"), watchdog_ms=self._get("watchdog_ms"),
            dead_man=self._get("dead_man_button") >= 0,
            dead_man_ms=self._get("dead_man_ms"), send=not self._get("shadow"),
        )  # fmt: skip

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        task = None
        for parameter in parameters:
            if self.runner is not None and parameter.name in FIXED_WHILE_ACTIVE:
                return SetParametersResult(
                    successful=False, reason=f"{parameter.name} cannot change while the node is active"
                )
            if parameter.name == "task" and self.contract is not None:
                try:
                    task = self._task_of(self.contract, parameter.value)
                except UserError as error:
                    return SetParametersResult(successful=False, reason=str(error))
        if task is not None:  # all or nothing: only when no other parameter was refused
            self._choose(task)
        return SetParametersResult(successful=True)

    # -- what it says --

    def _log_loop(self, line: str) -> None:
        # rclpy refuses one place in the code that logs with changing severity
        if "safety action" in line:
            self.get_logger().warning(line)
        else:
            self.get_logger().info(line)

    def _complain_driving(self, text: str) -> None:
        """The promises of a command publisher count while commands are sent, not before the first."""
        if self.runner is not None and self.runner.loop.report.counts["commands"] > 1:
            self._complain(text)

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
        runner = self.runner
        if runner is None or self.contract is None:
            return msg
        loop, report = runner.loop, runner.loop.report
        if state == "waiting":
            msg.reason = "no picture has been answered yet"
        if state in RULES:
            msg.reason = self.guard.tally[state].reason
        msg.task = self.contract.task_names[loop.task]
        msg.shadow, msg.allow_slow = not self.guard.config.send, self._get("allow_slow")
        msg.commands, msg.missed = report.counts["commands"], report.counts["missed"]
        msg.safe = report.counts["safe"]
        stages = report.stages
        msg.rate_hz = report.achieved_hz
        msg.answer_p50_ms, msg.answer_p99_ms = (stages["answer"].quantile_ms(q) for q in (0.5, 0.99))
        msg.lateness_p99_ms, msg.age_p99_ms = (stages[s].quantile_ms(0.99) for s in ("lateness", "age"))
        msg.reward = loop.reward
        msg.checkpoint, msg.weights = str(self._card.get("checkpoint")), str(self._card.get("weights"))
        return msg

    def _on_diagnostics(self) -> None:
        findings = [] if self.runner is None else self._examiner.look()
        if findings:
            self._look_for_rivals()
        if self.runner is None:
            level = ERROR if self.refusal else OK
            findings = [Finding("commands", level, self.refusal or "inactive", {})]
        robot = "" if self.contract is None else self.contract.name
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(diagnostics(findings, self.get_name(), robot, stamp))


def main() -> None:
    """Entry point of `ros2 run d4_nodes policy_node`."""
    sys.exit(spin(PolicyNode))


if __name__ == "__main__":
    main()
