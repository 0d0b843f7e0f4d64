"""A file of settings, mapping by mapping: values are handed out checked, what nobody asks for is refused.

Like the contract that it reads it knows only the standard library and runs on Python 3.10.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from d4_datasets.errors import UserError

MISSING: Any = object()  # in place of a default: the key must be there
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TYPE = re.compile(r"[a-zA-Z]\w*/msg/[A-Za-z]\w*")
_LONGEST_ERROR = 500  # characters


class Section:
    """One mapping of the file being read: hands out checked values and knows where it stands, for error
    messages.

    All methods raise a UserError that names file and key where a value is missing or not what it must be.
    """

    def __init__(self, raw: Any, source: str, where: str) -> None:
        self.source, self.where = source, where
        if not isinstance(raw, Mapping):
            raise UserError(f"{source}: {where or 'the file'} must be a mapping of keys to values")
        self.raw = dict(raw)
        self.known: list[str] = []

    def error(self, key: str, what: str) -> UserError:
        """What is wrong with the value of a key, to be raised."""
        what = what if len(what) <= _LONGEST_ERROR else f"{what[:_LONGEST_ERROR]}..."
        return UserError(f"{self.source}: `{self.where}{key[:80]}`: {what}")

    def take(self, key: str, default: Any = MISSING) -> Any:
        """The value of a key as it stands in the file."""
        self.known.append(key)
        value = self.raw.get(key)
        if value is None:
            if default is MISSING:
                raise self.error(key, "this key is missing")
            return default
        return value

    def finish(self) -> None:
        """Refuse keys that nobody has asked for."""
        for key in self.raw:
            if key not in self.known:
                close = difflib.get_close_matches(str(key), self.known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"known keys are {', '.join(self.known)}"
                raise self.error(str(key), f"unknown key; {hint}")

    def child(self, key: str) -> Section | None:
        """The mapping under a key, if it is there."""
        raw = self.take(key, None)
        return None if raw is None else Section(raw, self.source, f"{self.where}{key}.")

    def children(self, key: str) -> list[Section]:
        """The mappings in the list under a key."""
        raw = self.take(key)
        if not isinstance(raw, list) or not raw:
            raise self.error(key, "must be a list with at least one entry")
        return [Section(item, self.source, f"{self.where}{key}[{i}].") for i, item in enumerate(raw)]

    def text(self, key: str, default: Any = MISSING) -> str:
        """Text that is not empty."""
        value = self.take(key, default)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"must be text, not {value!r}")
        return value

    def word(self, key: str) -> str:
        """A name of letters, digits and underscores."""
        value = self.text(key)
        if not _NAME.fullmatch(value):
            raise self.error(
                key, f"{value!r} must be letters, digits and underscores, starting with a letter"
            )
        return value

    def topic(self) -> str:
        """`topic`: a full name."""
        value = self.text("topic")
        if not value.startswith("/"):
            raise self.error("topic", f"{value!r} must be a full topic name that starts with /")
        return value

    def type(self) -> str:
        """`type`: that of a ROS message."""
        value = self.text("type")
        if not _TYPE.fullmatch(value):
            raise self.error("type", f"{value!r} must look like geometry_msgs/msg/Twist")
        return value

    def choice(self, key: str, options: tuple[str, ...], default: Any = MISSING) -> str:
        """One of some words."""
        value = self.take(key, default)
        if value not in options:
            raise self.error(key, f"{value!r} must be one of {', '.join(options)}")
        return str(value)

    def number(
        self, key: str, default: Any = MISSING, *, least: float = -math.inf, above: float = -math.inf
    ) -> float:
        """A finite number, of at least `least` and above `above`."""
        return self._number(key, self.take(key, default), least, above)

    def _number(self, key: str, value: Any, least: float = -math.inf, above: float = -math.inf) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < least or value <= above:
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}"
            raise self.error(
                key, f"must be a number{bound if max(least, above) > -math.inf else ''}, not {value!r}"
            )
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of so many numbers."""
        return tuple(self._number(key, value) for value in self._list(key, self.take(key), length))

    def texts(self, key: str, length: int | None = None) -> tuple[str, ...]:
        """A list of texts, no two alike but for `units`."""
        values = self._list(key, self.take(key), length)
        for value in values:
            if not isinstance(value, str) or not value:
                raise self.error(key, f"must be a list of texts, and {value!r} is none")
        if len(set(values)) < len(values) and key != "units":
            raise self.error(key, f"an entry stands twice in {values}")
        return tuple(values)

    def features(self, count: int) -> tuple[str, ...]:
        """`lerobot`: one text, which stands for the whole feature, or `count` texts; empty if absent."""
        value = self.take("lerobot", None)
        if value is None:
            return ()
        entries = self.texts("lerobot") if not isinstance(value, str) else (self.text("lerobot"),)
        if len(entries) not in (1, count):
            raise self.error("lerobot", f"has {len(entries)} entries; write one feature, or {count} elements")
        return entries

    def _list(self, key: str, value: Any, length: int | None) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.error(key, "must be a list with at least one entry")
        if length is not None and len(value) != length:
            raise self.error(key, f"has {len(value)} entries but `select` has {length}")
        return value
