"""Tables beside recordings: three formats say the same, and whatever is wrong is one sentence."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from footage_files import write_table
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import tables
from d4_datasets.errors import UserError
from d4_datasets.tables import Clock

FORMATS = (".csv", ".jsonl", ".parquet")
ROWS = [{"time": 0.5, "x": 1.5, "task": "red"}, {"time": 1.0, "x": None, "task": None}]


def read(path, clock=None, numbers=("x",), texts=("task",), time="time"):
    return tables.read(path, time, numbers, texts, clock or Clock())


def text(tmp_path, content, suffix=".csv"):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_three_formats_say_the_same(tmp_path, suffix):
    table = read(write_table(tmp_path / f"t{suffix}", ROWS))
    assert table.time.tolist() == [500_000_000, 1_000_000_000]
    np.testing.assert_array_equal(table.numbers["x"], [1.5, np.nan])
    assert table.texts["task"] == ["red", None]
    assert (table.names, table.warnings) == ({"time", "x", "task"}, [])


@given(
    value=st.integers(-(2**60), 2**60),
    scale=st.sampled_from([1e-9, 1e-6, 1e-3]),
    offset=st.integers(-2_000_000_000, 2_000_000_000),
)
def test_times_are_exact(value, scale, offset):
    """Nanoseconds since 1970 lose 100 ns in a float."""
    unit = round(scale * 1e9)
    if abs(value * unit) < 2**61:
        assert Clock(scale, offset).nanoseconds(value) == value * unit + offset * 10**9
        assert Clock(scale, offset).nanoseconds(str(value)) == value * unit + offset * 10**9


@pytest.mark.parametrize(
    "cell", ["", "x", "nan", "inf", "1e999999999", "1e300", "1_0", None, True, [1], {}, float("nan"), 10**400]
)
def test_what_is_no_time_is_refused(cell):
    with pytest.raises(ValueError):  # noqa: PT011 its text is for nobody
        Clock().nanoseconds(cell)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("time,x\n0,abc\n", "line 2, column 'x': 'abc' is no number"),
        ("time,x\n0,1\n0.1,inf\n", "line 3, column 'x': 'inf' is no number"),
        ("time,x\n0,1_000\n", "column 'x': '1_000' is no number"),
        ("time,x\n,1\n", "line 2, column 'time': the cell is empty"),
        ("time,x\nnan,1\n", "line 2, column 'time': 'nan' is no number"),
        ("t,x\n0,1\n", r"has no column 'time' to take times from; its columns are t, x: .*files.columns"),
        ("", "has no column 'time' to take times from; its columns are none"),
        ("time,x,x\n0,1,2\n", "two columns are called 'x'"),
        ("time,x\n0,1,2\n1,2\n", "line 2: the row has 3 cells, the first line 2"),
        (b"time,x\n0,\xff\xfe\n", "cannot read the table"),
        ("time,x\n0,1\n" + "9" * (1 << 20), "line 3 is longer than 1 MiB"),
        ('time,x\n0,"' + "1\n" * 200_000, "cannot read the table"),
    ],
)
def test_a_bad_csv_is_refused_in_one_sentence(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read(text(tmp_path, content))
    assert len(str(caught.value)) < 500


def test_csv_of_other_tools(tmp_path):
    """A byte order mark, semicolons, spaces, Windows line ends, quotes, truth values and empty lines."""
    table = read(text(tmp_path, '\ufefftime; x ;task\r\n0;" 2.5";"a;b"\r\n\r\n1;true;\r\n2;NaN;x'))
    np.testing.assert_array_equal(table.numbers["x"], [2.5, 1, np.nan])
    assert table.texts["task"] == ["a;b", None, "x"]
    assert table.time.tolist() == [0, 10**9, 2 * 10**9]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", "time,x\n0,1\n1,2\n2"),
        (".jsonl", '{"time": 0, "x": 1}\n{"time": 1, "x": 2}\n{"time": 2, "x'),
    ],
)
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, suffix, content):
    table = read(text(tmp_path, content, suffix))
    assert table.numbers["x"].tolist() == [1, 2]
    (warning,) = table.warnings
    assert re.search(r"ends in the middle of line \d, which is left out", warning)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"time": 0}\n{"time\n{"time": 1}\n', "line 2 is no valid JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"time": 0, "x": [1]}\n', r"line 1, column 'x': \[1\] is no number"),
        ('{"time": 0, "x": Infinity}\n', "line 1, column 'x': inf is no number"),
        ('{"time": 0, "x": 1e999}\n', "line 1, column 'x': inf is no number"),
        ('{"x": 1}\n', "has no column 'time' .* its columns are x"),
        ('{"time": 0, "x": ' + "9" * 5000 + "}\n", "line 1 is no valid JSON|is no number"),
        ("[" * 100_000 + "\n", "line 1 is no valid JSON"),
    ],
)
def test_bad_jsonl_is_refused_in_one_sentence(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read(text(tmp_path, content, ".jsonl"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_are_put_in_order_and_the_later_of_two_counts(tmp_path, suffix):
    rows = [{"time": t, "x": x} for t, x in [(2.0, 0), (1.0, 1), (1.0, 2), (3.0, 3)]]
    table = read(write_table(tmp_path / f"t{suffix}", rows))
    assert table.numbers["x"].tolist() == [1, 2, 0, 3]
    back, same = table.warnings
    assert "time goes back in 1 rows" in back
    assert "1 rows have the time of another" in same


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_elements_of_lists_and_objects(tmp_path, suffix):
    path = write_table(tmp_path / f"t{suffix}", [{"time": 1, "a": [1.0, 2.0], "m": {"dx": 3.0}}])
    table = read(path, numbers=("a[1]", "m.dx", "a[7]", "b[0]"))
    assert table.names == {"time", "a[1]", "m.dx"}
    assert (table.numbers["a[1]"][0], table.numbers["m.dx"][0]) == (2, 3)


def test_parquet_moments_are_exact(tmp_path):
    stamps = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    pq.write_table(pa.table({"time": stamps, "x": pa.array([7], pa.int64())}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", Clock(1, -1_700_000_000)).time.tolist() == [123_456_789]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"time,x\n0,1\n"])
def test_what_is_no_parquet_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="cannot read the table"):
        read(text(tmp_path, content, ".parquet"))
