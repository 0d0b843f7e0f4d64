"""``d4-bench``: the robot's loop, guard and server process without ROS, under a simulated camera (`latency`),
and a policy over recorded frames again (`replay`).

Everything is what a robot runs, but for the camera, which is a thread here, and the motors, which only note
what comes. Camera, transport and the server's answers can be made late and to jitter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import tyro

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError, run_cli
from d4_datasets.messages import decode
from d4_nodes import activation, realtime
from d4_nodes.guard import Guard, GuardConfig, Verdict
from d4_nodes.inbox import inbox_of
from d4_nodes.link import Link
from d4_nodes.loop import Loop, LoopConfig
from d4_nodes.report import Histogram, Report, write_json
from d4_nodes.watchdog import Watchdog
from d4_nodes.wire import WireError

_NUM_PICTURES = 32


@dataclass(kw_only=True)
class LatencyArgs:
    """Run the loop for a while against a simulated camera and report what it kept of its promise; after
    Ctrl-C, of what it did until then.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint or run folder."""
    seconds: float = 60.0
    """How long."""
    rate_hz: float | None = None
    """Ticks per second instead of the contract's."""
    latency_ms: float | None = None
    """Capture to command instead of the contract's."""
    source: tuple[int, int] | None = None
    """Height and width of the camera's pictures; default: the contract's size, so that nothing is resized."""
    camera_hz: float | None = None
    """Pictures per second; default: one per tick."""
    camera_jitter_ms: float = 0.0
    """Standard deviation of capture times."""
    transport_ms: float = 1.0
    """Capture to arrival."""
    transport_jitter_ms: float = 0.0
    """Standard deviation of that; it never gets below 0."""
    server_delay_ms: float = 0.0
    """How much later the server answers."""
    server_jitter_ms: float = 0.0
    """Standard deviation of that; it never gets below 0."""
    commands_per_tick: int = 1
    """Commands per tick, interpolated."""
    priority: int = 0
    """SCHED_FIFO priority of the loop; 0: the usual scheduler."""
    allow_slow: bool = False
    """Go on although a decision does not fit into the contract's latency."""
    threads: int | None = None
    """Compute threads of the server."""
    server_python: str = sys.executable
    """Interpreter that runs the server."""
    out: Path | None = None
    """Write the report as JSON here, too."""
    seed: int = 0
    """Decides pictures, jitter and what the server draws."""


@dataclass(kw_only=True)
class ReplayArgs:
    """Run a policy again over what a robot recorded while it drove, and compare command by command."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint or run folder that drove."""
    dataset: Annotated[Path, tyro.conf.Positional]
    """What d4-ingest made of the robot's bags."""
    seed: int = 0
    """As the server had it."""
    argmax: bool = False
    """As the server had it."""


class ServerProcess:
    """An inference server as a process of its own, which ends with the block.

    Args:
        command: what runs it; it must print one line of JSON when it is ready.

    Raises:
        UserError: it ends before it is ready.
    """

    def __init__(self, command: list[str], timeout_s: float = 120.0) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        timer = threading.Timer(timeout_s, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        except BaseException:  # Ctrl-C: nobody else would end it
            self.__exit__()
            raise
        finally:
            timer.cancel()
        if not line:
            code = self.process.wait()
            raise UserError(f"the inference server ended with code {code} before it was ready, see above")
        self.ready: dict[str, Any] = json.loads(line)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def image(pixels: np.ndarray) -> SimpleNamespace:
    """A picture (H, W, 3) as sensor_msgs/Image has it."""
    height, width, _ = pixels.shape
    return SimpleNamespace(
        height=height, width=width, encoding="rgb8", is_bigendian=0, step=3 * width, data=pixels.tobytes()
    )


class Camera:
    """A thread that takes pictures on a clock and hands them to the loop a little later.

    Vectors of the contract come along with every picture. `pause` and `freeze` are faults that can be
    switched.
    """

    def __init__(self, loop: Loop, args: LatencyArgs, size: tuple[int, int]) -> None:
        self.loop, self.args = loop, args
        self.pause = self.freeze = False
        self.shift_ns = 0  # added to every stamp
        rng = np.random.default_rng(args.seed)
        shape = (_NUM_PICTURES, *size, 3)
        self._pictures = [image(pixels) for pixels in rng.integers(0, 256, shape, np.uint8)]
        self._rng, self._ended = rng, threading.Event()
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)

    def start(self) -> None:
        """Begin to take pictures."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        contract, args, rng = self.loop.contract, self.args, self._rng
        period = 1e9 / (args.camera_hz or contract.rate_hz)
        first, number = time.time_ns() + 50_000_000, 0
        while not self._ended.is_set():
            stamp = first + round(number * period + 1e6 * args.camera_jitter_ms * rng.standard_normal())
            wait_ms = max(0.0, args.transport_ms + args.transport_jitter_ms * rng.standard_normal())
            self._ended.wait(max(0.0, (stamp - time.time_ns()) / 1e9 + wait_ms / 1e3))
            if not self.pause:
                self._take(stamp + self.shift_ns, 0 if self.freeze else number)
            number += 1

    def _take(self, stamp: int, number: int) -> None:
        contract = self.loop.contract
        for vector in contract.vectors("input"):
            self.loop.put(vector.name, stamp, np.zeros(len(vector.select), np.float32))
        for camera in reversed(contract.images):  # the first one last: it is the one that starts a tick
            self.loop.put(camera.name, stamp, self._pictures[number % len(self._pictures)])


class Motors:
    """Notes when commands come and what is wrong with them."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.gaps = Histogram()
        self.outside = 0
        self.commands: list[tuple[int, bool, tuple[str, ...]]] = []  # time, is it a safety action, rules
        self._last_ns = 0

    def __call__(self, verdict: Verdict, now_ns: int) -> None:
        """Take a command."""
        values = verdict.values[verdict.send]
        low, high = self.contract.action_low[verdict.send], self.contract.action_high[verdict.send]
        self.outside += not bool((np.isfinite(values) & (values >= low) & (values <= high)).all())
        if self._last_ns:
            self.gaps.add(now_ns - self._last_ns)
        self._last_ns = now_ns
        if len(self.commands) < 100_000:
            self.commands.append((now_ns, verdict.is_safe, verdict.rules))


def with_times(contract: Contract, rate_hz: float | None, latency_ms: float | None) -> Contract:
    """The contract with other times; only for measuring, a robot keeps those it was trained with."""
    return dataclasses.replace(
        contract, rate_hz=rate_hz or contract.rate_hz, latency_ms=latency_ms or contract.latency_ms
    )


def reference_lateness(period_s: float, count: int = 100) -> Histogram:
    """How late a bare sleep to absolute deadlines wakes on this machine now."""
    lateness = Histogram()
    due = time.monotonic_ns()
    for _ in range(count):
        due += round(1e9 * min(period_s, 0.02))
        time.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
        lateness.add(time.monotonic_ns() - due)
    return lateness


def latency(args: LatencyArgs) -> dict[str, Any]:
    """Run the loop against a server process; returns the report as JSON values and prints it."""
    with tempfile.TemporaryDirectory(prefix="d4-bench-") as folder:
        path = Path(folder) / "d4.sock"
        command = [args.server_python, "-m", "d4_nodes.server", str(args.checkpoint), "--socket", str(path)]
        command += ["--delay-ms", str(args.server_delay_ms), "--jitter-ms", str(args.server_jitter_ms)]
        command += ["--seed", str(args.seed)]
        command += [] if args.threads is None else ["--threads", str(args.threads)]
        with ServerProcess(command) as server:
            return _measure(args, path, server)


def _measure(args: LatencyArgs, path: Path, server: ServerProcess) -> dict[str, Any]:
    own = Contract.load(Path(server.ready["checkpoint"]) / "contract.yaml")
    contract = with_times(own, args.rate_hz, args.latency_ms)
    size = args.source or contract.images[0].size
    assert size is not None
    with contextlib.closing(Link(path, own)) as link:
        decision = _decision(args, link, contract, size)
    print(f"step: {server.ready.get('step', 'unknown')}")
    arguments = {k: str(v) for k, v in dataclasses.asdict(args).items()}
    about = {**server.ready, "allow_slow": not decision.fits, "arguments": arguments}
    report = Report(contract.rate_hz, contract.latency_ms, about)
    guard, motors = Guard(contract, GuardConfig()), Motors(contract)
    loop = Loop(
        contract, guard, inbox_of(contract), motors, lambda: Link(path, own), time.time_ns, report,
        LoopConfig(commands_per_tick=args.commands_per_tick, decision_ms=decision.p99),
    )  # fmt: skip
    reference = reference_lateness(contract.period_ns / 1e9)
    is_whole = _drive(args, loop, Camera(loop, args, size))
    rules = {name: dataclasses.asdict(tally) for name, tally in guard.tally.items()}
    result = report.to_dict(rules) | {
        "interrupted": not is_whole, "decision_ms": decision._asdict(),
        "reference_sleep_ms": reference.summary_ms(), "command_gap_ms": motors.gaps.summary_ms(),
        "commands_outside_contract": motors.outside,
    }  # fmt: skip
    result["ratios"] = _ratios(result)
    print(report.text(rules))
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.3f}")
    if args.out is not None:
        write_json(args.out, result)
    return result


def _decision(
    args: LatencyArgs, link: Link, contract: Contract, size: tuple[int, int]
) -> activation.Measured:
    """What a decision takes, as the policy node measures it; UserError if that is too long."""
    noise = image(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    pictures = {camera.name: functools.partial(decode, noise) for camera in contract.images}
    measured = activation.measure(link, contract, pictures, args.transport_ms)
    print(activation.require(measured, args.allow_slow))
    return measured


def _drive(args: LatencyArgs, loop: Loop, camera: Camera) -> bool:
    """Run camera, watchdog and loop for a while; the loop has this thread. False if Ctrl-C came first, which
    lets the loop come to its end; a second one does not wait for that.
    """
    for line in realtime.prepare_thread(args.priority):
        print(f"warning: {line}")
    is_over = threading.Event()
    interrupts: list[int] = []

    def stop_in_time() -> None:
        is_over.wait(args.seconds)
        loop.stop()

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, before)
        interrupts.append(number)
        is_over.set()

    watchdog = Watchdog(loop, lambda: realtime.prepare_thread(args.priority))
    timer = threading.Thread(target=stop_in_time, name="timer", daemon=True)
    before = signal.signal(signal.SIGINT, interrupt)
    with realtime.quiet_interpreter():
        for part in (camera, watchdog, timer):
            part.start()
        try:
            loop.run()
        finally:
            signal.signal(signal.SIGINT, before)
            is_over.set()
            camera.stop()
            watchdog.stop()
    return not interrupts


def _ratios(result: dict[str, Any]) -> dict[str, float]:
    """What does not depend on how fast the machine is, by its name."""
    stages, sleep, ratios = result["stages_ms"], result["reference_sleep_ms"], {}
    if stages["answer"]["count"] and stages["encode"]["count"]:
        inside = stages["encode"]["p50"] + stages["plan"]["p50"]
        ratios["answer / time inside the session, p50"] = stages["answer"]["p50"] / inside
    if stages["lateness"]["count"]:
        ratios["lateness / lateness of a bare sleep, p99"] = stages["lateness"]["p99"] / sleep["p99"]
    minutes = {n: m["answer_p50_ms"] for n, m in enumerate(result["minutes"], 1) if "answer_p50_ms" in m}
    if len(minutes) > 1:
        first, last = min(minutes), max(minutes)
        ratios[f"answer p50, minute {last} / minute {first}"] = minutes[last] / minutes[first]
    return ratios


def main() -> None:
    """Entry point of ``d4-bench``."""
    run_cli(_main)


def _main() -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    commands: dict[str, Any] = {"latency": _latency, "replay": _replay}
    args = tyro.extras.subcommand_cli_from_dict(commands, prog="d4-bench")
    return int(args)


def _latency(args: tyro.conf.OmitArgPrefixes[LatencyArgs]) -> int:
    """Measure the loop; exit code 130 if Ctrl-C ended it."""
    try:
        result = latency(args)
    except WireError as error:
        raise UserError(str(error)) from error
    if result["interrupted"]:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _replay(args: tyro.conf.OmitArgPrefixes[ReplayArgs]) -> int:
    """Run a policy over recorded frames again; exit code 1 if other commands come than were recorded."""
    from d4_nodes.replay import replay

    result = replay(args.checkpoint, args.dataset, args.seed, args.argmax)
    print(result)
    return 0 if result.first is None else 1


if __name__ == "__main__":
    main()
