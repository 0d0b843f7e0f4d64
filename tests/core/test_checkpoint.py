"""Checkpoints: exact round trip, survival of kills and full disks, one-sentence errors."""

import collections
import errno
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from d4_core import checkpoint
from d4_datasets.errors import UserError


class Robot:
    """Stands in for a contract: checkpoints need its hash and its text only."""

    def __init__(self, name: str = "yard") -> None:
        self.hash = f"hash-of-{name}"
        self.name = name

    def to_yaml(self) -> str:
        return f"name: {self.name}\n"


def net(value: float) -> nn.Linear:
    module = nn.Linear(4, 3)
    for p in module.parameters():
        nn.init.constant_(p, value)
    return module


def save(folder: Path, value: float = 1.0, **options: object) -> None:
    settings = {
        "modules": {"net": net(value)},
        "config": {"step": int(value), "status": "training", "config": {"data": "bags/yard"}},
        "contract": Robot(),
        "metrics": {"loss": 0.25},
        "train_state": {"raw/weight": torch.full((4,), value)},
    }
    checkpoint.save(folder, **(settings | options))


def value_in(folder: Path) -> float:
    """The number a checkpoint was made of, after checking that all its parts agree."""
    module = net(-1.0)
    step = checkpoint.load_modules(folder, {"net": module})["step"]
    values = {p.item() for p in module.weight.flatten()} | set(
        checkpoint.load_train_state(folder)["raw/weight"].tolist()
    )
    assert values == {float(step)}
    return values.pop()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "net", 1.0)
    save(tmp_path / "net", 2.0)
    assert value_in(tmp_path / "net") == 2.0
    assert names(tmp_path) == ["net"]
    assert names(tmp_path / "net") == [
        "card.md", "config.json", "contract.yaml", "train.safetensors", "weights.safetensors"
    ]  # fmt: skip
    assert (tmp_path / "net" / "contract.yaml").read_text() == "name: yard\n"
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["metrics"] == {"loss": 0.25}
    assert config["contract_hash"] == "hash-of-yard"


def test_card_names_the_origin(tmp_path: Path) -> None:
    save(tmp_path / "net")
    card = (tmp_path / "net" / "card.md").read_text()
    for part in ("# net", "bags/yard", "hash-of-yard", "| loss | 0.25 |", "torch", "| date | 20"):
        assert part in card


def test_averaged_weights_replace_the_raw_ones(tmp_path: Path) -> None:
    module = net(1.0)
    averaged = {module.weight: torch.full((3, 4), 5.0)}
    save(tmp_path / "net", modules={"net": module}, averaged=averaged)
    loaded = net(0.0)
    checkpoint.load_modules(tmp_path / "net", {"net": loaded})
    assert loaded.weight.unique().item() == 5.0
    assert loaded.bias.unique().item() == 1.0


def test_tied_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    tied = nn.ModuleList([net(1.0), net(1.0)])
    tied[1].weight = tied[0].weight
    state = {"raw/weight": torch.arange(6.0).reshape(2, 3).T}
    save(tmp_path / "net", modules={"net": tied}, train_state=state)
    checkpoint.load_modules(tmp_path / "net", {"net": tied})
    assert torch.equal(checkpoint.load_train_state(tmp_path / "net")["raw/weight"], state["raw/weight"])


def test_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    assert not checkpoint.exists(tmp_path / "dynamics")
    with pytest.raises(UserError, match=r"no checkpoint in .*; train the phase 'dynamics' first"):
        checkpoint.load_modules(tmp_path / "dynamics", {})


def test_other_contract_is_refused_with_both_hashes(tmp_path: Path) -> None:
    save(tmp_path / "net")
    with pytest.raises(UserError, match=r"hash-of-yard but this is contract hash-of-arm.*robot.yaml"):
        checkpoint.load_modules(tmp_path / "net", {"net": net(0.0)}, Robot("arm"))


def test_other_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "net")
    with pytest.raises(UserError, match=r"does not fit the model 'net'.*size mismatch"):
        checkpoint.load_modules(tmp_path / "net", {"net": nn.Linear(5, 3)})


def test_other_format_and_damage_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "net")
    (tmp_path / "net" / "train.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"train\.safetensors is not readable"):
        checkpoint.load_train_state(tmp_path / "net")
    (tmp_path / "net" / "config.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        checkpoint.load_config(tmp_path / "net")


def test_kill_between_the_renames_is_recovered(tmp_path: Path) -> None:
    save(tmp_path / "net", 1.0)
    (tmp_path / "net").rename(tmp_path / ".old-net")
    (tmp_path / ".tmp-net-999999999").mkdir()
    assert checkpoint.exists(tmp_path / "net")
    assert value_in(tmp_path / "net") == 1.0
    save(tmp_path / "net", 2.0)
    assert value_in(tmp_path / "net") == 2.0
    assert names(tmp_path) == ["net"]


def test_disk_full_up_front_keeps_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "net", 1.0)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(
        UserError, match=r"disk full while saving .*; the previous checkpoint is intact: free"
    ):
        save(tmp_path / "net", 2.0)
    assert value_in(tmp_path / "net") == 1.0
    assert names(tmp_path) == ["net"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        checkpoint.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_full_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    save(tmp_path / "net", 1.0)
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(UserError, match="disk full"):
        save(tmp_path / "net", 2.0)
    assert value_in(tmp_path / "net") == 1.0
    assert names(tmp_path) == ["net"]


def test_no_pickle_is_loaded() -> None:
    source = Path(checkpoint.__file__).read_text()
    assert "torch.load" not in source
    assert "import pickle" not in source


def killed_at(event: int, folder: Path, value: float) -> bool:
    """Save in a child that kills itself at its n-th file-system call; False if the save ended before."""
    pid = os.fork()
    if pid == 0:
        calls = itertools.count()
        watched = ("open", "os.", "shutil.")

        def hook(name: str, args: tuple) -> None:
            if name.startswith(watched) and next(calls) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save(folder, value)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("after_a_kill", [False, True])
def test_kill_9_at_every_call_of_a_save(tmp_path: Path, after_a_kill: bool) -> None:
    outcomes = []
    for event in itertools.count():
        folder = tmp_path / str(event) / "net"
        save(folder, 1.0)
        if after_a_kill:  # between the two renames of an earlier save
            folder.rename(folder.parent / ".old-net")
        if not killed_at(event, folder, 2.0):
            break
        outcomes.append(value_in(folder))
        save(folder, 3.0)
        assert value_in(folder) == 3.0
        assert names(folder.parent) == ["net"]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1.0, 2.0}
    assert len(outcomes) > 15


def save_for_ever(folder: Path, value: float) -> tuple[int, int]:
    """A child that saves rising values until it is killed: its process id and a pipe with a byte per save."""
    done, report = os.pipe()
    pid = os.fork()
    if pid:
        os.close(report)
        return pid, done
    try:
        while True:
            value += 1
            save(folder, value)
            os.write(report, b".")
    finally:
        os._exit(1)


def test_kill_9_at_random_times_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    folder, value, rng = tmp_path / "net", 0.0, random.Random(0)
    save(folder, value)
    for _ in range(8):
        pid, done = save_for_ever(folder, value)
        assert select.select([done], [], [], 60.0)[0], "the child saves nothing"
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        reported = len(os.read(done, 65536))
        os.close(done)
        found = value_in(folder)
        assert found in (value + reported, value + reported + 1)  # the last save may not have been reported
        value = found
    save(folder, value + 1)
    assert names(tmp_path) == ["net"]
