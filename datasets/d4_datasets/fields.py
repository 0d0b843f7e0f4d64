"""Field paths: read numbers out of a message and write them back, by one grammar for both directions.

    linear.x                 attribute of an attribute
    position[2]              element of an array
    position[name=elbow]     element whose index is that of "elbow" in the array `name`, looked for beside
                             `position` and then in the messages around it (drivers order joints differently:
                             select by name)
    points[0].positions[1]   any mix

Only `getattr`, `setattr` and item access are used, so messages of rosbags and of rclpy work alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from d4_datasets.errors import UserError

_PART = re.compile(
    r"(?P<attribute>[A-Za-z_]\w*)(\[((?P<index>\d+)|(?P<key>[A-Za-z_]\w*)=(?P<value>[^\]=]+))\])?"
)


class Step(NamedTuple):
    """One part of a path: an attribute, then optionally an `element` by number or by `value` in the array
    `key`.
    """

    attribute: str
    element: int | None = None
    key: str | None = None
    value: str | None = None

    @property
    def has_element(self) -> bool:
        """Whether this step goes into an array."""
        return self.element is not None or self.key is not None


@lru_cache(maxsize=1024)
def parse(path: str) -> tuple[Step, ...]:
    """The steps of a field path; raises UserError if it is malformed."""
    steps, position = [], 0
    while True:
        match = _PART.match(path, position)
        if match is None:
            break
        index = None if match["index"] is None else int(match["index"])
        steps.append(Step(match["attribute"], index, match["key"], match["value"]))
        position = match.end()
        if position == len(path):
            return tuple(steps)
        if path[position] != ".":
            break
        position += 1
    raise UserError(
        f"the field path {path!r} is malformed at character {position + 1}; "
        "write it like linear.x, position[2] or position[name=elbow]"
    )


def get(msg: Any, path: str) -> Any:
    """The value at `path`, of whatever type; raises UserError naming the part that is not there."""
    parents: list[Any] = []
    for step in parse(path):
        parents.append(msg)
        msg = _attribute(msg, step, path)
        if step.has_element:
            index = _index(parents, step, path)
            if not hasattr(msg, "__getitem__"):
                raise UserError(f"{path!r}: {step.attribute} is no array but {type(msg).__name__}")
            if index >= len(msg):
                raise UserError(f"{path!r}: {step.attribute} has only {len(msg)} elements in this message")
            msg = msg[index]
    return msg


def read(msg: Any, paths: Sequence[str]) -> np.ndarray:
    """The numbers (or booleans) at `paths`, float64 [len(paths)]; raises UserError if one is missing or no
    number.
    """
    values = np.empty(len(paths), np.float64)
    for i, path in enumerate(paths):
        value = get(msg, path)
        try:
            values[i] = value
        except (TypeError, ValueError):
            raise UserError(
                f"{path!r} is not a single number but {type(value).__name__}; select an element"
            ) from None
    return values


def write(
    msg: Any,
    paths: Sequence[str],
    values: Sequence[float] | np.ndarray,
    new_element: Callable[[Any, str], Any] | None = None,
) -> None:
    """Set the numbers at `paths`; the inverse of `read`.

    Numbers take the type of what they replace (integers and booleans are rounded). An array of numbers that
    is too short grows, and a name selected by `[name=...]` that is absent is appended, so a fresh message can
    be filled. An array of messages grows too, by what `new_element(message, attribute)` makes.
    """
    if len(paths) != len(values):
        raise UserError(f"{len(values)} values cannot be written to {len(paths)} fields")
    for path, value in zip(paths, values, strict=True):
        *outer, last = parse(path)
        parents: list[Any] = []
        node = msg
        for step in outer:
            parents.append(node)
            node = _attribute(node, step, path)
            if step.has_element:
                index = _index(parents, step, path)
                if index >= len(node):
                    if new_element is None:
                        raise UserError(
                            f"{path!r}: {step.attribute} has only {len(node)} elements to write into"
                        )
                    missing = range(index + 1 - len(node))
                    node = [*node, *(new_element(parents[-1], step.attribute) for _ in missing)]
                    setattr(parents[-1], step.attribute, node)
                node = node[index]
        parents.append(node)
        old = _attribute(node, last, path)
        if last.has_element:
            _set_element(
                node, last.attribute, old, _index(parents, last, path, append=True), float(value), path
            )
        else:
            setattr(node, last.attribute, _like(old, float(value), path))


def _attribute(msg: Any, step: Step, path: str) -> Any:
    try:
        return getattr(msg, step.attribute)
    except AttributeError:
        raise UserError(
            f"{path!r}: {type(msg).__name__.split('__')[-1]} has no field {step.attribute!r}"
        ) from None


def _index(parents: list[Any], step: Step, path: str, *, append: bool = False) -> int:
    """The index that `step` means, looking names up in the innermost message that has them."""
    if step.element is not None:
        return step.element
    for parent in reversed(parents):
        names = getattr(parent, step.key or "", None)
        if names is None or not hasattr(names, "__getitem__"):
            continue
        if step.value in names:
            return list(names).index(step.value)
        if append:
            setattr(parent, step.key or "", [*names, step.value])
            return len(names)
        raise UserError(f"{path!r}: {step.value!r} is not among {step.key} = {list(names)}")
    raise UserError(f"{path!r}: there is no array {step.key!r} to find {step.value!r} in")


def _set_element(node: Any, attribute: str, old: Any, index: int, value: float, path: str) -> None:
    """Replace the array by a copy with one element set: arrays of a received message may be read-only."""
    missing = max(0, index + 1 - len(old))
    if isinstance(old, np.ndarray):
        grown = np.concatenate([old, np.zeros(missing, old.dtype)])
    else:  # a list, or an array.array as rclpy has it
        integral = hasattr(old, "typecode") or (len(old) > 0 and isinstance(old[0], int))
        grown = old[:]
        grown.extend([0 if integral else 0.0] * missing)
    grown[index] = _like(grown[index], value, path)
    setattr(node, attribute, grown)


def _like(old: Any, value: float, path: str) -> Any:
    if isinstance(old, bool | np.bool_):
        return bool(round(value))
    if isinstance(old, int | np.integer):
        return round(value)
    if isinstance(old, float | np.floating):
        return value
    raise UserError(f"{path!r} is not a single number but {type(old).__name__}; select an element")
