"""Plain data parallelism under torchrun: same weights everywhere, averaged gradients, rank 0 writes."""

import os
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def init(device: torch.device) -> None:
    """Join the process group that torchrun or `workers.launch` announced; nothing to do when single.

    `workers.launch` names a file to meet at (D4_RENDEZVOUS): unlike a TCP store it listens on no port.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        meet = os.environ.get("D4_RENDEZVOUS", "env://")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meet, rank=int(os.environ["RANK"]), world_size=world)


def rank() -> int:
    """This process's rank; 0 when not distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 when not distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def share(batch: int, ranks: int | None = None) -> int:
    """A rank's part of a global batch, at least one; of so many ranks, by itself those of this run."""
    return max(1, batch // (ranks or world_size()))


def all_agree(value: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `value` is true on every rank; `device` must suit the backend (cuda for nccl)."""
    return average_scalar(float(value), device) == 1.0


def average_gradients(params: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, with one all_reduce per dtype.

    A parameter that only some ranks used (their batches differ) counts as zero on the others; one that no
    rank used keeps no gradient, so that the optimiser skips it exactly as it does in a single process.
    """
    if world_size() == 1:
        return
    params = list(params)
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=params[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    grads = []
    for p, is_used in zip(params, used.tolist(), strict=True):
        if is_used:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
    average_tensors(grads)


@torch.no_grad()
def average_tensors(tensors: Sequence[Tensor]) -> None:
    """Replace the tensors by their means over the ranks, in place, one all_reduce per dtype."""
    if world_size() == 1:
        return
    for bucket in _by_dtype(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat)
        flat.div_(world_size())
        for t, mean in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
            t.copy_(mean.view_as(t))


def average_scalar(value: float, device: torch.device | str = "cpu") -> float:
    """Mean of `value` over the ranks; `device` must suit the backend (cuda for nccl)."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total.item() / world_size()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors by rank 0's, in place."""
    if world_size() > 1:
        for t in tensors:
            dist.broadcast(t, src=0)


def _by_dtype(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        buckets.setdefault(t.dtype, []).append(t)
    yield from buckets.values()
