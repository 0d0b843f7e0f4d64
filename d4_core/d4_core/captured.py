"""Work on the device that is the same every time, as CUDA graphs: one launch in place of hundreds.

A graph repeats kernels on fixed addresses. So what is captured reads and writes tensors that stay where they
are, decides nothing by their values, draws no random numbers and never waits for the device; what goes in
and out passes through `Port`s.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_WARM = 3  # rounds before capture: libraries choose their kernels and workspaces in the first ones


class Port:
    """A tensor that stays where it is, with a page-locked twin on the host if the device is a GPU.

    Attributes:
        tensor: on the device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._host = self.tensor
        if device.type == "cuda":
            self._host = torch.zeros(shape, dtype=dtype, pin_memory=True)

    def put(self, values: np.ndarray) -> None:
        """Copy values in. Nothing may be put twice without waiting for the device in between.

        Raises:
            ValueError: they are of another shape or type.
        """
        source = torch.from_numpy(values)
        if source.shape != self.tensor.shape or source.dtype != self.tensor.dtype:
            raise ValueError(
                f"{tuple(source.shape)} of {source.dtype} where {tuple(self.tensor.shape)} of "
                f"{self.tensor.dtype} is expected"
            )
        self._host.copy_(source)
        if self._host is not self.tensor:
            self.tensor.copy_(self._host, non_blocking=True)


def capture(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`work` as the replay of a CUDA graph; its result is overwritten by the next replay.

    Runs `work` a few times. Raises what torch raises if it cannot be captured.
    """
    with torch.cuda.device(device):
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                work()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
