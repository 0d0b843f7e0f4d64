"""The observation of a tick: the right sample of every stream, decoded, where the server reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.messages import look
from d4_nodes.inbox import Inbox, Sample
from d4_nodes.ticks import Tick, oldest


class NoSample(Exception):
    """A stream has no sample that counts for a tick."""


class Eyes:
    """Fills shared memory, and compares every picture with the one before.

    Args:
        contract: the robot.
        inbox: where samples lie; streams by their names in the contract.
        compared: told of every picture that was looked at: (camera, whether it equals the one before in
            every byte).
        decode: message of a camera to RGB uint8 (H, W, 3).
    """

    def __init__(
        self,
        contract: Contract,
        inbox: Inbox,
        compared: Callable[[str, bool], None],
        decode: Callable[[Any], np.ndarray],
    ) -> None:
        self._inbox, self._compared, self._decode = inbox, compared, decode
        self._timed_by = contract.images[0].name  # the camera whose frames make the ticks
        self._depth_m = {camera.name: camera.depth_m for camera in contract.images}
        self.longest = {s.name: oldest(s.align, contract.period_ns) for s in contract.observations}
        self.forget()

    def forget(self) -> None:
        """No picture has been seen yet."""
        self._seen: dict[str, tuple[int, np.ndarray]] = {}  # camera: stamp and bytes

    def fill(self, cameras: Mapping[str, np.ndarray], vectors: Mapping[str, np.ndarray], tick: Tick) -> None:
        """Write a tick's observation into arrays: uint8 (H, W, 3) by camera, float32 (k,) by vector.

        Raises:
            NoSample: a stream has none, or none that is young enough.
            UserError: a sample cannot be used.
        """
        for name, target in (*cameras.items(), *vectors.items()):
            sample = self._inbox.at(name, tick.stamp_ns if name == self._timed_by else tick.anchor_ns)
            if sample is None or self._is_too_old(name, sample, tick):
                raise NoSample(name)
            try:
                if name in cameras:
                    self._compare(name, sample)
                    target[...] = look(sample.message, target.shape[:2], self._depth_m[name], self._decode)
                elif np.isfinite(sample.message).all():
                    target[...] = sample.message
                else:
                    raise ValueError("it holds NaN or infinity")
            except (UserError, ValueError, TypeError, AttributeError, cv2.error) as error:
                raise UserError(f"{name} cannot be used: {error}") from error

    def _is_too_old(self, name: str, sample: Sample, tick: Tick) -> bool:
        """Whether a sample does not count for a tick any more, as `align.sample` has it."""
        longest = self.longest[name]
        time_ns = tick.time_ns if name == self._timed_by else tick.anchor_ns
        return longest is not None and time_ns - sample.stamp_ns > longest

    def _compare(self, camera: str, sample: Sample) -> None:
        data = np.frombuffer(sample.message.data, np.uint8)
        before = self._seen.get(camera)
        if before is None or before[0] != sample.stamp_ns:
            self._seen[camera] = (sample.stamp_ns, data)
            self._compared(camera, before is not None and np.array_equal(before[1], data))
