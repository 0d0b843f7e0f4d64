"""Bags whose camera was recorded as latents: d4-ingest keeps them, says whose they are and mixes nothing."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from d4_datasets import bags, ingest
from d4_datasets.audit import audit
from d4_datasets.bags import read_bag
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.latents import TYPE, Origin, pack
from d4_datasets.lerobot import Dataset
from d4_datasets.windows import Windows

DEFINITION = Path(__file__).parents[2] / "ros2_ws" / "src" / "d4_interfaces" / "msg" / "Latents.msg"
T0, TICK, MS = 1_700_000_000_000_000_000, 100_000_000, 1_000_000
TOPIC, TWIST, PICTURE = "/cam/latents", "geometry_msgs/msg/Twist", "sensor_msgs/msg/CompressedImage"
SHAPE = (3, 4)
HOLD = {"strategy": "hold", "timeline": "header", "tolerance_ms": 150}


def robot(topic: str = "/cam", kind: str = PICTURE, cameras: int = 1) -> Contract:
    camera = {"topic": topic, "type": kind, "size": [8, 12], "align": HOLD}
    return Contract.from_dict({
        "name": "toy", "rate_hz": 10, "latency_ms": 40,
        "observations": [{"name": f"cam{n}"[: 3 + n], **camera} for n in range(cameras)],
        "actions": [{
            "name": "base", "topic": "/cmd_vel", "type": TWIST, "select": ["linear.x"], "low": [-1],
            "high": [1], "safety": "zeros", "align": {**HOLD, "timeline": "receive"},
        }],
        "episode": {"start": {"topic": "/episode", "type": "std_msgs/msg/Int64", "select": "data"}},
    })  # fmt: skip


def values(k: int) -> np.ndarray:
    return np.random.default_rng(k).uniform(-1, 1, SHAPE).astype(np.float32)


class Log:
    """A bag in the making; a type that the reader does not know comes with its definition, as ROS records."""

    def __init__(self) -> None:
        self.store = get_typestore(Stores.LATEST)
        self.store.register(get_types_from_msg(DEFINITION.read_text(), TYPE))
        self.items: list[tuple[str, str, int, object]] = []

    def add(self, topic: str, kind: str, at: int, msg: object) -> None:
        self.items.append((topic, kind, at, msg))

    def latents(self, k: int, stamp: int, at: int | None = None, codec="float16", weights="abc", **changes):
        parts = {**pack(values(k), codec), **changes}
        msg = self.store.types[TYPE](header=bags.header(stamp, "lens"), weights=weights, **parts)
        self.add(TOPIC, TYPE, stamp if at is None else at, msg)

    def start(self, at: int) -> None:
        self.add("/episode", "std_msgs/msg/Int64", at, bags.new("std_msgs/msg/Int64", data=0))

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            known = {}
            for topic, kind, at, msg in sorted(self.items, key=lambda item: item[2]):
                if topic not in known:
                    known[topic] = writer.add_connection(topic, kind, typestore=self.store)
                writer.write(known[topic], at, self.store.serialize_cdr(msg, kind))
        return path


def drive(length: int = 6, first: int = 0, **options) -> Log:
    """One episode: each tick latents, 3 ms after their picture was captured, and a command in answer."""
    log = Log()
    log.start(T0 + 12 * MS)
    for step in range(length):
        stamp = T0 + step * TICK
        log.latents(first + step, stamp, stamp + 3 * MS, **options)
        twist = bags.new(TWIST)
        twist.linear.x = step / 100
        log.add("/cmd_vel", TWIST, stamp + 40 * MS, twist)
    return log


def take(folder: Path, *logs: Log, contract: Contract | None = None) -> Dataset:
    for number, log in enumerate(logs):
        log.write(folder / f"bags/bag{number}")
    ingest.ingest([folder / "bags"], contract or robot(), folder / "data")
    return Dataset(folder / "data")


def expected(*numbers: int) -> np.ndarray:
    return np.stack([values(k) for k in numbers]).astype(np.float16)


@pytest.mark.parametrize("contract", [robot(), robot(TOPIC, TYPE)], ids=["pictures", "latents"])
def test_latents_stand_at_their_ticks(tmp_path, contract) -> None:
    """By the contract of the robot's pictures, beside whose topic they are, and by one that names them."""
    dataset = take(tmp_path, drive(), contract=contract)
    windows = Windows(dataset.root)
    np.testing.assert_array_equal(windows.latents, expected(*range(6)))
    np.testing.assert_allclose(windows.action[:, 0], np.arange(6) / 100)
    assert windows.action_mask.all()
    assert windows.origin == dataset.origin == Origin("abc", "float16", *SHAPE)
    assert (windows.images, windows.contract.hash) == ({}, contract.hash)
    idx = np.array([[1, 2], [4, 4]])
    np.testing.assert_array_equal(windows.batch(idx, idx > 0)["latents"], windows.latents[idx])
    assert json.loads((dataset.root / "meta/d4.json").read_text())["latents"] == {
        "weights": "abc", "codec": "float16", "tokens": 3, "channels": 4
    }  # fmt: skip
    assert dataset.info["features"]["observation.latents.cam"] == {
        "dtype": "float16", "shape": [12], "names": None
    }  # fmt: skip
    assert not list(dataset.root.rglob("*.mp4"))
    column = pq.read_schema(next(dataset.root.glob("data/*/*.parquet"))).field("observation.latents.cam")
    assert str(column.type) == "fixed_size_list<element: halffloat>[12]"


def test_uint8_latents_are_read_to_half_a_step(tmp_path) -> None:
    windows = Windows(take(tmp_path, drive(codec="uint8")).root)
    assert windows.origin.codec == "uint8"
    assert np.abs(windows.latents.astype(np.float32) - expected(*range(6))).max() <= 2 / 510 + 2**-11


def test_of_two_messages_with_one_stamp_the_later_counts(tmp_path) -> None:
    """The first frame of an episode is encoded again when its start is known, without the past."""
    log = drive()
    log.latents(99, T0, at=T0 + 20 * MS)
    np.testing.assert_array_equal(Windows(take(tmp_path, log).root).latents, expected(99, 1, 2, 3, 4, 5))


def test_pictures_that_were_recorded_are_preferred(tmp_path) -> None:
    log = drive()
    for step in range(6):
        picture = np.full((8, 12, 3), step, np.uint8)
        log.add("/cam", PICTURE, T0 + step * TICK, bags.compressed_image(picture, T0 + step * TICK))
    windows = Windows(take(tmp_path, log).root)
    assert windows.latents is None
    assert [int(image[0, 0, 0]) for image in windows.images["cam"]] == list(range(6))


def test_a_gap_splits_the_episode(tmp_path) -> None:
    log = drive(10)
    log.items = [item for item in log.items if not (item[0] == TOPIC and item[2] in _between(3, 5))]
    windows = Windows(take(tmp_path, log).root)
    np.testing.assert_array_equal(windows.latents, expected(0, 1, 2, 2, 6, 7, 8, 9))
    assert windows.episode_length.tolist() == [4, 4]


def _between(first: int, last: int) -> set[int]:
    return {T0 + step * TICK + 3 * MS for step in range(first, last + 1)}


def test_bags_are_added_and_read_back_over_several_files(tmp_path) -> None:
    take(tmp_path, drive())
    drive(8, first=20).write(tmp_path / "bags/later")
    ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data")
    windows = Windows(tmp_path / "data")
    np.testing.assert_array_equal(windows.latents, expected(*range(6), *range(20, 28)))
    assert Dataset(tmp_path / "data").columns(1)["observation.latents.cam"].shape == (8, 12)


OTHERS = {
    "weights": {"weights": "def"},
    "codec": {"codec": "uint8"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_latents_of_two_tokenizers_do_not_mix(tmp_path, other) -> None:
    take(tmp_path, drive())
    kept = (tmp_path / "data/meta/d4.json").read_bytes()
    drive(**other).write(tmp_path / "bags/other")
    with pytest.raises(
        UserError, match=r"holds latents of tokenizer abc .* and other latents of tokenizer"
    ) as said:
        ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data")
    assert "\n" not in str(said.value)
    assert (tmp_path / "data/meta/d4.json").read_bytes() == kept


def test_pictures_and_latents_do_not_mix(tmp_path) -> None:
    take(tmp_path, drive())
    log = drive()
    log.items = [item for item in log.items if item[0] != TOPIC]
    for step in range(6):
        picture = np.full((8, 12, 3), step, np.uint8)
        log.add("/cam", PICTURE, T0 + step * TICK, bags.compressed_image(picture, T0 + step * TICK))
    log.write(tmp_path / "bags/pictures")
    with pytest.raises(
        UserError, match=r"holds latents of tokenizer abc .* and pictures pictures: a dataset holds"
    ):
        ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data")


def test_a_change_of_tokenizer_within_a_bag_is_refused_with_its_time(tmp_path) -> None:
    log = drive()
    log.latents(7, T0 + 6 * TICK, weights="def")
    with pytest.raises(UserError, match=r"bag0: /cam/latents at 1700000000\.600 s: latents of tokenizer def"):
        take(tmp_path, log)


def test_a_damaged_message_is_refused_with_its_time(tmp_path) -> None:
    log = drive()
    log.latents(7, T0 + 6 * TICK, tokens=4)
    with pytest.raises(UserError, match=r"/cam/latents at 1700000000\.600 s: latents of 4 tokens"):
        take(tmp_path, log)


def test_robots_with_several_cameras_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="latents of a robot with one camera, and contract toy names 2"):
        take(tmp_path, drive(), contract=robot(cameras=2))


def test_without_pictures_and_latents_the_pictures_are_missed(tmp_path) -> None:
    log = drive()
    log.items = [item for item in log.items if item[0] != TOPIC]
    with pytest.raises(UserError, match="has no topic /cam; it has"):
        take(tmp_path, log)


def test_an_audit_looks_at_latents_too(tmp_path) -> None:
    same, other = drive(), drive(first=20)
    dataset = take(tmp_path, same, other)
    found = audit(dataset.root)
    assert {v.level for v in found.verdicts if v.check == "numbers"} == {"OK"}
    assert [row.copy_of for row in found.episodes] == [None, None]  # the same commands, and yet no copies


def test_the_reader_needs_nothing_of_ros(tmp_path) -> None:
    """What was recorded says what it is, and we write all of it."""
    lines = [line.split() for line in DEFINITION.read_text().splitlines()]
    fields = {words[1] for words in lines if len(words) > 1 and words[1].isidentifier() and words[0] != "#"}
    (_, _, msg), *_ = read_bag(drive().write(tmp_path / "bag"), [TOPIC])
    assert {"header", "weights", *pack(values(0), "uint8")} == fields <= set(vars(msg))
    assert msg.header.frame_id == "lens"


def test_a_contract_of_latents_keeps_its_size() -> None:
    contract = robot(TOPIC, TYPE)
    assert contract.images[0].size == (8, 12)
    assert Contract.from_dict(contract.to_dict()) == contract
    assert contract.hash != robot().hash
