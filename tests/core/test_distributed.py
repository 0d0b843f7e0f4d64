"""Two processes on this machine: gradients of the whole batch, equal weights, one writer."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_loop import Toy, lines, train
from torch import nn

from d4_core import checkpoint, distributed
from d4_core.optim import OptimConfig, Optimiser

WORLD = 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def batches() -> torch.Tensor:
    """[step, row, 3]: 3 steps of 8 rows, half of them for each process."""
    return torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(5))


def steps(model: nn.Sequential, rows: slice) -> list[torch.Tensor]:
    """Three optimiser steps; returns the gradients of the first."""
    optimiser = Optimiser(
        "net", model.named_parameters(), lambda n, p: "muon" if p.ndim == 2 else "adamw", OptimConfig(), 3
    )
    first = []
    for step, batch in enumerate(batches()):
        optimiser.zero_grad()
        loss = (model(batch[rows]).squeeze(-1) - batch[rows].sum(-1)).square().mean()
        loss.backward()
        distributed.average_gradients(model.parameters())
        first = first or [p.grad.clone() for p in model.parameters()]
        optimiser.step(step, {"fit": loss})
    return first


def worker(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    distributed.init(torch.device("cpu"))
    model = net()
    grads = steps(model, slice(4 * rank, 4 * rank + 4))
    mean = distributed.average_scalar(float(rank))
    sometimes, never = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    if rank == 1:
        sometimes.grad = torch.ones(2)
    distributed.average_gradients([sometimes, never])
    phase = Toy()
    if rank == 1:
        nn.init.zeros_(phase.head.weight)  # must be overwritten by rank 0's
    train(phase, out / "run")
    state = {
        "weights": list(model.parameters()),
        "toy": list(phase.parameters()),
        "scale": phase.normaliser.fit_square,
    }
    torch.save(
        {"grads": grads, "mean": mean, "sometimes": sometimes.grad, "never": never.grad} | state,
        out / f"{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, out), nprocs=WORLD)
    return out, [torch.load(out / f"{rank}.pt") for rank in range(WORLD)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradient_is_that_of_the_concatenated_batch(results: tuple[Path, list[dict]]) -> None:
    _, (first, second) = results
    whole = steps(net(), slice(None))
    assert equal(first["grads"], second["grads"])
    for ours, reference in zip(first["grads"], whole, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_weights_stay_identical(results: tuple[Path, list[dict]]) -> None:
    _, (first, second) = results
    assert equal(first["weights"], second["weights"])
    assert not equal(first["weights"], list(net().parameters()))


def test_scalars_and_partly_used_parameters(results: tuple[Path, list[dict]]) -> None:
    _, ranks = results
    for found in ranks:
        assert found["mean"] == 0.5
        assert found["sometimes"].tolist() == [0.5, 0.5]
        assert found["never"] is None


def test_the_loop_keeps_ranks_equal_and_rank_0_writes(results: tuple[Path, list[dict]]) -> None:
    out, (first, second) = results
    assert equal(first["toy"], second["toy"])
    assert torch.equal(first["scale"], second["scale"])
    assert checkpoint.load_config(out / "run" / "toy")["status"] == "done"
    assert [line["step"] for line in lines(out / "run")] == [1, 3, 6, 9, 12]


def test_a_single_process_needs_no_group() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    distributed.average_gradients([p])
    assert p.grad.tolist() == [1.0, 1.0]
    assert distributed.world_size() == 1
    assert distributed.average_scalar(2.5) == 2.5
