"""Shared memory of the robot's process and the inference server: one request, one reply, one heartbeat.

The server creates it without a name (memfd) and hands its descriptor over the control socket, so nothing is
left behind by a crash and nobody else can open it. Where everything lies follows from the contract and the
size of a reply; both sides compute it and compare. Who may write what alternates with STEP and DONE on the
socket: the request belongs to the robot's process until STEP, the reply to the server until DONE. The
heartbeat alone is written at any time, as one aligned 8-byte word.

NumPy and the contract only; no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from typing import NamedTuple, TypeAlias

import numpy as np

from d4_datasets.contract import Contract

_ALIGN = 64  # a cache line: the heartbeat shares none with what the other side writes

CAMERA, VECTOR = "camera.", "vector."  # prefixes of the fields of observations

_Wanted: TypeAlias = "list[tuple[str, str, tuple[int, ...]]]"


class Field(NamedTuple):
    """One array: where it begins (bytes) and what it is."""

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


def layout(contract: Contract, leads: int) -> tuple[Field, ...]:
    """Fields of the shared memory of a policy (L leads, A action components, k fields of a vector).

    ======================  ===========================  =================================================
    heartbeat               int64 ()                     monotonic ns, by the server's own thread
    camera.<name>           uint8 (H, W, 3)              picture at the contract's size
    vector.<name>           float32 (k,)                 for every vector of role input
    task                    int64 ()                     index of the contract's task
    reset                   uint8 ()                     1: a new episode begins, forget the past
    previous                float32 (A,)                 command that was really in force since the last frame
    previous_known          uint8 ()                     0: it is unknown
    plan                    float32 (L, A)               command for this frame, and for the L - 1 after it
    reward                  float32 ()                   expected reward of this frame
    spans                   int64 (2,)                   ns that encoding and deciding took
    ======================  ===========================  =================================================
    """
    num = contract.action_dim
    return _place([
        *_observations(contract), ("task", "int64", ()), ("reset", "uint8", ()),
        ("previous", "float32", (num,)), ("previous_known", "uint8", ()), ("plan", "float32", (leads, num)),
        ("reward", "float32", ()), ("spans", "int64", (2,)),
    ])  # fmt: skip


def latents_layout(contract: Contract, tokens: int, channels: int) -> tuple[Field, ...]:
    """Fields of the shared memory of a tokenizer: those of a policy up to the vectors, then these.

    ======================  ===========================  =================================================
    reset                   uint8 ()                     1: a new stream begins, forget the past
    latents                 float32 (tokens, channels)   of this frame, in (-1, 1)
    spans                   int64 (1,)                   ns that encoding took
    ======================  ===========================  =================================================
    """
    return _place([
        *_observations(contract), ("reset", "uint8", ()), ("latents", "float32", (tokens, channels)),
        ("spans", "int64", (1,)),
    ])  # fmt: skip


def _observations(contract: Contract) -> _Wanted:
    """What every layout begins with: the heartbeat and what the robot sees."""
    wanted: _Wanted = [("heartbeat", "int64", ())]
    for camera in contract.images:
        assert camera.size is not None
        wanted.append((CAMERA + camera.name, "uint8", (*camera.size, 3)))
    return wanted + [(VECTOR + v.name, "float32", (len(v.select),)) for v in contract.vectors("input")]


def _place(wanted: _Wanted) -> tuple[Field, ...]:
    """Fields one behind the other, each at the begin of a cache line."""
    fields, offset = [], 0
    for name, dtype, shape in wanted:
        fields.append(Field(name, offset, dtype, shape))
        offset += -(-fields[-1].size // _ALIGN) * _ALIGN
    return tuple(fields)


def _cannot_shrink(descriptor: int) -> bool:
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # no memory of memfd_create
        return False


class Memory:
    """A mapped layout; `memory[name]` is the NumPy array that lies there (a view, never a copy).

    Args:
        fields: the layout.
        descriptor: open file of the other side, which is mapped and closed; None: create the memory.

    Raises:
        ValueError: the file is too small for the layout, or not sealed against shrinking.
    """

    def __init__(self, fields: tuple[Field, ...], descriptor: int | None = None) -> None:
        self.fields = fields
        size = fields[-1].offset + -(-fields[-1].size // _ALIGN) * _ALIGN
        try:
            if descriptor is None:
                descriptor = os.memfd_create("d4", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.truncate(descriptor, size)
                # neither side can shrink it under the other, which would be a bus error
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            elif os.fstat(descriptor).st_size < size:
                raise ValueError(f"shared memory of {os.fstat(descriptor).st_size} bytes, {size} are needed")
            elif not _cannot_shrink(descriptor):
                raise ValueError("the other side could shrink it, which would end this process")
            self._map = mmap.mmap(descriptor, size)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        self.descriptor = descriptor
        self._arrays = {
            f.name: np.frombuffer(
                self._map, f.dtype, int(np.prod(f.shape, dtype=np.int64)), f.offset
            ).reshape(f.shape)
            for f in fields
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def observation(self, prefix: str) -> dict[str, np.ndarray]:
        """The cameras or vectors by their names in the contract; `prefix` is CAMERA or VECTOR."""
        return {n.removeprefix(prefix): a for n, a in self._arrays.items() if n.startswith(prefix)}

    def close(self) -> None:
        """Unmap; arrays that were handed out must not be used any more."""
        self._arrays.clear()
        with contextlib.suppress(BufferError):  # someone still holds a view: the mapping goes with it
            self._map.close()
        os.close(self.descriptor)
