"""Run a policy from a Python script: a task, a time limit, and what became of it.

    from d4_nodes.client import PolicyClient

    with PolicyClient() as client:
        result = client.run("reach_red", timeout_s=30)
    print(result.reason, result.seconds)

Needs rclpy and a policy node that runs; needs no `rclpy.init`. Every wait is bounded.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import rclpy
from d4_interfaces.msg import PolicyStatus
from d4_interfaces.srv import SetTask
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from std_srvs.srv import Trigger

from d4_datasets import fields
from d4_datasets.contract import Signal
from d4_datasets.errors import UserError
from d4_nodes.ros import qos
from d4_nodes.ros.shell import local, message_class

_LOST_S = 2.0  # without a status, which comes twice a second
_LOOK_S = 0.05
_SETTLE_S = 0.1  # a status that comes so soon after the activation may be of before
_SERVICES = {
    "set_task": SetTask, "stop": Trigger, "reset_stop": Trigger, "change_state": ChangeState,
    "get_state": GetState,
}  # fmt: skip
_numbers = itertools.count()


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        reason: `timeout` the time was over; `terminal` the terminal topic said so; `refused` it did not
            begin; `stopped` by the emergency stop, or deactivated by somebody else; `lost` the node is not
            heard of any more.
        seconds: from activation to the end.
        commands, missed, safe: ticks with a command, of these late answers, and safety actions; as the node
            said last, up to half a second before the end.
        message: the reason in words.
    """

    reason: str
    seconds: float = 0.0
    commands: int = 0
    missed: int = 0
    safe: int = 0
    message: str = ""


class PolicyClient:
    """Speaks with one policy node; usable from several threads, so that one may `stop` what another runs.

    Args:
        node_name, namespace: of the policy node.
        patience_s: how long an answer may take.
        configure_s: how long configuring and activating may take: a server starts, a decision is measured.
    """

    def __init__(
        self,
        node_name: str = "policy",
        namespace: str = "",
        patience_s: float = 10.0,
        configure_s: float = 90.0,
    ) -> None:
        self._name, self._namespace = node_name, namespace.strip("/")
        self._patience_s, self._configure_s = patience_s, configure_s
        self._news = threading.Condition()
        self._open()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        """A context of its own: the script may or may not use rclpy itself."""
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context)
        self._node = rclpy.create_node(
            f"policy_client_{os.getpid()}_{next(_numbers)}", context=self._context, namespace=self._namespace,
            start_parameter_services=False,
        )  # fmt: skip
        self._status: tuple[float, PolicyStatus] | None = None  # when it came, monotonic s
        self._is_terminal = False
        self._ended = threading.Event()
        self._node.create_subscription(PolicyStatus, f"{self._name}/status", self._on_status, qos.LATCHED)
        self._clients = {
            name: self._node.create_client(kind, f"{self._name}/{name}") for name, kind in _SERVICES.items()
        }
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="policy_client", daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        try:
            while not self._ended.is_set() and self._context.ok():
                self._executor.spin_once(timeout_sec=0.1)
        except Exception:
            if self._context.ok():
                raise

    def close(self) -> None:
        """Let go of everything; the node stays as it is."""
        self._ended.set()
        self._thread.join(2.0)
        if self._context.ok():
            self._node.destroy_node()
            rclpy.shutdown(context=self._context)

    # -- what it does --

    def run(self, task: str = "", timeout_s: float = 30.0, terminal: str | Signal = "") -> Result:
        """Drive a task until the time is over or something ends it before.

        An unconfigured node is configured, an inactive one activated, and deactivated at the end unless it
        was active before. Ctrl-C stops the robot by the emergency stop, which stays until `reset_stop`,
        deactivates the node and goes on as KeyboardInterrupt.

        Args:
            task: of the contract; empty: its first.
            timeout_s: seconds from activation.
            terminal: topic whose message ends the run when it is true: of type std_msgs/msg/Bool, or a
                contract's `episode.terminal`. Empty: none.

        Raises:
            UserError: there is no such node, or it does not answer.
        """
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise UserError(f"timeout_s is {timeout_s}: give a number of seconds above 0")
        was_active = self._state() == "active"
        subscription = self._listen(terminal)
        try:
            refusal = self._begin(task)
            result = Result("refused", message=refusal) if refusal else self._watch(timeout_s, was_active)
        except KeyboardInterrupt:
            self._try(self.stop)
            if not was_active:
                self._try(self._deactivate)
            raise
        except BaseException:
            if not was_active:
                self._try(self._deactivate)
            raise
        finally:
            if subscription is not None:
                # by the thread that spins: Humble's executor may be waiting for it just now
                self._executor.create_task(self._node.destroy_subscription, subscription)
        if not was_active and result.reason != "refused" and (failure := self._try(self._deactivate)):
            return Result(**{**vars(result), "message": f"{result.message}; {failure}"})
        return result

    def stop(self) -> None:
        """Emergency stop: safety actions from now on, until `reset_stop`.

        Raises:
            UserError: the node does not answer, or is not configured.
        """
        self._trigger("stop")

    def reset_stop(self) -> None:
        """Release the emergency stop.

        Raises:
            UserError: the node does not answer, or is not configured.
        """
        self._trigger("reset_stop")

    def status(self) -> PolicyStatus:
        """What the node says of itself, at most two seconds old.

        Raises:
            UserError: it says nothing.
        """
        with self._news:
            if not self._news.wait_for(lambda: self._age_s() < _LOST_S, self._patience_s):
                raise UserError(f"{self._where} says nothing: is it running, with this ROS_DOMAIN_ID?")
            assert self._status is not None
            return self._status[1]

    # -- a run --

    def _begin(self, task: str) -> str:
        """Configure, set the task, activate, as far as that is needed; why not, if the node refuses."""
        if self._state() == "unconfigured" and not self._change(Transition.TRANSITION_CONFIGURE):
            return self._refusal("cannot be configured")
        answer = self._call("set_task", SetTask.Request(task=task), self._patience_s)
        if not answer.success:
            return str(answer.message)
        if self._state() == "inactive" and not self._change(Transition.TRANSITION_ACTIVATE):
            return self._refusal("cannot be activated")
        return ""

    def _refusal(self, what: str) -> str:
        """Why a transition was refused: the node says it in its next status."""
        since, text = time.monotonic(), f"{self._where} {what}"
        with self._news:
            self._news.wait_for(lambda: getattr(self._status_since(since), "reason", ""), 1.5)
            reason = getattr(self._status_since(since), "reason", "")
        return f"{text}: {reason}" if reason else f"{text}: see its log"

    def _status_since(self, since: float) -> PolicyStatus | None:
        """The newest status, if it came after a moment (monotonic s)."""
        return self._status[1] if self._status is not None and self._status[0] > since else None

    def _watch(self, timeout_s: float, was_active: bool) -> Result:
        began, self._is_terminal = time.monotonic(), False
        first = self._status[1] if was_active and self._status is not None else None
        last, has_driven = first, False
        while True:
            with self._news:
                self._news.wait(_LOOK_S)
                status = self._status_since(began + _SETTLE_S)
                spent, age = time.monotonic() - began, min(self._age_s(), time.monotonic() - began)
            is_inactive = status is not None and status.state == "inactive"
            if status is not None and not is_inactive:
                last, has_driven = status, True
            reason, message = "", ""
            if self._is_terminal:
                reason, message = "terminal", "the terminal topic said so"
            elif age > _LOST_S:
                reason, message = "lost", f"{self._where} was last heard of {age:.1f} s ago"
            elif status is not None and status.state == "emergency_stop":
                reason, message = "stopped", f"{status.reason}; reset_stop() releases it"
            elif is_inactive and (has_driven or spent > _LOST_S):
                reason, message = "stopped", f"{self._where} is no longer active"
                message += f": {status.reason}" if status.reason else ""
            elif spent >= timeout_s:
                reason, message = "timeout", f"{timeout_s:g} s are over"
            if reason:
                return Result(reason, spent, *_counts(first, last), message)

    def _listen(self, terminal: str | Signal) -> Any:
        """Subscribe to what ends a run; None if nothing was named."""
        if not terminal:
            return None
        signal = Signal(terminal, "std_msgs/msg/Bool", "data") if isinstance(terminal, str) else terminal

        def take(msg: Any) -> None:
            with self._news:
                self._is_terminal |= bool(fields.get(msg, signal.select))
                self._news.notify_all()

        kind = message_class(signal.type)
        return self._node.create_subscription(kind, local(signal.topic), take, qos.EVENT)

    # -- the node --

    @property
    def _where(self) -> str:
        return f"the node /{self._namespace}/{self._name}".replace("//", "/")

    def _on_status(self, msg: PolicyStatus) -> None:
        with self._news:
            self._status = (time.monotonic(), msg)
            self._news.notify_all()

    def _age_s(self) -> float:
        return math.inf if self._status is None else time.monotonic() - self._status[0]

    def _state(self) -> str:
        """The node's lifecycle state, once no transition is under way."""
        end = time.monotonic() + self._configure_s
        while True:
            state = self._call("get_state", GetState.Request(), self._patience_s).current_state.label
            if state in ("unconfigured", "inactive", "active"):
                return str(state)
            if state == "finalized" or time.monotonic() > end:
                raise UserError(f"{self._where} is {state}: start it again")
            time.sleep(_LOOK_S)

    def _change(self, transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return bool(self._call("change_state", request, self._configure_s).success)

    def _deactivate(self) -> None:
        if self._state() == "active" and not self._change(Transition.TRANSITION_DEACTIVATE):
            raise UserError(f"{self._where} refuses to be deactivated")

    def _trigger(self, name: str) -> None:
        answer = self._call(name, Trigger.Request(), self._patience_s)
        if not answer.success:
            raise UserError(f"{self._where} refuses {name}: {answer.message}")

    def _try(self, act: Any) -> str:
        """Do one step of an ending; what failed, in words, which must not hinder the next step."""
        try:
            act()
        except UserError as error:
            self._node.get_logger().error(str(error))
            return str(error)
        return ""

    def _call(self, name: str, request: Any, timeout_s: float) -> Any:
        """The node's answer; raises UserError when there is none in time."""
        try:
            return self._ask(name, request, timeout_s)
        except Exception:
            if self._context.ok():
                raise
        # Ctrl-C in a script with rclpy's own signal handlers ends every context, a little later
        self._ended.set()
        self._thread.join(_LOST_S)
        self._open()
        return self._ask(name, request, timeout_s)

    def _ask(self, name: str, request: Any, timeout_s: float) -> Any:
        client, end = self._clients[name], time.monotonic() + timeout_s
        if not client.wait_for_service(min(timeout_s, self._patience_s)):
            raise UserError(f"{self._where} does not exist: is it running, with this ROS_DOMAIN_ID?")
        future, done = client.call_async(request), threading.Event()
        future.add_done_callback(lambda _: done.set())
        while not done.wait(_LOOK_S):
            if time.monotonic() > end or not self._context.ok():
                client.remove_pending_request(future)
                raise UserError(f"{self._where} has not answered {name} for {timeout_s:g} s")
        return future.result()


def _counts(first: PolicyStatus | None, last: PolicyStatus | None) -> tuple[int, int, int]:
    """Commands, missed and safe of this run."""
    names = ("commands", "missed", "safe")
    before = [0 if first is None else int(getattr(first, name)) for name in names]
    after = [0 if last is None else int(getattr(last, name)) for name in names]
    commands, missed, safe = (max(0, b - a) for a, b in zip(before, after, strict=True))
    return commands, missed, safe
