"""Every kind of recording on a disk that is full or shut, under a command that is killed, and with sizes that
lie: one sentence, nothing left behind, and the same command goes on when the cause is gone."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import struct
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import footage_files as footage
import fuzz_readers
import minecraft_files as minecraft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_lerobot import TOP
from test_broken_bags import as_another_user
from test_ingest import COMPRESSED, drive, robot, take
from test_lerobot_source import arm

from d4_datasets import bags, messages, packed, tables
from d4_datasets.bags import new
from d4_datasets.errors import UserError, sentence
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return {sample.name: sample for sample in fuzz_readers.prepare(tmp_path_factory.mktemp("samples"))}


def attempt(sample, out, root=None):
    """ "ok" or the sentence."""
    source = root or sample.root
    try:
        ingest([source], sample.contract(source), out, msg_path=sample.msg_path(source))
    except Exception as error:
        return sentence(error) or repr(error)
    return "ok"


def limited(size, body):
    """What `body()` says in a process whose files may not become larger than `size` bytes."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return body()

    return forked(run)


def forked(body):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(body()).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


# ---- a disk that is full


@pytest.mark.parametrize("name", ["mcap", "folder-zstd", "film-mp4", "minerl", "lerobot2"])
def test_files_that_may_not_grow_are_one_sentence_at_every_size(tmp_path, samples, name):
    said = set()
    for size in (0, 700, 5000, 9000, 13000, 20000, 26000, 32000):
        answer = limited(size, lambda: attempt(samples[name], tmp_path / "data"))
        said.add(answer.split(":")[0].split(" (")[0].split(" /")[0])
        if answer == "ok":
            shutil.rmtree(tmp_path / "data")
        else:
            assert [path.name for path in tmp_path.iterdir() if path.name != ".tmp-data-parts"] == [], answer
    assert said <= {"a file would become too large", "ok"}, said
    assert attempt(samples[name], tmp_path / "data") == "ok"
    assert os.listdir(tmp_path) == ["data"]


def on_small_disk(folder, kib, body):
    """What `body()` says where `folder` is a disk of so many KiB, and in a second line what it leaves."""

    def run():
        libc = ctypes.CDLL(None, use_errno=True)
        # A view of the disks of its own, which ends with the process: a namespace of mounts, which only root
        # may have, or who is root in a namespace of users.
        user = os.geteuid()
        if libc.unshare(0x00020000 | (0x10000000 if user else 0)):
            return "cannot"
        if user:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        if libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):
            return "cannot"
        if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={kib}k".encode()):
            return "cannot"
        said = body()
        left = sorted(path.name for path in folder.iterdir() if path.name != ".tmp-data-parts")
        return f"{said}\n{left}"

    return forked(run)


@pytest.mark.parametrize("name", ["mcap", "film-mp4"])
def test_a_full_disk_is_one_sentence_wherever_it_happens(tmp_path, samples, name):
    answers = []
    for kib in (4, 12, 20, 32, 40, 52, 64, 80, 100, 400):
        answers.append(on_small_disk(tmp_path, kib, lambda: attempt(samples[name], tmp_path / "data")))
        if answers[-1] == "cannot":
            pytest.skip("small disks cannot be made here")
        said, left = answers[-1].split("\n")
        assert (said == "ok" and left == "['data']") or (said.startswith("disk full") and left == "[]"), said
    assert answers[0] != answers[-1]
    assert answers[-1].startswith("ok")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_dataset_that_was_there(tmp_path, samples):
    first, second = samples["mcap"], samples["mcap-lz4"]
    assert attempt(first, tmp_path / "data") == "ok"
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    for size in (700, 13000, 26000):
        answer = limited(size, lambda: attempt(second, tmp_path / "data"))
        assert answer.startswith("a file would become too large")
        assert {path: path.read_bytes() for path in before} == before
    assert attempt(second, tmp_path / "data") == "ok"
    assert Dataset(tmp_path / "data").info["total_episodes"] == 4


# ---- what may not be read


@pytest.mark.parametrize(
    "name", ["mcap", "db3", "ros1", "folder-zstd", "film-mp4", "pictures", "contractor", "minerl", "lerobot3"]
)
def test_a_file_that_may_not_be_read_is_named(tmp_path, samples, name):
    root = tmp_path / "in"
    shutil.copytree(samples[name].root, root)
    for file in samples[name].files:
        if not file.endswith((".yaml", ".json")):
            (root / file).chmod(0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    for parent in [tmp_path, *tmp_path.parents[:2]]:
        if not os.geteuid():
            parent.chmod(0o755)
    answer = as_another_user(lambda: attempt(samples[name], tmp_path / "out/data", root))
    assert "ermission denied" in answer or "unable to open" in answer or "can be read" in answer, answer
    assert len(answer.splitlines()) == 1
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_that_may_not_be_written_is_named(tmp_path, samples):
    for parent in [tmp_path, *tmp_path.parents[:2]]:
        if not os.geteuid():
            parent.chmod(0o755)
    answer = as_another_user(lambda: attempt(samples["mcap"], tmp_path / "data"))
    assert "ermission denied" in answer, answer


# ---- killed


def test_killed_at_any_moment_all_kinds_go_on(tmp_path, samples):
    """Bags, videos and tables in one run, killed again and again: the dataset that comes out is that of a run
    in peace, and the one that was there stays whole until then."""
    contract = footage.contract(size=(8, 12))
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(6):
        frames = [footage.picture(20 * number + k, (16, 24)) for k in range(15)]
        footage.write_video(videos / f"v{number}.mp4", frames)
    ingest([videos / "v0.mp4"], contract, tmp_path / "data")
    delay = 0.02
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                ingest([videos], contract, tmp_path / "data")
            finally:
                os._exit(0)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        delay *= 1.7
        assert Dataset(tmp_path / "data").info["total_episodes"] in (1, 6)
    ingest([videos], contract, tmp_path / "data")
    ingest([videos], contract, tmp_path / "peace")
    killed, peace = Dataset(tmp_path / "data"), Dataset(tmp_path / "peace")
    assert killed.info["total_frames"] == peace.info["total_frames"] == 90
    for number in range(6):
        for one, other in zip(killed.frames("front", number), peace.frames("front", number), strict=True):
            np.testing.assert_array_equal(one, other)
    assert sorted(os.listdir(tmp_path)) == ["data", "peace", "videos"]


# ---- sizes that lie


def png(width, height, bits=8):
    """A png of a few hundred bytes that says how large it is."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", head)
        + part(b"IDAT", zlib.compress(bytes(1 << 16)))
        + part(b"IEND", b"")
    )


def jpeg(width, height):
    """A jpeg whose header says how large it is."""
    data = bytearray(cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = [png(40_000, 40_000), png(1 << 31 - 1, 1), png((1 << 31) - 1, (1 << 31) - 1), jpeg(65_535, 65_535)]


@pytest.mark.parametrize("data", BOMBS)
@pytest.mark.parametrize("format", ["png", "16UC1; compressedDepth png"])
def test_a_picture_that_says_it_is_huge_takes_no_memory(data, format):
    content = b"\0" * 12 + data if "Depth" in format else data
    msg = new(COMPRESSED, format=format, data=np.frombuffer(content, np.uint8))
    with pytest.raises(UserError, match="pixels, which is too many"):
        messages.decode(msg, (0, 1))


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".pgm"])
def test_other_formats_that_say_they_are_huge(suffix):
    """Their headers are not read by us but by OpenCV, whose own limit holds."""
    good, data = cv2.imencode(suffix, np.zeros((16, 17), np.uint8))
    assert good
    head = data.tobytes().replace(b"17 16", b"9999999 9999999")
    for old in (struct.pack("<I", 17), struct.pack(">I", 17), struct.pack("<H", 17)):
        head = head.replace(old, b"\x7f" * len(old))
    msg = new(COMPRESSED, format=suffix[1:], data=np.frombuffer(head, np.uint8))
    said = forked(lambda: decoded_with_little_memory(msg))
    assert "cannot be decoded" in said, said


def decoded_with_little_memory(msg):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
    try:
        return messages.decode(msg).shape
    except UserError as error:
        return error


def test_frames_of_many_sizes_in_one_bag(tmp_path):
    log = drive(1)
    sizes = [(8, 12), (16, 24), (1, 1), (300, 2), (8, 12), (64, 64)]
    pictures = [item for item in log.items if item[0] == "/cam"]
    for item, (height, width) in zip(pictures, sizes, strict=True):
        stamp = messages.stamp_ns(item[3])
        item[3] = bags.compressed_image(np.full((height, width, 3), 77, np.uint8), stamp)
    dataset, _ = take(tmp_path, log)
    frames = np.stack(list(dataset.frames("cam", 0)))
    assert frames.shape == (6, 8, 12, 3)
    assert (frames == 77).all()


def huge_column(path, rows):
    """A Parquet file of a few kilobytes with so many equal rows."""
    values = pa.array(np.zeros(1 << 20, np.float64))
    with pq.ParquetWriter(path, pa.schema([("time", pa.float64())]), compression="zstd") as writer:
        for _ in range(rows >> 20):
            writer.write_table(pa.table({"time": values}))


def test_a_parquet_table_of_billions_of_equal_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_ROWS", 1 << 14)
    footage.write_video(tmp_path / "a.mp4", [footage.picture(k) for k in range(4)])
    huge_column(tmp_path / "a.parquet", 8 << 20)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 16
    with pytest.raises(UserError, match=r"a\.parquet: it has more than 16384 rows, which"):
        ingest([tmp_path / "a.mp4"], footage.contract(), tmp_path / "data")


def test_rows_of_a_lerobot_dataset_without_end_are_refused(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_BYTES", 1000)
    shutil.copytree(samples["lerobot3"].root, tmp_path / "in")
    with pytest.raises(UserError, match=r"is damaged .*it has more than .* rows, of .* MiB"):
        ingest([tmp_path / "in"], arm(), tmp_path / "data")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("cell", [png(40_000, 40_000), jpeg(65_535, 65_535), b"", b"\x89PNG\r\n\x1a\n"])
def test_pictures_in_cells_are_bounded_too(tmp_path, samples, cell):
    shutil.copytree(samples["lerobot2"].root, tmp_path / "in")
    path = next((tmp_path / "in/data").rglob("*.parquet"))
    table = pq.read_table(path)
    cells = [{"bytes": cell, "path": "x.png"}] * table.num_rows
    place = table.schema.get_field_index(TOP)
    pq.write_table(table.set_column(place, TOP, pa.array(cells, table.schema.field(TOP).type)), path)
    with pytest.raises(UserError, match="cannot be decoded: it "):
        ingest([tmp_path / "in"], arm(), tmp_path / "data")


def test_an_array_whose_header_lies_about_its_shape(tmp_path):
    stream = minecraft.write_stream(tmp_path / "in/a", 9, before=2)
    path = stream / "rendered.npz"
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    parts["reward.npy"] = parts["reward.npy"].replace(b"(9,), }" + b" " * 15, b"(9000000000000000,), }")
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    with pytest.raises(UserError, match=r"rendered\.npz: (reward|the file) cannot be read"):
        ingest([tmp_path / "in"], minecraft.contract("minerl"), tmp_path / "data")


def test_metadata_that_are_huge_or_deep(tmp_path, samples, monkeypatch):
    shutil.copytree(samples["lerobot3"].root, tmp_path / "in")
    info = tmp_path / "in/meta/info.json"
    whole = info.read_text()
    info.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deep"):
        ingest([tmp_path / "in"], arm(), tmp_path / "data")
    monkeypatch.setattr(packed, "_LONGEST_TEXT", 1 << 20)
    info.write_text(whole + " " * (1 << 20))
    with pytest.raises(UserError, match="it has more than 1 MiB"):
        ingest([tmp_path / "in"], arm(), tmp_path / "data")


def test_names_in_metadata_lead_to_nothing_that_is_written(tmp_path, samples):
    """Names of cameras, of recordings and of files become names of files in the dataset."""
    contract = footage.contract()
    (tmp_path / "in").mkdir()
    odd = tmp_path / "in/x..%2f..%2fetc.mp4"
    footage.write_video(odd, [footage.picture(k) for k in range(4)])
    ingest([tmp_path / "in"], contract, tmp_path / "data")
    assert sorted(os.listdir(tmp_path)) == ["data", "in"]
    for name in ("../x", "a/b", "", ".", "x\0y"):
        with pytest.raises(UserError, match="must be"):
            footage.contract(cameras=(name,))
    assert robot().name == "toy"
