"""The training node: an action that trains, as d4-ingest and d4-train do, in processes of their own.

The executor's thread answers; a second thread follows the training and publishes feedback. With the
parameter `dataset` or `bags` the node sends itself that goal at once and ends when it is done.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import traceback
from contextlib import closing
from typing import Any

from d4_interfaces.action import Train
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.action import ActionClient, ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.node import Node
from rclpy.task import Future

from d4_nodes.ros.shell import Parameter, declare, spin
from d4_nodes.training import Goal, Outcome, Progress, Training

PARAMETERS = (
    Parameter(
        "server_python", os.environ.get("D4_PYTHON", "python3"),
        "Python that has d4 installed (torch); default: $D4_PYTHON, or python3",
    ),
    Parameter("stop_s", 60.0, "time to save and leave after a cancel, s; then it is killed", (1, 3600)),
    Parameter("dataset", "", "train at once, and end: the goal's dataset folder", read_only=True),
    Parameter("bags", "", "train at once, and end: the goal's bags, separated by blanks", read_only=True),
    Parameter("contract", "", "of the goal sent at once: robot.yaml, needed with bags", read_only=True),
    Parameter("out", "", "of the goal sent at once: run folder", read_only=True),
    Parameter("phase", "", "of the goal sent at once: a phase; empty: all", read_only=True),
    Parameter("preset", "", "of the goal sent at once: size of the models", read_only=True),
    Parameter("overrides", "", "of the goal sent at once: further options of d4-train", read_only=True),
)  # fmt: skip


_FLOAT32_MAX = 3.4e38  # what does not fit is no message


class TrainingNode(Node):
    """Serves `~/train`, one goal at a time."""

    def __init__(self) -> None:
        super().__init__("training")
        declare(self, PARAMETERS)
        self.ended, self.failed = threading.Event(), False
        self._is_busy, self._is_closing = False, False
        self._training: Training | None = None
        self._newest: Progress | None = None
        self._last: Outcome | None = None
        self._server = ActionServer(
            self,
            Train,
            "~/train",
            self._execute,
            goal_callback=self._on_goal,
            cancel_callback=self._on_cancel,
        )
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._on_diagnostics)
        if self._get("dataset") or self._get("bags"):
            self._client = ActionClient(self, Train, "~/train")
            self._sender = self.create_timer(0.05, self._send)
        else:
            self.get_logger().info("waiting for goals of ~/train")

    def _get(self, name: str) -> Any:
        return self.get_parameter(name).value

    def secure(self) -> None:
        """Stop what runs, wait until it has saved, and let whoever waits for the result have it."""
        self._is_closing = True
        if self._training is not None:
            self.get_logger().info("stopping the training; it saves first")
            self._training.stop()
        while self._is_busy:
            self.executor.spin_once(timeout_sec=0.1)
        self.executor.spin_once(timeout_sec=0.1)  # a result that was asked for is sent by the next round

    # -- goals --

    def _on_goal(self, request: Train.Goal) -> GoalResponse:
        if self._is_busy or self._is_closing:
            why = "the node is about to end" if self._is_closing else "another goal is being trained"
            self.get_logger().warning(f"a goal was rejected: {why}, and one runs at a time")
            return GoalResponse.REJECT
        self._is_busy = True
        return GoalResponse.ACCEPT

    def _on_cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        if self._training is not None:
            self._training.stop()
        return CancelResponse.ACCEPT

    async def _execute(self, handle: ServerGoalHandle) -> Train.Result:
        """Wait for the thread that trains, without holding the executor up."""
        request, done = handle.request, Future(executor=self.executor)
        goal = Goal(
            dataset=request.dataset, bags=tuple(request.bags), contract=request.contract, out=request.out,
            phase=request.phase, preset=request.preset, overrides=tuple(request.overrides),
        )  # fmt: skip
        self._newest = self._last = None
        training = Training(goal, self._get("server_python"), self._say, self._get("stop_s"))
        self._training = training
        if self._is_closing or handle.is_cancel_requested:  # came before there was anything to stop
            training.stop()
        threading.Thread(target=self._follow, args=(training, handle, done), name="training").start()
        outcome = await done
        self._conclude(handle, outcome)
        return Train.Result(success=outcome.success, message=outcome.message, checkpoint=outcome.checkpoint)

    def _follow(self, training: Training, handle: ServerGoalHandle, done: Future) -> None:
        """The thread of one training: the child lives no longer than it."""
        try:
            with closing(training.run()) as stages:
                for progress in stages:
                    self._newest = progress
                    handle.publish_feedback(_feedback(progress))
            done.set_result(training.outcome)
        except Exception as error:
            self.get_logger().error(traceback.format_exc())
            done.set_result(Outcome(False, f"the node failed: {error!r}"))

    def _conclude(self, handle: ServerGoalHandle, outcome: Outcome) -> None:
        self._training, self._newest, self._last, self._is_busy = None, None, outcome, False
        text = outcome.message + (f"; checkpoint: {outcome.checkpoint}" if outcome.checkpoint else "")
        if outcome.success:
            self.get_logger().info(text)
            handle.succeed()
            return
        if outcome.stopped:
            self.get_logger().warning(text)
        else:
            self.get_logger().error(text)
        if handle.is_cancel_requested:
            handle.canceled()
        else:
            handle.abort()

    def _say(self, line: str) -> None:
        self.get_logger().info(line)

    # -- the goal of the parameters --

    def _send(self) -> None:
        if not self._client.server_is_ready():
            return
        self._sender.cancel()
        goal = Train.Goal(
            **{name: self._get(name) for name in ("dataset", "contract", "out", "phase", "preset")}
        )
        goal.bags, goal.overrides = shlex.split(self._get("bags")), shlex.split(self._get("overrides"))
        self._client.send_goal_async(goal).add_done_callback(self._on_answer)

    def _on_answer(self, answer: Future) -> None:
        handle = answer.result()
        if not handle.accepted:  # another client was faster
            self.failed = True
            self.ended.set()
            return
        handle.get_result_async().add_done_callback(self._on_result)

    def _on_result(self, answer: Future) -> None:
        self.failed = not (answer.result().result.success or self._is_closing)
        self.ended.set()

    # -- diagnostics --

    def _on_diagnostics(self) -> None:
        status = DiagnosticStatus(level=DiagnosticStatus.OK, name=f"{self.get_name()}: training")
        progress = self._newest
        if progress is not None:
            status.message = f"{progress.stage}, step {progress.step} of {progress.steps}"
            values = {"seconds_left": progress.seconds_left, **progress.values}
            status.values = [KeyValue(key=name, value=f"{value:.6g}") for name, value in values.items()]
        elif self._is_busy:
            status.message = "starting"
        elif self._last is None:
            status.message = "waiting for goals"
        else:
            status.message = self._last.message
            if not (self._last.success or self._last.stopped):
                status.level = DiagnosticStatus.ERROR
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)


def _feedback(progress: Progress) -> Train.Feedback:
    values = {name: value for name, value in progress.values.items() if abs(value) < _FLOAT32_MAX}
    return Train.Feedback(
        stage=progress.stage, step=progress.step, steps=progress.steps, seconds_left=progress.seconds_left,
        names=list(values), values=list(values.values()),
    )  # fmt: skip


def main() -> None:
    """Entry point of `ros2 run d4_nodes training_node`."""
    sys.exit(spin(TrainingNode))


if __name__ == "__main__":
    main()
