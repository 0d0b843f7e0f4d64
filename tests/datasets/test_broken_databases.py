"""sqlite3 bags that are damaged, or made to do harm; nothing is left beside them by reading."""

from __future__ import annotations

import signal
import sqlite3
import struct
import subprocess
import sys

import pytest
from fuzz_samples import write_rosbag2
from rosbags.rosbag2 import StoragePlugin
from test_broken_bags import COUNT, ITEMS, item, read

from d4_datasets.bags import bag_files
from d4_datasets.recording import files


def test_reading_a_database_leaves_nothing_beside_it(tmp_path):
    """sqlite made two files beside a database that was recorded with a write-ahead log, so that the bag
    counted as changed and was ingested once more."""
    write_rosbag2(tmp_path / "bag", ITEMS, StoragePlugin.SQLITE3)
    with sqlite3.connect(tmp_path / "bag/bag.db3") as database:
        database.execute("PRAGMA journal_mode = WAL")
    database.close()
    before = sorted(path.name for path in (tmp_path / "bag").iterdir())
    assert read(tmp_path / "bag")[0] == list(range(COUNT))
    assert sorted(path.name for path in (tmp_path / "bag").iterdir()) == before


def test_a_killed_recorder_left_its_last_messages_in_the_log(tmp_path):
    write_rosbag2(tmp_path / "bag", ITEMS[:-2], StoragePlugin.SQLITE3)
    path = tmp_path / "bag/bag.db3"
    rows = [(stamp, data.hex()) for _, _, stamp, data in ITEMS[-2:]]
    code = f"""
import os, signal, sqlite3
database = sqlite3.connect({str(path)!r})
database.execute("PRAGMA journal_mode = WAL")
for stamp, data in {rows!r}:
    row = (stamp, bytes.fromhex(data))
    database.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES (1, ?, ?)", row)
database.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (tmp_path / "bag/bag.db3-shm").unlink()
    before = files(tmp_path / "bag")
    assert any(file.name.endswith("-wal") for file in before)
    assert read(tmp_path / "bag")[0] == list(range(COUNT))
    assert sorted(bag_files(tmp_path / "bag")) == sorted(before)


@pytest.mark.parametrize("name", ["messages", "topics"])
def test_a_view_in_the_place_of_a_table_is_refused(tmp_path, name):
    """It could compute rows without end."""
    write_rosbag2(tmp_path / "bag", ITEMS, StoragePlugin.SQLITE3)
    with sqlite3.connect(tmp_path / "bag/bag.db3") as database:
        columns = {
            "messages": "1 AS id, 1 AS topic_id, n AS timestamp, x'00' AS data",
            "topics": "n AS id, '/x' AS name, 'a/msg/B' AS type, 'cdr' AS serialization_format",
        }
        database.execute(f"ALTER TABLE {name} RENAME TO other")
        rows = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"
        database.execute(f"CREATE VIEW {name} AS {rows} SELECT {columns[name]} FROM r")
    assert f"its {name} is no plain table" in read(tmp_path / "bag")[1][-1]


def test_a_column_that_is_computed_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "a.db3") as database:
        database.execute("CREATE TABLE topics(id INTEGER, name TEXT, type TEXT, serialization_format TEXT)")
        database.execute(
            "CREATE TABLE messages(id INTEGER, topic_id INTEGER, timestamp INTEGER, "
            "data BLOB AS (zeroblob(1000000000)))"
        )
    assert "its messages is no plain table" in read(tmp_path / "a.db3")[1][0]


def test_without_an_index_messages_come_in_order_of_time(tmp_path, monkeypatch):
    write_rosbag2(tmp_path / "bag", [ITEMS[k] for k in (3, 0, 2, 1)], StoragePlugin.SQLITE3)
    with sqlite3.connect(tmp_path / "bag/bag.db3") as database:
        database.execute("DROP INDEX timestamp_idx")
    assert read(tmp_path / "bag") == ([0, 1, 2, 3], [])


@pytest.mark.parametrize("index", [True, False])
def test_a_table_whose_pages_go_round_in_circles_has_an_end(tmp_path, index):
    """A flipped bit in the number of a page made sqlite give the same rows for ever."""
    write_rosbag2(tmp_path / "bag", [item(k, 200) for k in range(200)], StoragePlugin.SQLITE3)
    path = tmp_path / "bag/bag.db3"
    with sqlite3.connect(path) as database:
        if not index:
            database.execute("DROP INDEX timestamp_idx")
        (root,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'messages'").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    data = bytearray(path.read_bytes())
    page = (root - 1) * size
    assert data[page] == 5  # an inner page: its cells lead to others
    cells = [struct.unpack_from(">H", data, page + 12 + 2 * k)[0] for k in range(3)]
    children = [data[page + cell : page + cell + 4] for cell in cells]
    data[page + cells[2] : page + cells[2] + 4] = children[0]
    data[page + 8 : page + 12] = children[1]  # the rightmost
    path.write_bytes(data)
    found, warnings = read(path)
    assert len(found) <= 200
    assert any("is damaged" in text for text in warnings)


def test_a_name_with_marks_of_an_address(tmp_path):
    write_rosbag2(tmp_path / "bag", ITEMS, StoragePlugin.SQLITE3)
    path = tmp_path / "what? 100% #1&mode=rwc.db3"
    (tmp_path / "bag/bag.db3").rename(path)
    assert read(path) == (list(range(COUNT)), [])
