"""Tables beside a recording: CSV, JSONL or Parquet with a row per moment, read row by row.

Rows may stand at any time and in any order, cells may be empty. Times are read exactly, whatever their unit:
nanoseconds since 1970 do not fit a float. Memory holds the numbers of the columns that are asked for, and
nothing else.
"""

from __future__ import annotations

import abc
import csv
import itertools
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d4_datasets import fields
from d4_datasets.errors import UserError

SUFFIXES = (".csv", ".jsonl", ".parquet")
_LONGEST_LINE = 1 << 20
_BATCH = 4096
_MOST_ROWS = 1 << 24  # of one Parquet file
_MOST_BYTES = 1 << 30  # of its columns in memory
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
_ABSENT = object()  # a cell that is not there, which null is
_LATEST = Decimal(1 << 62)  # ns, 146 years


class Clock(NamedTuple):
    """A clock of its own: seconds are `scale` times what it shows, plus `offset_s`."""

    scale: float = 1.0
    offset_s: float = 0.0

    def nanoseconds(self, value: Any) -> int:
        """The time of a cell, ns. Raises ValueError if it is no number, or beyond 146 years."""
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        try:
            number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
            time = (number * Decimal(repr(self.scale)) + Decimal(repr(self.offset_s))) * 1_000_000_000
            if not time.is_finite() or abs(time) > _LATEST:
                raise ValueError
        except (InvalidOperation, TypeError, ArithmeticError):
            raise ValueError from None
        return int(time.to_integral_value())


@dataclass
class Table:
    """A table in order of time; rows at the same time in the order of the file.

    Attributes:
        path: of the file.
        names: the columns that were asked for and are there.
        time: int64 [R], ns.
        numbers: float64 [R] by column, NaN where the cell is empty.
        texts: [R] by column, None where the cell is empty.
        lines: int64 [R], line (row, in Parquet) of the file, for messages.
        warnings: what had to be left out or put right.
    """

    path: Path
    names: set[str]
    time: np.ndarray
    numbers: dict[str, np.ndarray]
    texts: dict[str, list[str | None]]
    lines: np.ndarray
    warnings: list[str]

    def __len__(self) -> int:
        """R."""
        return len(self.time)

    def error(self, row: int, column: str, what: str) -> UserError:
        """What is wrong with a cell."""
        return UserError(f"{self.path}, line {self.lines[row]}, column {column!r}: {what}")


def read(path: Path, time: str, numbers: Sequence[str], texts: Sequence[str], clock: Clock) -> Table:
    """The table at `path`: its column `time`, and of `numbers` and `texts` those that it has.

    Raises:
        UserError: naming file, line and column: it cannot be read, has no column `time`, or a cell is no
            number.
    """
    numbers, texts = list(dict.fromkeys(numbers)), list(dict.fromkeys(texts))
    source = _source(path)
    stamps, lines = array("q"), array("q")
    cells = {name: array("d") for name in numbers}
    words: dict[str, list[str | None]] = {name: [] for name in texts}
    places = (time, *numbers, *texts)
    try:
        for line, row in source.rows(places):
            column, value = time, row[0]
            try:
                stamps.append(clock.nanoseconds(value))
                for place, column in enumerate(numbers, 1):
                    value = row[place]
                    cells[column].append(_number(value))
            except ValueError:
                if column == time and time not in source.names:
                    break  # there is no such column
                raise UserError(f"{path}, line {line}, column {column!r}: {_is_bad(value)}") from None
            for column, value in zip(texts, row[1 + len(numbers) :], strict=True):
                words[column].append(_text(value))
            lines.append(line)
    except (OSError, ValueError, MemoryError, csv.Error, pa.ArrowException) as error:
        first = (str(getattr(error, "strerror", None) or error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"cannot read the table {path}: {first}") from None
    if time not in source.names:
        known = ", ".join(sorted(source.columns)[:20]) or "none"
        raise UserError(
            f"{path} has no column {time!r} to take times from; its columns are {known}: write the one that "
            "holds it to files.columns of the contract, as in {time: t}"
        )
    return _sorted(path, source, np.array(stamps, np.int64), cells, words, np.array(lines, np.int64))


def _sorted(
    path: Path, source: _Source, time: np.ndarray, cells: Any, words: Any, lines: np.ndarray
) -> Table:
    """Rows in order of time, with words on what was not."""
    if back := int((np.diff(time) < 0).sum()):
        source.warnings.append(f"{path}: time goes back in {back} rows, which were put in order of time")
    if same := len(time) - len(np.unique(time)):
        source.warnings.append(f"{path}: {same} rows have the time of another; the later one counts")
    order = np.argsort(time, kind="stable")
    return Table(
        path,
        source.names,
        time[order],
        {name: np.array(values, np.float64)[order] for name, values in cells.items()},
        {name: [values[i] for i in order] for name, values in words.items()},
        lines[order],
        source.warnings,
    )


# ---- cells ----


def boolean(cell: str) -> bool:
    """true, yes, 1 or their opposites. Raises ValueError for anything else."""
    word = cell.strip().lower()
    if word not in _YES + _NO:
        raise ValueError
    return word in _YES


def _number(cell: Any) -> float:
    """A number or truth value, NaN for an empty cell: NaN is how most libraries write one."""
    if cell is None:
        return math.nan
    if isinstance(cell, str):
        cell = cell.strip()
        if not cell:
            return math.nan
        if cell.lower() in ("true", "false"):
            return float(cell.lower() == "true")
        if "_" in cell:  # Python would take 1_000 for a number
            raise ValueError
    try:
        value = float(cell)
    except (TypeError, OverflowError):
        raise ValueError from None
    if math.isinf(value):
        raise ValueError
    return value


def _text(cell: Any) -> str | None:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return str(cell).strip() or None


def _is_bad(cell: Any) -> str:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return "the cell is empty, but every row needs a time"
    shown = repr(cell)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} is no number that can be used"


# ---- files ----


class _Source(abc.ABC):
    """A file of rows: `columns` that it has, `names` of those that were asked for, once it has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: set[str] = set()
        self.names: set[str] = set()
        self.warnings: list[str] = []

    @abc.abstractmethod
    def rows(self, asked: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """(line, cells of the columns `asked`), None where there is none."""

    def lines(self) -> Iterator[str]:
        """The lines of a text file, of bounded length."""
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            for number in itertools.count(1):
                line = file.readline(_LONGEST_LINE)
                if not line:
                    return
                if len(line) == _LONGEST_LINE:
                    raise UserError(f"{self.path}: line {number} is longer than 1 MiB; is this a table?")
                yield line

    def cells(self, row: dict[str, Any], asked: Sequence[str]) -> list[Any]:
        """The cells of a row that may be nested; notes which it has, where no head says it."""
        found = [_reach(row, name) for name in asked]
        self.names.update(name for name, cell in zip(asked, found, strict=True) if cell is not _ABSENT)
        return [None if cell is _ABSENT else cell for cell in found]

    def cut_off(self, number: int) -> None:
        """Say that the last line is not whole."""
        self.warnings.append(f"{self.path} ends in the middle of line {number}, which is left out")


class _Csv(_Source):
    """Values divided by commas, semicolons or tabs, with a line of names first."""

    def rows(self, asked: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        lines = self.lines()
        head = next(lines, "")
        divider = max(",;\t", key=head.count)
        last = [head]

        def kept() -> Iterator[str]:
            for line in lines:
                last[0] = line
                yield line

        names = [name.strip() for name in next(csv.reader([head], delimiter=divider), [])]
        self.columns = set(names)
        self.names = self.columns & set(asked)
        twice = sorted(name for name in self.names if names.count(name) > 1)
        if twice:
            raise UserError(f"{self.path}: two columns are called {twice[0]!r}; give each its own name")
        places = [names.index(name) if name in self.names else -1 for name in asked]
        reader = csv.reader(kept(), delimiter=divider)
        for row in reader:
            if len(row) != len(names) and row:
                if not last[0].endswith(("\n", "\r")):
                    self.cut_off(reader.line_num + 1)
                    return
                raise UserError(
                    f"{self.path}, line {reader.line_num + 1}: the row has {len(row)} cells, "
                    f"the first line {len(names)}"
                )
            if any(map(str.strip, row)):
                yield reader.line_num + 1, [row[place] if place >= 0 else None for place in places]


class _Jsonl(_Source):
    """A JSON object a line. `action[0]` and `mouse.dx` reach into lists and objects."""

    def rows(self, asked: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        for number, line in enumerate(self.lines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith("\n"):
                    self.cut_off(number)
                    return
                raise UserError(
                    f"{self.path}, line {number} is no valid JSON; correct or remove it"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f'{self.path}, line {number} is no JSON object; write one as in {{"time": 0}}'
                )
            if len(self.columns) < 1000:
                self.columns.update(row)
            yield number, self.cells(row, asked)


class _Parquet(_Source):
    """Parquet. `action[0]` is an element of a column of lists."""

    def rows(self, asked: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        with pq.ParquetFile(self.path) as file:
            self.columns = set(file.schema_arrow.names)
            self.names = self.columns & set(asked)
            columns = sorted({column for name in asked if (column := self._column(name))})
            number = 0
            for batch in file.iter_batches(_BATCH, columns=columns):
                held = {name: _cells(batch.column(name)) for name in columns}
                if number + batch.num_rows > _MOST_ROWS:
                    raise ValueError(f"it has more than {_MOST_ROWS} rows, which is too many")
                for place in range(batch.num_rows):
                    number += 1
                    row = {name: values[place] for name, values in held.items()}
                    yield number, self.cells(row, asked)

    def _column(self, name: str) -> str | None:
        """The column that holds `name`, None if there is none."""
        if name in self.columns:
            return name
        outer = name.partition("[")[0].partition(".")[0]
        return outer if outer in self.columns else None


def read_parquet(
    file: pq.ParquetFile, columns: Sequence[str] | None = None, rows: int = _MOST_ROWS
) -> pa.Table:
    """Columns of a Parquet file (None: all). What they weigh is counted on the way: a few kilobytes can hold
    billions of values that are all alike.

    Raises:
        ValueError: more than so many rows, or than memory is made for.
    """
    schema = file.schema_arrow
    wanted = [field for field in schema if columns is None or field.name in columns]
    batches, count, size = [], 0, 0
    # What a file says of its columns is not asked for: pyarrow ends the process where that is damaged.
    for batch in file.iter_batches(_BATCH, columns=columns):
        count, size = count + batch.num_rows, size + batch.nbytes
        if count > rows or size > _MOST_BYTES:
            raise ValueError(f"it has more than {count} rows, of {size >> 20} MiB, which is too many")
        batches.append(batch)
    return pa.Table.from_batches(batches, None if batches else pa.schema(wanted))


def _cells(column: pa.Array) -> list[Any]:
    """The cells of a column; moments as exact seconds since 1970."""
    if not pa.types.is_timestamp(column.type):
        return column.to_pylist()
    numbers = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64()).to_pylist()
    return [None if number is None else Decimal(number).scaleb(-9) for number in numbers]


def _reach(row: dict[str, Any], name: str) -> Any:
    """The cell called `name`: a key, or a path through objects and lists; _ABSENT if it is not there."""
    if name in row or not ("." in name or "[" in name):
        return row.get(name, _ABSENT)
    try:
        steps = fields.parse(name)
    except UserError:
        return _ABSENT
    node: Any = row
    for step in steps:
        node = node.get(step.attribute, _ABSENT) if isinstance(node, dict) else _ABSENT
        if step.element is not None:
            is_there = isinstance(node, list) and step.element < len(node)
            node = node[step.element] if is_there else _ABSENT
    return node


def _source(path: Path) -> _Source:
    kinds: dict[str, type[_Source]] = {".csv": _Csv, ".jsonl": _Jsonl, ".parquet": _Parquet}
    return kinds[path.suffix.lower()](path)
