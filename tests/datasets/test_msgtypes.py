"""Message types that a bag does not define come from .msg files, and never disturb those that are known."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
import yaml
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from test_ingest import ROBOT, TICK, drive, robot

from d4_datasets import bags, ingest, msgtypes
from d4_datasets.bags import Bag, read_bag
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.msgtypes import read_definitions

THING, PART = "my_msgs/msg/Thing", "my_msgs/msg/Part"
TEXTS = {
    THING: "# CRLF\r\nstd_msgs/Header header\r\nPart[] parts\r\ngeometry_msgs/Vector3 v\r\n",
    PART: "uint8 KIND=3\nfloat64 x\nstring name",
}
T0 = 1_700_000_000_000_000_000
COUNT = 8


def store_of(texts=TEXTS):
    store = get_typestore(Stores.LATEST)
    types = {}
    for kind, text in texts.items():
        types.update(get_types_from_msg(text.replace("\r\n", "\n"), kind))
    store.register(types)
    return store


def write(path: Path, plugin=StoragePlugin.SQLITE3, bare=True) -> Path:
    """Things and flags; without their definitions if `bare`, as before ROS 2 Iron."""
    store = store_of()
    writer = Writer(path, version=9, storage_plugin=plugin)
    with writer:
        things = writer.add_connection("/thing", THING, typestore=store)
        flags = writer.add_connection("/flag", "std_msgs/msg/Bool", typestore=store)
        for k in range(COUNT):
            part = store.types[PART](x=k / 2, name=f"part {k}")
            thing = store.types[THING](
                header=bags.header(T0 + k), parts=[part], v=bags.new("geometry_msgs/msg/Vector3")
            )
            writer.write(things, T0 + k, store.serialize_cdr(thing, THING))
            writer.write(
                flags, T0 + k, store.serialize_cdr(bags.new("std_msgs/msg/Bool"), "std_msgs/msg/Bool")
            )
    if bare:
        with sqlite3.connect(next(path.glob("*.db3"))) as database:
            database.execute("DROP TABLE message_definitions")
    return path


def package(root: Path, texts=TEXTS, name="my_msgs") -> Path:
    for kind, text in texts.items():
        file = root / name / "msg" / f"{kind.rpartition('/')[2]}.msg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return root / name


def places(path, given):
    return [msg.parts[0].x for _, _, msg in bags.BagStream(Bag(path, read_definitions(given)), ["/thing"])]


EXPECTED = [k / 2 for k in range(COUNT)]


def test_a_type_without_definition_names_the_option_and_disturbs_no_other(tmp_path):
    path = write(tmp_path / "bag")
    with pytest.raises(
        UserError, match=r"the type my_msgs/msg/Thing of /thing is unknown .*: --msg-path FOLDER"
    ):
        read_bag(path, ["/thing"])
    assert len(list(read_bag(path))) == COUNT  # the flags


def test_a_package_a_workspace_a_folder_of_messages_and_the_files_themselves(tmp_path):
    path, folder = write(tmp_path / "bag"), package(tmp_path / "ws/src/deep")
    files = tuple(sorted((folder / "msg").iterdir()))
    for given in ((folder,), (tmp_path / "ws",), (folder / "msg",), files):
        assert places(path, given) == EXPECTED


def test_the_name_in_package_xml_counts_and_not_that_of_the_folder(tmp_path):
    folder = package(tmp_path, name="my_msgs-main")
    (folder / "package.xml").write_text("<?xml version='1.0'?>\n<package><name>my_msgs</name></package>")
    assert places(write(tmp_path / "bag"), (folder,)) == EXPECTED


def test_files_in_no_package_count_by_their_name(tmp_path):
    folder = tmp_path / "definitions"
    folder.mkdir()
    for kind, text in TEXTS.items():
        (folder / f"{kind.rpartition('/')[2]}.msg").write_text(text)
    (folder / "Vector3.msg").write_text("string other")  # not that of geometry_msgs
    assert places(write(tmp_path / "bag"), (folder,)) == EXPECTED


def test_a_definition_in_the_bag_comes_first(tmp_path):
    path = write(tmp_path / "bag", bare=False)
    wrong = package(tmp_path, {THING: "uint8 other\n"})
    assert places(path, (wrong,)) == EXPECTED
    assert places(write(tmp_path / "mcap", StoragePlugin.MCAP, bare=False), (wrong,)) == EXPECTED


def test_other_files_of_a_workspace_may_be_broken(tmp_path):
    folder = package(tmp_path, TEXTS | {"my_msgs/msg/Broken": "what is this?\n"})
    assert places(write(tmp_path / "bag"), (folder,)) == EXPECTED


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({PART: TEXTS[PART]}, r"of /thing is unknown: neither the recording nor --msg-path .* has a usable"),
        ({THING: TEXTS[THING]}, r"of /thing contains my_msgs/msg/Part, which is not in --msg-path"),
        (TEXTS | {PART: "float64\n!"}, r"of /thing cannot be used: .*Part\.msg is no message definition"),
        (TEXTS | {PART: "# " + "x" * (1 << 19)}, r"Part\.msg is no message definition: it is longer"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_definitions_is_said(tmp_path, texts, message):
    folder = package(tmp_path, texts)
    with pytest.raises(UserError, match=message):
        places(write(tmp_path / "bag"), (folder,))


def test_a_definition_that_does_not_fit_the_messages_is_said(tmp_path):
    folder = package(tmp_path, TEXTS | {PART: "float64 x\nstring name\nfloat64[100] more\n"})
    with pytest.raises(UserError, match="a message of /thing is not a valid my_msgs/msg/Thing"):
        places(write(tmp_path / "bag"), (folder,))


def test_folders_without_messages_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--msg-path .*nowhere does not exist"):
        read_definitions((tmp_path / "nowhere",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no \.msg file in --msg-path .*empty"):
        read_definitions((tmp_path / "empty",))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"there is no \.msg file in --msg-path .*notes\.txt"):
        read_definitions((tmp_path / "notes.txt",))
    monkeypatch.setattr(msgtypes, "_MOST_FILES", 3)
    with pytest.raises(UserError, match="holds more than 3 files"):
        read_definitions((package(tmp_path / "large", {f"m/msg/T{k}": "" for k in range(5)}),))


def test_a_field_cannot_run_code(tmp_path):
    """rosbags makes Python of definitions; names and sizes in it must be names and numbers."""
    marker = tmp_path / "ran"
    evil = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    for text in (f"uint8 X={evil}\nuint8 x\n", f'string X={evil}\nstring x "{evil}"\n', f"uint8[{evil}] x\n"):
        folder = package(tmp_path, {THING: text})
        read_definitions.cache_clear()
        with pytest.raises(UserError):
            places(write(tmp_path / "bag"), (folder,))
        shutil.rmtree(tmp_path / "bag")
    for idl in (
        f'module m {{ module msg {{ const string N = "{evil}"; struct T {{ uint8 x[N]; }}; }}; }};',
        f"module m {{ module msg {{ typedef uint8 A[{evil}]; struct T {{ A x; }}; }}; }};",
    ):
        assert msgtypes._own(msgtypes.TopicInfo("m/msg/T", "ros2idl", idl)) is None
    assert not marker.exists()


# ---- through ingest


def with_gripper() -> Contract:
    raw = yaml.safe_load(ROBOT)
    raw["actions"][1] |= {"topic": "/gripper", "type": "hand_msgs/msg/Grip", "select": ["closed"]}
    return Contract.from_dict(raw)


def grips(tmp_path: Path) -> Path:
    """A drive whose gripper has a type of its own, in sqlite3 without definitions."""
    text = "std_msgs/Header header\nbool closed\n"
    store = store_of({"hand_msgs/msg/Grip": text})
    items = [
        (t, kind, stamp, store.serialize_cdr(msg, kind))
        for t, kind, stamp, msg in drive(1).items
        if t != "/grip"
    ]
    for k in range(6):
        msg = store.types["hand_msgs/msg/Grip"](header=bags.header(0), closed=bool(k % 2))
        items.append(
            ("/gripper", "hand_msgs/msg/Grip", T0 + k * TICK, store.serialize_cdr(msg, "hand_msgs/msg/Grip"))
        )
    path = tmp_path / "bags/bag0"
    path.parent.mkdir()
    writer, connections = Writer(path, version=9, storage_plugin=StoragePlugin.SQLITE3), {}
    with writer:
        for topic, kind, stamp, data in sorted(items, key=lambda item: item[2]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(connections[topic], stamp, data)
    with sqlite3.connect(path / "bag0.db3") as database:
        database.execute("DROP TABLE message_definitions")
    package(tmp_path / "types", {"hand_msgs/msg/Grip": text}, "hand_msgs")
    return path


@pytest.mark.parametrize("jobs", [1, 2])
def test_ingest_with_a_type_of_the_users_own(tmp_path, jobs):
    path = grips(tmp_path)
    if jobs == 2:
        shutil.copytree(path, path.with_name("bag1"))
    with pytest.raises(UserError, match=r"the type hand_msgs/msg/Grip of /gripper is unknown .*--msg-path"):
        ingest.ingest([tmp_path / "bags"], with_gripper(), tmp_path / "data", jobs=jobs)
    summary = ingest.ingest(
        [tmp_path / "bags"], with_gripper(), tmp_path / "data", jobs=jobs, msg_path=[tmp_path / "types"]
    )
    assert (summary.frames, summary.labelled) == (6 * jobs, 6 * jobs)
    dataset = ingest.Dataset(tmp_path / "data")
    assert dataset.columns(0)["action"][:, 2].tolist() == [0, 1, 0, 1, 0, 1]


def test_a_type_that_the_contract_does_not_use_needs_no_definition(tmp_path):
    path = grips(tmp_path)
    raw = yaml.safe_load(ROBOT)
    del raw["actions"][1]
    assert ingest.ingest([path], Contract.from_dict(raw), tmp_path / "data").frames == 6


def test_another_definition_is_another_part(tmp_path):
    """A part left by an interrupted run with other definitions must not be taken up."""
    entry, contract = {"name": "x"}, robot()
    one = read_definitions((package(tmp_path / "a"),)).digest
    other = read_definitions((package(tmp_path / "b", TEXTS | {PART: "float32 x\n"}),)).digest
    keys = {ingest._key(entry, contract, (), digest) for digest in (one, other, "")}
    assert len(keys) == 3


def test_the_option_of_the_command(tmp_path, capsys):
    path = grips(tmp_path)
    with_gripper_file = tmp_path / "robot.yaml"
    with_gripper_file.write_text(with_gripper().to_yaml())
    arguments = [
        "d4-ingest",
        str(path),
        "--contract",
        str(with_gripper_file),
        "--out",
        str(tmp_path / "data"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit):
            ingest.main()
        assert "--msg-path FOLDER" in capsys.readouterr().err
        patch.setattr("sys.argv", [*arguments, "--msg-path", str(tmp_path / "types")])
        ingest.main()
    assert "1 episodes, 6 frames" in capsys.readouterr().out
