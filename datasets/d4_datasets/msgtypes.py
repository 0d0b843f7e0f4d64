"""Message types: what turns the bytes of a topic into a message.

The definition that a recording holds of a type comes first. Where it holds none, as sqlite3 bags before ROS 2
Iron, the `.msg` files that the user names count, then the types that come with ROS. A type without any
disturbs nobody until its topic is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from d4_datasets.errors import UserError

_IDL_RULE = "=" * 80 + "\n"
_LONGEST = 1 << 18  # characters of a definition; the longest of ROS itself have a tenth
_MOST_FILES = 100_000
_MOST_ELEMENTS = 1 << 30  # of one array in a message
_NAME = re.compile(rb"<name>\s*([A-Za-z][\w.-]*)\s*</name>")


@dataclass(frozen=True)
class TopicInfo:
    """What a recording says about a topic: its type, and the definition, empty where it holds none.

    encoding: of definition and messages: "ros2msg" and "ros2idl", or "ros1msg" of ROS 1.
    """

    type: str
    encoding: str = ""
    definition: str = ""

    @property
    def is_ros1(self) -> bool:
        """Whether its messages are serialised as ROS 1 does."""
        return self.encoding == "ros1msg"


@dataclass(frozen=True, eq=False)
class Definitions:
    """`.msg` files by type ("my_msgs/msg/Thing"; only "Thing" where a file lies in no package).

    shown: where they come from, for messages to people.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    shown: str = ""

    def file(self, kind: str, standard: Typestore) -> Path | None:
        """The file that defines a type. One in no package counts for types that ROS itself does not have."""
        loose = None if kind in standard.fielddefs else self.files.get(kind.rpartition("/")[2])
        return self.files.get(kind, loose)

    @property
    def digest(self) -> str:
        """What tells these definitions from others."""
        known = [(kind, _read(path)) for kind, path in sorted(self.files.items())]
        return hashlib.sha256(repr(known).encode()).hexdigest()


# ---- what the user gives ----


@lru_cache(maxsize=8)
def read_definitions(paths: tuple[Path, ...]) -> Definitions:
    """All `.msg` files at and below `paths`: files, packages, workspaces.

    Raises:
        UserError: there is none, or they are too many.
    """
    found: dict[str, Path] = {}
    for path in paths:
        files = _msg_files(path)
        for file in files:
            found.setdefault(_type_of(file), file)
        if not files:
            raise UserError(
                f"there is no .msg file in --msg-path {path}; name the folder of a package that defines "
                "messages, or one above it"
            )
    return Definitions(found, ", ".join(map(str, paths)))


def _msg_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".msg" else []
    if not path.is_dir():
        raise UserError(f"--msg-path {path} does not exist; name a folder with .msg files")
    found: list[Path] = []
    seen = 0
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        seen += len(names)
        if seen > _MOST_FILES:
            raise UserError(
                f"--msg-path {path} holds more than {_MOST_FILES} files; name the folder of the package"
            )
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".msg")]
    return found


def _type_of(file: Path) -> str:
    """The type that a file defines: `my_msgs/msg/Thing.msg`; a package.xml knows better than its folder."""
    folder = file.absolute().parent
    package = folder.parent if folder.name == "msg" else folder
    try:
        with (package / "package.xml").open("rb") as about:
            match = _NAME.search(about.read(1 << 16))
    except OSError:
        match = None
    if match is not None:
        return f"{match[1].decode()}/msg/{file.stem}"
    return f"{package.name}/msg/{file.stem}" if folder.name == "msg" else file.stem


def _read(path: Path) -> str:
    try:
        text = path.read_bytes()[: _LONGEST + 1].decode(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read the message definition {path}: {error.strerror}") from None
    if len(text) > _LONGEST:
        raise UserError(f"{path} is no message definition: it is longer than {_LONGEST} characters")
    return text


# ---- what decodes ----


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """The message types of the newest ROS 2 release that rosbags knows."""
    return get_typestore(Stores.LATEST)


@lru_cache(maxsize=1)
def ros1_typestore() -> Typestore:
    """The message types of ROS 1."""
    return get_typestore(Stores.ROS1_NOETIC)


def decoder(topic: TopicInfo, given: Definitions | None = None) -> Callable[[bytes], Any]:
    """What turns the bytes of a message on `topic` into the message.

    Raises:
        UserError: its type is unknown, or the definition given of it cannot be used; the text goes on after
            "the type of <topic> ".
    """
    kind, store = topic.type, typestore_of(topic, given)
    read = store.deserialize_ros1 if topic.is_ros1 else store.deserialize_cdr
    return lambda data: read(data, kind)


def typestore_of(topic: TopicInfo, given: Definitions | None = None) -> Typestore:
    """A typestore that knows the type of `topic`; see `decoder`."""
    if (store := _own(topic)) is not None:
        return store
    standard = ros1_typestore() if topic.is_ros1 else typestore()
    if given is not None and (store := _given(topic.type, given, standard)) is not None:
        return store
    if topic.type in standard.types:
        return standard
    if given is not None:
        raise UserError(
            f"is unknown: neither the recording nor --msg-path {given.shown} has a usable definition of it"
        )
    raise UserError(
        "is unknown and the recording has no usable definition of it; give the folder with its .msg files: "
        "--msg-path FOLDER"
    )


@lru_cache(maxsize=256)
def _own(topic: TopicInfo) -> Typestore | None:
    """From the recording's own definition; None if it has none, or one that is of no use."""
    if not topic.definition or len(topic.definition) > _LONGEST:
        return None
    try:
        types: dict[str, Any] = {}
        text = topic.definition.replace("\r\n", "\n")
        if topic.encoding != "ros2idl":
            types.update(get_types_from_msg(text, topic.type))
        else:
            for part in text.split(_IDL_RULE):
                idl = part.split("\n", 1)[1] if part.startswith("IDL: ") else part
                types.update(get_types_from_idl(idl) if idl.strip() else {})
        return _registered(types, topic.type)
    except Exception:  # a definition that rosbags cannot parse, whatever is wrong with it, is as good as none
        return None


def _given(kind: str, given: Definitions, standard: Typestore) -> Typestore | None:
    """From the definition that the user gave of `kind`, and those of the types in it; None if there is none.

    Only what is needed is parsed, so that a whole workspace may be given.
    """
    types: dict[str, Any] = {}
    waiting = [kind]
    while waiting:
        name = waiting.pop()
        file = given.file(name, standard)
        if name in types or (file is None and name == kind):
            continue
        if file is not None:
            text = _read(file).replace("\r\n", "\n")
            try:
                parsed = dict(get_types_from_msg(text, name))
            except Exception:  # see _own
                raise UserError(f"cannot be used: {file} is no message definition; correct it") from None
        elif name in standard.fielddefs:
            parsed = {name: standard.fielddefs[name]}
        else:
            raise UserError(
                f"contains {name}, which is not in --msg-path {given.shown}; add the folder with its .msg "
                "files to it"
            )
        types |= parsed
        waiting += [part for new in parsed.values() for part in _parts(new)]
    if not types:
        return None
    try:
        return _registered(types, kind)
    except Exception as error:  # see _own
        raise UserError(f"cannot be used as it is defined in {given.shown}: {error}") from None


def _parts(definition: Any) -> list[str]:
    """The message types that a type consists of, in rosbags' description."""
    found = []
    for _, (node, detail) in definition[1]:
        if int(node) > 2:  # an array or a sequence: of what
            node, detail = detail[0]
        if int(node) == 2:
            found.append(detail)
    return found


def _registered(types: Mapping[str, Any], kind: str) -> Typestore:
    store = get_typestore(Stores.EMPTY)
    store.max_sequence_length = _MOST_ELEMENTS
    store.register(dict(types))
    store.get_msgdef(kind)
    return store
