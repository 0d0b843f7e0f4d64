"""The policy node: cameras and joints in, guarded commands out, each at capture time plus `latency_ms`.

A lifecycle node around `d4_nodes.loop`; the policy itself is in the inference server, another process with
another Python. The executor's thread takes messages and hands them over; the loop's thread decides and
publishes; neither waits for the other.

    configure     read the contract, find the server, make topics
    activate      measure a decision, refuse if it does not fit into the contract, drive
    deactivate    stop, wait (bounded), safety action last; report
"""

from __future__ import annotations

import sys
from typing import Any

from d4_interfaces.msg import PolicyStatus
from d4_interfaces.srv import SetTask
from rcl_interfaces.msg import SetParametersResult

from d4_datasets import signals
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes import activation
from d4_nodes.activation import Measured
from d4_nodes.health import Examiner, Finding
from d4_nodes.inbox import inbox_of
from d4_nodes.link import Link
from d4_nodes.loop import Loop, LoopConfig
from d4_nodes.output import never_blocking
from d4_nodes.report import Histogram, Report
from d4_nodes.ros import qos
from d4_nodes.ros.commanding import CommandingNode
from d4_nodes.ros.pictures import pick_decoder
from d4_nodes.ros.policy_parameters import PARAMETERS
from d4_nodes.ros.shell import spin
from d4_nodes.wire import WireError

_FEW, _ENOUGH = 3, 10  # pictures until the least, and the median, of their transports mean something


class PolicyNode(CommandingNode[Loop]):
    """See the module; parameters are those of `policy_parameters`."""

    def __init__(self) -> None:
        super().__init__("policy", PARAMETERS)
        self._before: dict[str, tuple[int, Any, Histogram]] = {}  # while inactive: newest sample, transport
        self.create_service(SetTask, "~/set_task", self._on_set_task)

    # -- transitions --

    def _configure(self, contract: Contract) -> str:
        self._decode, which = pick_decoder(self._get("image_decoder"))
        self._chosen = task_of(contract, self._get("task"))
        self._socket = self._socket_of(contract.name)
        self._card = self._await_server(lambda: Link(self._socket, contract)).card
        self._observe(contract)
        if contract.tasks is not None:
            self._listen(contract.tasks.topic, contract.tasks.type, self._on_task, qos.EVENT)
        if contract.episode.start is not None:
            self._listen(contract.episode.start.topic, contract.episode.start.type, self._on_start, qos.EVENT)
        self._command(contract)
        return (
            f"{contract.rate_hz:g} Hz, {contract.latency_ms:g} ms from capture to command, pictures decoded "
            f"by {which}, policy {self._card['checkpoint']}, step: {self._card.get('step', 'unknown')}"
        )

    def _prepare(self, contract: Contract) -> None:
        assert self.guard is not None
        self._refuse_rivals()
        measured = self._measured = self._measure(contract)
        self.guard.config = self._guard_config(watchdog_ms=self._get("watchdog_ms") or None)
        slow = {"allow_slow": not measured.fits, "decision_ms": measured._asdict()}
        report = Report(contract.rate_hz, contract.latency_ms, {**self._card, **self._about(), **slow})
        config = LoopConfig(
            max_misses=self._get("max_misses"), recover_after=self._get("recover_after"),
            commands_per_tick=self._get("commands_per_tick"), decision_ms=measured.p99,
            longest_wait_s=0.002 if self._is_simulated else 0.02,
            early_ns=0 if self._is_simulated else 300_000,
        )  # fmt: skip
        self._loop = Loop(
            contract, self.guard, inbox_of(contract), self._send, self._connect, self._now, report, config,
            self._log_driver, self._decode,
        )  # fmt: skip
        self._loop.task = self._chosen
        for stream in contract.vectors("input"):
            if stream.holds_for_ever and stream.name in self._before:
                self._loop.put(stream.name, *self._before[stream.name][:2])
        self._examiner = Examiner(self._loop, self._thresholds())

    def _start(self) -> None:
        self._run(self._loop)

    def _release(self) -> None:
        super()._release()
        self._before.clear()

    # -- the server --

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

    def _measure(self, contract: Contract) -> Measured:
        """What a decision takes with pictures such as come now; refuses if that is too long."""
        newest = {name: sample for name, (_, sample, _) in self._before.items()}
        pictures = activation.sources(contract, newest, self._decode)
        link = Link(self._socket, contract)
        try:
            measured = activation.measure(link, contract, pictures, self._arrives_ms(contract))
        finally:
            link.close()
        self._card = link.card
        text = activation.require(measured, self._get("allow_slow"))
        if measured.fits:
            self.get_logger().info(text)
        else:
            self.get_logger().warning(text)
        return measured

    def _arrives_ms(self, contract: Contract) -> float:
        """What a picture needs to get here, ms."""
        _, _, transport = self._before.get(contract.images[0].name, (0, None, Histogram()))
        if transport.count < _FEW:  # the first ones after a start are late, and would speak for all
            return 0.0
        few = transport.count < _ENOUGH
        return max(0.0, transport.smallest / 1e6 if few else transport.quantile_ms(0.5))

    # -- topics and services --

    def _take(self, stream: str, stamp_ns: int, value: Any) -> None:
        if self.runner is not None:
            self.runner.loop.put(stream, stamp_ns, value)
            return
        transport = self._before[stream][2] if stream in self._before else Histogram()
        transport.add(self._now() - stamp_ns)
        self._before[stream] = (stamp_ns, value, transport)

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

    def _on_set_task(self, request: Any, response: Any) -> Any:
        if self.contract is None:
            response.success, response.message = False, "the node is not configured"
            return response
        try:
            self._choose(task_of(self.contract, request.task))
            response.success, response.message = True, request.task
        except UserError as error:
            response.success, response.message = False, str(error)
        return response

    def _choose(self, number: int) -> None:
        self._chosen = number
        if self.runner is not None and self.runner.loop.task != number:
            self.runner.loop.task = number  # the server begins anew by itself when the task changes

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        result = super()._on_parameters(parameters)
        names = [parameter.value for parameter in parameters if parameter.name == "task"]
        if not result.successful or not names or self.contract is None:
            return result
        try:
            self._choose(task_of(self.contract, names[-1]))
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return result

    # -- what it says --

    def _findings(self) -> list[Finding]:
        if self.runner is None:
            return []
        self._look_for_rivals()
        return self._examiner.look()

    def _tell_more(self, msg: PolicyStatus, driver: Loop) -> None:
        if driver.state == "waiting":
            msg.reason = "no picture has been answered yet"
        msg.task = driver.contract.task_names[driver.task]
        msg.allow_slow = not self._measured.fits
        stages = driver.report.stages
        msg.answer_p50_ms, msg.answer_p99_ms = (stages["answer"].quantile_ms(q) for q in (0.5, 0.99))
        msg.lateness_p99_ms, msg.age_p99_ms = (stages[s].quantile_ms(0.99) for s in ("lateness", "age"))
        msg.reward = driver.reward
        msg.checkpoint, msg.weights = str(self._card.get("checkpoint")), str(self._card.get("weights"))


def task_of(contract: Contract, name: str) -> int:
    """The number of a task; of the first if there is no name. Raises UserError for one that is none."""
    names = contract.task_names
    if not name:
        return 0
    if name not in names:
        raise UserError(f"task {name!r} is not among the tasks of the contract: {', '.join(names)}")
    return names.index(name)


def main() -> None:
    """Entry point of `ros2 run d4_nodes policy_node`."""
    with never_blocking():
        code = spin(PolicyNode)
    sys.exit(code)


if __name__ == "__main__":
    main()
