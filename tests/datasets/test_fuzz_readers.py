"""A few seconds of `fuzz_readers`, and what its longer runs have found, each under the name of the bug."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from itertools import pairwise

import cv2
import footage_files as footage
import fuzz_readers
import minecraft_files as minecraft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ros1_files
from foreign_lerobot import TOP
from fuzz_readers import DATASET, FINDING, SENTENCE, Outcome
from test_ingest import ARRAY, T0, TICK, drive, robot, take
from test_lerobot_source import arm

from d4_datasets import bags, ingest
from d4_datasets.bags import Bag, read_bag
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

SEED = 5


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return fuzz_readers.prepare(tmp_path_factory.mktemp("samples"))


def test_every_sample_is_whole(tmp_path, samples):
    assert len(samples) >= 24
    for sample in samples:
        folder = tmp_path / sample.name
        folder.mkdir()
        shutil.copytree(sample.root, folder / "in")
        assert fuzz_readers.run(sample, folder).what == DATASET, sample.name


def test_mutated_recordings_give_a_dataset_or_a_sentence(tmp_path, samples):
    seen = set()
    for number, sample, _, outcome in fuzz_readers.cases(samples, tmp_path, SEED, iter(range(36))):
        assert outcome.what != FINDING, f"{sample.name}, case {number} of seed {SEED}: {outcome.text}"
        seen.add(outcome.what)
    assert seen == {DATASET, SENTENCE}


@pytest.mark.parametrize(
    ("body", "what", "text"),
    [
        ("raise ValueError('a bug')", FINDING, "ValueError: a bug"),
        ("raise UserError('it is broken')", SENTENCE, "it is broken"),
        ("raise UserError('x' * 9999)", SENTENCE, "xxx...xxx"),
        ("bytearray(4 << 30)", FINDING, "MemoryError"),
        ("os.abort()", FINDING, "status"),
        ("[None for _ in iter(int, 1)]", FINDING, "no end"),
        ("(out.parent / 'half').touch(); raise UserError('no')", FINDING, "left on the disk"),
    ],
)  # fmt: skip
def test_the_harness_sees_what_goes_wrong(tmp_path, samples, monkeypatch, body, what, text):
    def read(source, sample, out):
        exec(body, {"UserError": UserError, "os": os, "out": out})
        return DATASET

    monkeypatch.setattr(fuzz_readers, "_read", read)
    monkeypatch.setattr(fuzz_readers, "SECONDS", 1)
    (tmp_path / "in").mkdir()
    outcome: Outcome = fuzz_readers.run(samples[0], tmp_path)
    assert outcome.what == what
    assert text in outcome.text


def test_memory_of_the_tests_before_is_nobodys_finding(tmp_path, samples, monkeypatch):
    """A fork begins with the memory of its parent, and that of a long session was taken for the reader's."""
    monkeypatch.setattr(fuzz_readers, "MEMORY", 1 << 27)
    monkeypatch.setattr(fuzz_readers, "_read", lambda source, sample, out: DATASET)
    (tmp_path / "in").mkdir()
    ballast = np.ones(1 << 28, np.uint8)
    assert fuzz_readers.run(samples[0], tmp_path).what == DATASET
    del ballast


def test_the_command_saves_findings(tmp_path, monkeypatch, capsys):
    def read(source, sample, out):
        raise ValueError("a bug")

    monkeypatch.setattr(fuzz_readers, "_read", read)
    monkeypatch.setattr(
        sys, "argv", ["fuzz", "--minutes", "0.1", "--only", "ros1", "--out", str(tmp_path / "f")]
    )
    assert fuzz_readers.main() == 1
    (kept,) = (tmp_path / "f").iterdir()  # the same bug in every case
    assert "ValueError: a bug" in (kept / "report.txt").read_text()
    assert (kept / "in").is_dir()
    assert "FINDING" in capsys.readouterr().out


# ---- findings


def test_frames_of_a_damaged_bag_are_read_in_the_company_of_the_first_reading(tmp_path, monkeypatch):
    """In a damaged database the place of a message among those of its topic may depend on what is read beside
    it: frames went to the wrong ticks, or did not come at all (IndexError)."""
    asked = []
    real = Bag.raw
    monkeypatch.setattr(Bag, "raw", lambda self, topics: asked.append(list(topics)) or real(self, topics))
    take(tmp_path, drive(1))
    assert len(asked) == 2
    assert asked[0] == asked[1]


def test_frames_that_are_gone_at_the_second_reading_are_said(tmp_path, monkeypatch):
    real, calls = Bag.raw, []

    def raw(self, topics):
        calls.append(1)
        for item in real(self, topics):
            if len(calls) == 1 or item[0] != "/cam":
                yield item

    monkeypatch.setattr(Bag, "raw", raw)
    with pytest.raises(UserError, match="6 pictures of /cam are not there any more"):
        take(tmp_path, drive(1))


def test_a_damaged_connection_in_a_chunk_of_ros1_is_passed_over(tmp_path):
    """It ended in a traceback where the chunk had to be looked into."""
    drive(1).write(tmp_path / "bag")
    data = ros1_files.convert(tmp_path / "bag", tmp_path / "a.bag").read_bytes()
    (index,) = struct.unpack_from("<Q", data, data.index(b"index_pos=") + 10)
    broken = bytearray(data[:index])  # nothing but the chunk says what its connections are
    at = data.index(b"md5sum=")
    broken[at - 4 : at] = b"\xff\xff\xff\x7f"
    (tmp_path / "a.bag").write_bytes(broken)
    topics = set(read_bag(tmp_path / "a.bag").bag.topics)
    whole = set(Bag(tmp_path / "bag").topics)
    assert topics < whole
    assert len(topics) == len(whole) - 1


def change_column(root, name, change):
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    column = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
    pq.write_table(table.set_column(place, name, column), path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("task_index", lambda rows: [9] * len(rows), "task_index is beyond the tasks"),
        ("reward", lambda rows: [[float("nan")] * len(row) for row in rows], "reward has NaN or infinite"),
        ("observation.pose", lambda rows: [float("inf")] * len(rows), "pose has NaN or infinite"),
    ],
)  # fmt: skip
def test_a_damaged_dataset_of_our_own_is_not_copied_blindly(tmp_path, samples, name, change, message):
    """IndexError, and ValueError for what the writer refuses."""
    root = tmp_path / "in"
    sample = next(sample for sample in samples if sample.name == "ours")
    shutil.copytree(sample.root, root)
    change_column(root, name, change)
    with pytest.raises(UserError, match=f"episode 0: its metadata and its rows do not fit .*{message}"):
        ingest.ingest([root], sample.contract(root), tmp_path / "data")


def test_a_dataset_without_a_contract_is_none(tmp_path, samples):
    root = tmp_path / "in"
    sample = next(sample for sample in samples if sample.name == "ours")
    shutil.copytree(sample.root, root)
    for content in ("{}", "[]", "5", "[" * 100_000):
        (root / "meta/d4.json").write_text(content)
        with pytest.raises(UserError, match=r"is not a dataset of d4-ingest"):
            ingest.ingest([root], sample.contract(root), tmp_path / "data")


@pytest.mark.parametrize("shape", [[1 << 40], [10**400], [-1], "many", [1e300]])
def test_the_shape_of_a_feature_is_not_believed(tmp_path, samples, shape):
    """A list of all its elements was made: MemoryError."""
    root = tmp_path / "in"
    shutil.copytree(next(sample.root for sample in samples if sample.name == "lerobot3"), root)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["next.done"]["shape"] = shape
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"info\.json is damaged: the shape of next\.done is"):
        ingest.ingest([root], arm(), tmp_path / "data")


@pytest.mark.parametrize("damage", ["version", "password", "method", "array"])
def test_an_archive_that_zipfile_does_not_take_is_named(tmp_path, damage):
    """NotImplementedError: zip file version 17.3."""
    path = minecraft.write_stream(tmp_path / "in/a", 9, before=2) / "rendered.npz"
    data = bytearray(path.read_bytes())
    for at in [at for at in range(len(data)) if data[at : at + 4] in (b"PK\x01\x02", b"PK\x03\x04")]:
        is_central = data[at + 2] == 1
        if damage == "version":
            data[at + (6 if is_central else 4)] = 173
        elif damage == "password":
            data[at + (8 if is_central else 6)] |= 1
        elif damage == "method":
            data[at + (10 if is_central else 8)] = 99
    if damage == "array":
        np.save(path.with_suffix(".npy"), np.zeros(5))
        data = path.with_suffix(".npy").read_bytes()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rendered\.npz: .* cannot be read"):
        ingest.ingest([tmp_path / "in"], minecraft.contract("minerl"), tmp_path / "data")


LAUGHS = "a: &a [1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: " + "[" * 800 + "]" * 800, "is not valid YAML|`name`: must be text"),
        ("name: &a [*a]", "has more than 10000 entries"),
        (LAUGHS, "has more than 10000 entries"),
        ("name: 2024-99-99", "is not valid YAML"),
        ("# " + "x" * (1 << 20), "has more than 1 MiB"),
        (f"{'k' * 900}: 1\nname: toy", "this key is missing|unknown key"),
        (f"name: {'x!' * 5000}", r"`name`: 'x!.*\.\.\.$"),
    ],
)  # fmt: skip
def test_a_contract_that_is_none_is_a_short_sentence(tmp_path, content, message):
    """The sentence held all of the text, and of aliases more than there is memory for."""
    (tmp_path / "robot.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Contract.load(tmp_path / "robot.yaml")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [1e39, -1e300, float("inf"), float("nan")])
def test_numbers_beyond_single_precision_are_named(tmp_path, value):
    """They became infinite on the way to the file, and a ValueError."""
    log = drive(1)
    poses = [item for item in log.items if item[0] == "/pose"]
    poses[2][3].pose.position.x = value
    with pytest.raises(UserError, match=r"/pose at .*: pose\.position\.x is "):
        take(tmp_path, log)
    shutil.rmtree(tmp_path / "bags")
    log = drive(1)
    log.add("/reward", ARRAY, T0 + TICK, bags.float64_array([value, 0]))
    with pytest.raises(UserError, match=r"/reward at .*: a reward is NaN or too large"):
        take(tmp_path, log)


def test_recordings_without_episodes_leave_nothing_behind(tmp_path):
    """Their parts were kept for a next run that could not use them."""
    empty = drive(1).without("/episode")
    empty.add("/episode", "std_msgs/msg/Int64", 1 << 61, bags.new("std_msgs/msg/Int64"))
    with pytest.raises(UserError, match="no episode came out of 1 bags"):
        take(tmp_path, empty, contract=robot())
    assert os.listdir(tmp_path) == ["bags"]


def test_a_reward_of_a_table_beyond_single_precision_is_named(tmp_path):
    footage.write_video(tmp_path / "a.mp4", [footage.picture(k) for k in range(5)])
    rows = [{"time": k / 10, "reward": 1e300 if k == 3 else 0} for k in range(5)]
    footage.write_table(tmp_path / "a.csv", rows)
    contract = footage.contract(reward={"topic": "/reward", "type": ARRAY})
    with pytest.raises(UserError, match="a reward is NaN or too large"):
        ingest.ingest([tmp_path / "a.mp4"], contract, tmp_path / "data")


@pytest.mark.parametrize("name", ["lerobot2", "lerobot3"])
def test_what_a_parquet_file_says_of_its_columns_is_not_asked_for(tmp_path, samples, name, monkeypatch):
    """Where that was damaged pyarrow ended the process: `Definition level histogram size mismatch`."""

    class Metadata:
        def __getattr__(self, what):
            if what != "num_row_groups":  # pyarrow itself asks for this one
                raise AssertionError(f"{what} was asked for")
            return 1

    root = tmp_path / "in"
    sample = next(sample for sample in samples if sample.name == name)
    shutil.copytree(sample.root, root)
    monkeypatch.setattr(pq.ParquetFile, "metadata", Metadata())
    assert ingest.ingest([root], sample.contract(root), tmp_path / "data").frames == 24


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("/etc/{chunk_index}", "is not in the dataset"),
        ("../{chunk_index:03d}", "is not in the dataset"),
        ("{chunk_index:0999999999d}", "is no path"),
        ("{chunk_index.__class__}", "is no path"),
        ("x" * 5000, "is no path"),
        ("{", "is no path"),
    ],
)
def test_templates_of_paths_lead_nowhere_else(tmp_path, samples, template, message):
    root = tmp_path / "in"
    shutil.copytree(next(sample.root for sample in samples if sample.name == "lerobot3"), root)
    info = json.loads((root / "meta/info.json").read_text())
    info["data_path"] = template
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=message) as caught:
        ingest.ingest([root], arm(), tmp_path / "data")
    assert len(str(caught.value)) < 500


def test_pictures_that_a_cell_names_lie_in_the_dataset(tmp_path, samples):
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((8, 12, 3), np.uint8))
    root = tmp_path / "in"
    shutil.copytree(next(sample.root for sample in samples if sample.name == "lerobot2"), root)
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        path = next((root / "data").rglob("*.parquet"))
        table = pq.read_table(path)
        place = table.schema.get_field_index(TOP)
        cells = pa.array([{"bytes": None, "path": name}] * table.num_rows, table.schema.field(TOP).type)
        pq.write_table(table.set_column(place, TOP, cells), path)
        with pytest.raises(UserError, match="which is not in the dataset"):
            ingest.ingest([root], arm(), tmp_path / "data")
