"""The one training loop of all phases: resumable, interruptible, randomness a function of the step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from d4_core import checkpoint, distributed
from d4_core.data import pinned
from d4_core.optim import Ema, OptimConfig, Optimiser
from d4_datasets import whole
from d4_datasets.errors import UserError
from d4_datasets.locks import held

if TYPE_CHECKING:
    from d4_core.phase import Batch, Phase
    from d4_datasets.contract import Contract

METRICS = "metrics.jsonl"
_PLAIN_LINE_S = 10.0  # interval of progress lines where the output is not a terminal


def train(
    phase: Phase,
    run_dir: Path,
    *,
    seed: int,
    optim: OptimConfig,
    contract: Contract,
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    autocast: bool | None = None,
    save_every_s: float = 60.0,
    log_every: int = 20,
    prefetch: int = 2,
    progress: bool = True,
) -> dict[str, float]:
    """Train `phase` to its last step, continuing an unfinished checkpoint of the same settings by itself.

    Afterwards the phase's modules hold the averaged weights, as saved, whether trained now or found finished.
    A checkpoint of other settings is kept once, as <phase>.previous. Whatever changes in training must be a
    trained parameter or a persistent buffer, or a resumed run would differ from an uninterrupted one.

    Args:
        phase: what to train; checkpoints are taken only at multiples of `phase.period` steps.
        run_dir: the run folder.
        seed: not negative; step s on rank r draws from (seed, phase, s, r) and nothing else.
        optim: optimiser settings.
        contract: saved with the weights; a checkpoint of another contract is an error.
        config: the phase's settings (JSON values); a checkpoint is continued only if these are equal.
        device: where the phase runs.
        autocast: bfloat16 autocast; None: wherever the hardware computes in bfloat16.
        save_every_s: seconds between checkpoints.
        log_every: steps between lines of metrics.jsonl; a line holds means over these steps.
        prefetch: batches sampled ahead on a background thread; 0 samples in the loop. Results are the same.
        progress: show progress.

    Returns:
        The last metrics, with step_s_mean, step_s_median, wall_s, cpu_s and peak_rss_mb.

    Raises:
        UserError: a loss or gradient is not finite, the disk is full, or the contract differs.
        SystemExit: after SIGINT or SIGTERM, once the step is finished and saved.
    """
    device = torch.device(device)
    distributed.init(device)
    folder = run_dir / phase.name
    identity = _identity(phase, seed, optim, config)
    found = _find(folder, identity, contract)
    if found is not None and found["status"] == "done":
        checkpoint.load_modules(folder, phase.to(device).checkpoint_modules())
        return dict(found["metrics"])
    run = _Run(phase, run_dir, identity, contract, optim, device, autocast)
    if found is not None:
        run.resume(found)
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(_Feed(phase, seed, prefetch, pin=device.type == "cuda"))
        log = stack.enter_context(_Log(run_dir, phase, run.start, progress and distributed.rank() == 0))
        stop = stack.enter_context(_Stop())
        _loop(run, feed, log, stop, seed=seed, save_every_s=save_every_s, log_every=log_every)
    run.ema.copy_to_parameters()
    return run.metrics


def _loop(
    run: _Run, feed: _Feed, log: _Log, stop: _Stop, *, seed: int, save_every_s: float, log_every: int
) -> None:
    total, period = run.phase.total_steps, run.phase.period
    saved_at = time.monotonic()
    for step in range(run.start, total):
        began = time.perf_counter()
        batch = feed(step)
        run.step(step, batch, _generator(seed, run.phase.name, step), began)
        done = step + 1
        if done % log_every == 0 or done in (1, total):
            log.write(done, run.report())
        log.show(done, run.last_losses)
        if done % period or done == total:
            continue
        if distributed.average_scalar(float(stop.signal is not None), run.device) > 0:
            run.save(done, "training")
            stop.leave(run.phase.name, done, total)
        if time.monotonic() - saved_at >= save_every_s:
            run.save(done, "training")
            saved_at = time.monotonic()
    run.save(total, "done")


class _Run:
    """Model, optimiser, average and clocks of one phase in training."""

    def __init__(
        self,
        phase: Phase,
        run_dir: Path,
        identity: Mapping[str, Any],
        contract: Contract,
        optim: OptimConfig,
        device: torch.device,
        autocast: bool | None,
    ) -> None:
        self.phase, self.device, self.contract = phase.to(device), device, contract
        self.start = 0
        self.metrics: dict[str, float] = {}
        self.last_losses: dict[str, Tensor] = {}
        self._folder, self._identity = run_dir / phase.name, identity
        self._autocast = computes_reduced(device) if autocast is None else autocast
        self._named = dict(phase.trainable())
        trained = set(self._named.values())
        for p in phase.parameters():
            p.requires_grad_(p in trained)  # no gradient work for frozen inputs
        distributed.broadcast([*phase.parameters(), *phase.buffers()])
        self._optimiser = Optimiser(phase.name, self._named.items(), phase.group, optim, phase.total_steps)
        self.ema = Ema(self._named.items(), optim.ema)
        self._recent: list[dict[str, Tensor | float]] = []  # since the last report
        self._step_s: list[float] = []
        self._num_frames = 0  # since the last report, of all ranks
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._before: Mapping[str, float] = {}  # metrics of the sessions before this one
        self._is_continuation = False

    def step(self, step: int, batch: Batch, gen: torch.Generator, began: float) -> None:
        """One update; `began` is when the loop began to wait for the batch (perf_counter seconds)."""
        wait_s = time.perf_counter() - began
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            losses, metrics = self.phase(batch, gen, step)
        loss = self.phase.total(losses)
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        distributed.average_gradients(self._named.values())
        norm = self._optimiser.step(step, {**losses, "total": loss})
        self.ema.update(step)
        self.last_losses = {name: value.detach() for name, value in losses.items()}
        shown = {name: v.detach() if isinstance(v, Tensor) else v for name, v in metrics.items()}
        own = {"grad_norm": norm, "wait_s": wait_s}
        self._recent.append({"loss": loss.detach(), **self.last_losses, **shown, **own})
        self._num_frames += _num_frames(batch) * distributed.world_size()
        self._step_s.append(time.perf_counter() - began)

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report (rank 0's share), with throughput and cost so far.

        Not averaged over ranks: which names a rank has may depend on its batches.
        """
        names = {name: None for entry in self._recent for name in entry}  # ordered; not every step has all
        values = {name: [float(e[name]) for e in self._recent if name in e] for name in names}
        means = {name: math.fsum(v) / len(v) for name, v in values.items()}
        seconds = sum(self._step_s[-len(self._recent) :])
        waited = sum(float(entry["wait_s"]) for entry in self._recent)
        speed = {"wait_share": waited / seconds, "frames_per_s": self._num_frames / seconds}
        self.metrics = means | speed | self._cost()
        self._recent.clear()
        self._num_frames = 0
        return self.metrics

    def save(self, done: int, status: str) -> None:
        """Write the checkpoint after `done` steps (rank 0 only)."""
        self.metrics = {**self.metrics, **self._cost()}
        if distributed.rank() == 0:
            if not self._is_continuation and checkpoint.exists(self._folder):
                _keep_previous(self._folder)
            self._is_continuation = True
            checkpoint.save(
                self._folder,
                modules=self.phase.checkpoint_modules(),
                averaged=self.ema.tensors,
                config={**self._identity, "step": done, "status": status},
                contract=self.contract,
                metrics=self.metrics,
                train_state=self._state(),
            )
        if status == "done":
            distributed.barrier()

    def resume(self, found: Mapping[str, Any]) -> None:
        """Load the training state of a found checkpoint and go on behind it."""
        state = checkpoint.load_train_state(self._folder)
        parts: dict[str, dict[str, Tensor]] = {"raw": {}, "ema": {}, "optim": {}, "buffer": {}}
        for key, value in state.items():
            part, name = key.split("/", 1)
            parts[part][name] = value
        self._require_same("raw", self._named, parts["raw"])
        self._require_same("buffer", self._buffers(), parts["buffer"])
        with torch.no_grad():
            for name, target in (self._named | self._buffers()).items():
                target.copy_((parts["raw"] | parts["buffer"])[name])
        self.ema.load(parts["ema"])
        self._optimiser.load(parts["optim"])
        self._before, self.metrics = found["metrics"], dict(found["metrics"])
        self._is_continuation = True
        self.start = found["step"]

    def _require_same(self, part: str, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        differing = [n for n in own.keys() | saved.keys() if _shape(own.get(n)) != _shape(saved.get(n))]
        if differing:
            raise UserError(
                f"{self._folder} was saved by another version of the model "
                f"({part} {min(differing)!r} differs): "
                "move the folder away to train the phase afresh, or use the version that began it"
            )

    def _state(self) -> dict[str, Tensor]:
        parts: dict[str, Mapping[str, Tensor]] = {
            "raw": self._named,
            "ema": self.ema.state(),
            "optim": self._optimiser.state(),
            "buffer": self._buffers(),
        }
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.phase.named_parameters(remove_duplicate=False)}
        return {name: value for name, value in self.phase.state_dict().items() if name not in parameters}

    def _cost(self) -> dict[str, float]:
        """Step time of this session; wall time, CPU time and memory of all sessions of the phase."""
        steps = self._step_s[1:] or self._step_s or [0.0]  # the first step pays for allocation and warm-up
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cost = {
            "step_s_mean": statistics.fmean(steps),
            "step_s_median": statistics.median(steps),
            "wall_s": time.perf_counter() - self._wall + self._before.get("wall_s", 0.0),
            "cpu_s": time.process_time() - self._cpu + self._before.get("cpu_s", 0.0),
            "peak_rss_mb": max(peak, self._before.get("peak_rss_mb", 0.0)),
        }
        if self.device.type == "cuda":
            cost["peak_gpu_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return cost


class _Feed:
    """Batches by step, sampled `ahead` steps early on one background thread, or on demand when 0."""

    def __init__(self, phase: Phase, seed: int, ahead: int, pin: bool) -> None:
        self._phase, self._seed, self._ahead, self._pin = phase, seed, ahead, pin
        self._pool = ThreadPoolExecutor(1, "sample")
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of `step`; steps must be asked for in order."""
        if self._ahead == 0:
            return self._sample(step)
        for s in range(step, min(step + self._ahead + 1, self._phase.total_steps)):
            if s not in self._pending:
                self._pending[s] = self._pool.submit(self._sample, s)
        return self._pending.pop(step).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _sample(self, step: int) -> Batch:
        rng = np.random.default_rng(_entropy(self._seed, self._phase.name, step))
        with pinned(self._pin):
            batch = self._phase.sample(rng, step)
        return {k: v.pin_memory() for k, v in batch.items()} if self._pin else batch


class _Log:
    """metrics.jsonl, TensorBoard where installed, and the progress line."""

    def __init__(self, run_dir: Path, phase: Phase, start: int, progress: bool) -> None:
        self._name, self._total, self._start = phase.name, phase.total_steps, start
        self._is_writer, self._progress = distributed.rank() == 0, progress
        self._path = run_dir / METRICS
        self._began = self._shown = time.monotonic()
        self._frames_per_s = 0.0
        self._console = Console()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._is_writer:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines(self._path, self._name, self._start)
            self._board = self._open_board()
        if self._progress and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._bar = self._stack.enter_context(bar)
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._start, text="")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def write(self, done: int, metrics: Mapping[str, float]) -> None:
        """Append one line of finite numbers."""
        self._frames_per_s = metrics["frames_per_s"]
        if not self._is_writer:
            return
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        line = {"phase": self._name, "step": done, "time": time.time(), **finite}
        with held(_lock_of(self._path)), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, done)

    def show(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """Update the bar, or print a plain line every few seconds and at the end."""
        if not self._progress:
            return
        is_due = time.monotonic() - self._shown >= (0.5 if self._console.is_terminal else _PLAIN_LINE_S)
        if not is_due and done != self._total:
            return
        self._shown = time.monotonic()
        text = self._text(done, losses)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, text=text, refresh=True)
        else:
            print(f"{self._name} {text}", flush=True)

    def _text(self, done: int, losses: Mapping[str, Tensor]) -> str:
        left = (self._shown - self._began) / (done - self._start) * (self._total - done)
        numbers = "  ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        return f"{done}/{self._total}  {numbers}  {self._frames_per_s:.0f} frames/s  {clock} left"

    def _open_board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # an optional extra
            return None
        board = SummaryWriter(str(self._path.parent / "tensorboard" / self._name), purge_step=self._start + 1)
        self._stack.callback(board.close)
        return board


class _Stop:
    """Turns the first SIGINT or SIGTERM into a request to save and leave; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def leave(self, name: str, done: int, total: int) -> None:
        """Say how to continue and exit as the signal would have."""
        if distributed.rank() == 0:
            where = f"step {done} of {total}"
            print(f"{name}: stopped and saved at {where}; the same command continues", file=sys.stderr)
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def _request(self, number: int, frame: object) -> None:
        self.signal = number
        self.__exit__()


def bf16_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, hence the guarded access
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def computes_reduced(device: torch.device) -> bool:
    """Whether training on a device uses bfloat16 by itself: where the hardware multiplies it."""
    return bf16_on_cpu() if device.type == "cpu" else device.type == "cuda"


def _entropy(seed: int, name: str, step: int) -> list[int]:
    return [seed, zlib.crc32(name.encode()), step, distributed.rank()]


def _generator(seed: int, name: str, step: int) -> torch.Generator:
    # On the host whatever the device, so that a run draws the same numbers on both.
    # spawn_key keeps this stream apart from the one that sampled the batch.
    words = np.random.SeedSequence(_entropy(seed, name, step), spawn_key=(1,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


def _identity(phase: Phase, seed: int, optim: OptimConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued, as JSON gives it back."""
    identity = {
        "phase": phase.name,
        "total_steps": phase.total_steps,
        "seed": seed,
        "optim": dataclasses.asdict(optim),
        "config": dict(config),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def _find(folder: Path, identity: Mapping[str, Any], contract: Contract) -> dict[str, Any] | None:
    """config.json of the checkpoint to continue (or to return as finished), None to start afresh."""
    if not checkpoint.exists(folder):
        return None
    found = checkpoint.load_config(folder)
    checkpoint.require_contract(folder, found, contract)
    changed = [key for key, value in identity.items() if found.get(key) != value]
    if not changed:
        return found
    if distributed.rank() == 0:
        settings = ", ".join(changed)
        print(f"{folder} was trained with other {settings}: starting afresh, it will be kept as .previous")
    return None


def _keep_previous(folder: Path) -> None:
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(checkpoint.resolve(folder), previous)


def _drop_lines(path: Path, name: str, step: int) -> None:
    """Remove the phase's lines beyond `step`, and a last line that a kill cut short.

    Baselines train beside the chain in the same folder: a file is only replaced while nobody writes to it.
    """
    with held(_lock_of(path)):
        if not path.exists():
            return
        entries = [(line, json.loads(line)) for line in _whole_lines(path)]
        kept = [line for line, entry in entries if entry["phase"] != name or entry["step"] <= step]
        whole.write(path, "".join(kept))


def _lock_of(path: Path) -> Path:
    return path.with_name(f".lock-{path.name}")


def _whole_lines(path: Path) -> Iterator[str]:
    return (line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n"))


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _num_frames(batch: Batch) -> int:
    """Frames in a batch: the product of the two leading axes; 0 where a phase reuses its last batch."""
    return math.prod(next(iter(batch.values())).shape[:2]) if batch else 0
