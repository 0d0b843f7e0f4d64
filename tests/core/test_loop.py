"""Training loop: exact resume, prefetching, interruption, metrics and messages."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d4_core import checkpoint, loop
from d4_core.optim import OptimConfig
from d4_core.phase import Phase
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

CONTRACT = {
    "name": "toy",
    "rate_hz": 10,
    "latency_ms": 0,
    "observations": [
        {
            "name": "front",
            "topic": "/image",
            "type": "sensor_msgs/msg/Image",
            "size": [16, 16],
            "align": {"strategy": "hold", "timeline": "header", "tolerance_ms": 150},
        }
    ],
    "actions": [
        {
            "name": "base",
            "topic": "/cmd_vel",
            "type": "geometry_msgs/msg/Twist",
            "select": ["linear.x"],
            "units": ["m/s"],
            "low": [-1.0],
            "high": [1.0],
            "max_rate": [10.0],
            "safety": "zeros",
            "align": {"strategy": "hold", "timeline": "receive", "tolerance_ms": 250},
        }
    ],
}


class Toy(Phase):
    """Regression with a frozen input network, a Muon matrix, AdamW parameters and a head."""

    name = "toy"

    def __init__(self, total_steps: int = 12, broken_at: int = -1, period: int = 1) -> None:
        super().__init__(total_steps, {"fit": 1.0, "size": 0.1})
        torch.manual_seed(0)
        self.broken_at, self.period = broken_at, period
        self.frozen, self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.stop_at, self.stop_signal = -1, signal.SIGTERM

    def sample(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(rng.normal(size=(4, 5, 3)).astype(np.float32))}

    def forward(self, batch: dict[str, Tensor], gen: torch.Generator, step: int) -> tuple[dict, dict]:
        if step == self.stop_at:
            os.kill(os.getpid(), self.stop_signal)
        hidden = torch.tanh(self.body(self.frozen(batch["x"])))
        noise = torch.randn(hidden.shape, generator=gen)
        error = self.head(hidden + 0.1 * noise).squeeze(-1) - batch["x"].sum(-1)
        fit = error.square().mean() * (float("nan") if step == self.broken_at else 1.0)
        return {"fit": fit, "size": hidden.square().mean()}, {"step_seen": float(step)}

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.named_parameters() if not n.startswith("frozen")]

    def group(self, name: str, p: nn.Parameter) -> str:
        return "heads" if name.startswith("head") else "muon" if p.ndim == 2 else "adamw"

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        return {"body": self.body, "head": self.head}


def train(phase: Toy, run: Path, **options: object) -> dict[str, float]:
    settings = {"seed": 1, "optim": OptimConfig(), "config": {"width": 8}, "log_every": 3, "progress": False}
    return loop.train(
        phase, run, contract=Contract.from_dict(CONTRACT), **(settings | {"autocast": False} | options)
    )


def files(run: Path) -> dict[str, bytes]:
    return {name: (run / "toy" / name).read_bytes() for name in ("weights.safetensors", "train.safetensors")}


def test_resume_equals_uninterrupted_bitwise(tmp_path: Path) -> None:
    train(Toy(), tmp_path / "whole")
    phase = Toy()
    phase.stop_at = 4
    with pytest.raises(SystemExit) as stopped:
        train(phase, tmp_path / "parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoint.load_config(tmp_path / "parts" / "toy")["step"] == 5
    train(Toy(), tmp_path / "parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_prefetch_changes_nothing(tmp_path: Path) -> None:
    train(Toy(), tmp_path / "ahead", prefetch=2)
    train(Toy(), tmp_path / "inline", prefetch=0)
    assert files(tmp_path / "ahead") == files(tmp_path / "inline")


def test_kill_9_then_the_same_command_equals_uninterrupted(tmp_path: Path) -> None:
    train(Toy(), tmp_path / "whole")
    pid = os.fork()
    if pid == 0:
        phase = Toy()
        phase.stop_at, phase.stop_signal = 7, signal.SIGKILL
        train(phase, tmp_path / "parts", save_every_s=0.0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert checkpoint.load_config(tmp_path / "parts" / "toy")["step"] == 7
    train(Toy(), tmp_path / "parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_finished_phase_returns_at_once_with_its_averaged_weights(tmp_path: Path) -> None:
    first, second = Toy(), Toy()
    metrics = train(first, tmp_path)
    written = (tmp_path / "toy" / "config.json").stat().st_mtime_ns
    assert train(second, tmp_path) == metrics
    assert (tmp_path / "toy" / "config.json").stat().st_mtime_ns == written
    saved = Toy().checkpoint_modules()
    checkpoint.load_modules(tmp_path / "toy", saved)
    raw = checkpoint.load_train_state(tmp_path / "toy")["raw/head.weight"]
    assert torch.equal(first.head.weight, saved["head"].weight)
    assert torch.equal(second.head.weight, first.head.weight)
    assert not torch.equal(raw, first.head.weight)


def test_only_the_phases_own_parameters_move(tmp_path: Path) -> None:
    phase = Toy()
    train(phase, tmp_path)
    fresh = Toy()
    assert torch.equal(phase.frozen.weight, fresh.frozen.weight)
    assert not phase.frozen.weight.requires_grad
    assert not torch.equal(phase.body.weight, fresh.body.weight)


def test_other_settings_start_afresh_and_keep_the_old_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Toy(), tmp_path)
    train(Toy(), tmp_path, config={"width": 16})
    assert "trained with other config: starting afresh" in capsys.readouterr().out
    assert checkpoint.load_config(tmp_path / "toy.previous")["config"] == {"width": 8}
    assert checkpoint.load_config(tmp_path / "toy")["config"] == {"width": 16}
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 6, 9, 12]


def test_other_contract_is_refused(tmp_path: Path) -> None:
    train(Toy(), tmp_path)
    other = Contract.from_dict(CONTRACT | {"latency_ms": 40})
    with pytest.raises(UserError, match=other.hash):
        loop.train(Toy(), tmp_path, seed=1, optim=OptimConfig(), contract=other, config={"width": 8})


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_resume_drops_lines_beyond_the_checkpoint(tmp_path: Path) -> None:
    phase = Toy()
    phase.stop_at = 4
    with pytest.raises(SystemExit):
        train(phase, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "toy", "step": 6}\n{"phase": "other", "step": 99}\n{"phase": "toy", "st')
    train(Toy(), tmp_path)
    assert [(line["phase"], line["step"]) for line in lines(tmp_path)] == [
        ("toy", 1), ("toy", 3), ("other", 99), ("toy", 6), ("toy", 9), ("toy", 12)
    ]  # fmt: skip


def test_lines_of_two_phases_at_once_are_all_kept(tmp_path: Path) -> None:
    """A phase that began replaced the file, and what trained beside it went on writing to the old one."""

    class Beside(Toy):
        name = "beside"

        def forward(self, batch: dict[str, Tensor], gen: torch.Generator, step: int) -> tuple[dict, dict]:
            if step == 4:  # in the middle of it the other one trains from beginning to end
                train(Toy(), tmp_path)
            return super().forward(batch, gen, step)

    train(Beside(), tmp_path)
    steps = [1, 3, 6, 9, 12]
    assert [line["step"] for line in lines(tmp_path) if line["phase"] == "toy"] == steps
    assert [line["step"] for line in lines(tmp_path) if line["phase"] == "beside"] == steps


def test_another_version_of_the_model_is_refused(tmp_path: Path) -> None:
    phase = Toy()
    phase.stop_at = 4
    with pytest.raises(SystemExit):
        train(phase, tmp_path)
    changed = Toy()
    changed.head = nn.Linear(8, 2)
    with pytest.raises(UserError, match=r"saved by another version of the model .raw 'head.bias' differs"):
        train(changed, tmp_path)


def test_metrics_are_means_since_the_last_line(tmp_path: Path) -> None:
    result = train(Toy(), tmp_path)
    assert [line["step_seen"] for line in lines(tmp_path)] == [0.0, 1.5, 4.0, 7.0, 10.0]
    for name in (
        "loss",
        "fit",
        "size",
        "grad_norm",
        "frames_per_s",
        "step_s_mean",
        "step_s_median",
        "wall_s",
        "cpu_s",
    ):
        assert lines(tmp_path)[-1][name] > 0.0
        assert result[name] > 0.0
    assert 20.0 < result["peak_rss_mb"] < 50_000.0
    assert checkpoint.load_config(tmp_path / "toy")["metrics"] == result


def test_cost_adds_up_over_sessions(tmp_path: Path) -> None:
    phase = Toy()
    phase.stop_at = 4
    with pytest.raises(SystemExit):
        train(phase, tmp_path)
    before = checkpoint.load_config(tmp_path / "toy")["metrics"]
    after = train(Toy(), tmp_path)
    assert after["wall_s"] > before["wall_s"]
    assert after["cpu_s"] > before["cpu_s"]


@pytest.mark.parametrize(("period", "expected"), [(1, list(range(1, 13))), (5, [5, 10, 12])])
def test_checkpoints_come_at_multiples_of_the_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, period: int, expected: list[int]
) -> None:
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, config, **rest: saved.append(config["step"]))
    train(Toy(period=period), tmp_path, save_every_s=0.0)
    assert saved == expected


def test_stop_waits_for_the_end_of_the_period(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phase = Toy(period=5)
    phase.stop_at = 6
    with pytest.raises(SystemExit):
        train(phase, tmp_path)
    assert checkpoint.load_config(tmp_path / "toy")["step"] == 10
    assert "toy: stopped and saved at step 10 of 12; the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nan_stops_with_a_sentence_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="toy step 7: loss 'fit' is nan and loss 'total' is nan; nothing was updated"
    ):
        train(Toy(broken_at=7), tmp_path, save_every_s=0.0)
    state = checkpoint.load_train_state(tmp_path / "toy")
    assert checkpoint.load_config(tmp_path / "toy")["step"] == 7
    assert all(value.isfinite().all() for value in state.values())


def test_plain_progress_where_the_output_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "_PLAIN_LINE_S", 0.0)
    train(Toy(), tmp_path, progress=True)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 12
    assert out[-1].startswith("toy 12/12  fit ")
    assert out[-1].endswith("frames/s  0:00:00 left")


def test_errors_of_the_sampling_thread_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Toy, rng: np.random.Generator, step: int) -> None:
        raise UserError("the frame cache is gone; run the command again")

    monkeypatch.setattr(Toy, "sample", broken)
    with pytest.raises(UserError, match="frame cache"):
        train(Toy(), tmp_path)


def test_generators_differ_by_step_and_phase_and_repeat() -> None:
    def draw(*key: object) -> float:
        return torch.rand(1, generator=loop._generator(*key)).item()

    assert draw(0, "agent", 5) == draw(0, "agent", 5)
    assert len({draw(0, "agent", 5), draw(0, "agent", 6), draw(0, "dynamics", 5), draw(1, "agent", 5)}) == 4


@pytest.mark.skipif(not loop.bf16_on_cpu(), reason="this CPU has no bfloat16 matrix instructions")
def test_autocast_trains_too(tmp_path: Path) -> None:
    assert train(Toy(), tmp_path, autocast=None)["fit"] > 0.0


class Reusing(Toy):
    """Draws a batch at every second step only and goes on with it, as imagination training does."""

    def sample(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        return {} if step % 2 else super().sample(rng, step)

    def forward(self, batch: dict[str, Tensor], gen: torch.Generator, step: int) -> tuple[dict, dict]:
        self.last = batch or self.last
        return super().forward(self.last, gen, step)


def test_reused_batches_resume_exactly_and_count_no_frames(tmp_path: Path) -> None:
    train(Reusing(period=2), tmp_path / "whole")
    phase = Reusing(period=2)
    phase.stop_at = 4
    with pytest.raises(SystemExit):
        train(phase, tmp_path / "parts")
    train(Reusing(period=2), tmp_path / "parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert loop._num_frames({}) == 0
