"""Checkpoint folders: written aside, swapped in whole, safetensors only.

A folder holds config.json, weights.safetensors (what inference loads), train.safetensors (what resuming
needs), contract.yaml and card.md. Beside it, while it is replaced, stand `.tmp-<name>-<pid>` (the new one,
not yet complete) and `.old-<name>` (the previous one). A kill at any point leaves one of <name> and
`.old-<name>` complete; readers take the latter when the former is missing.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d4_datasets.errors import UserError

if TYPE_CHECKING:
    from d4_datasets.contract import Contract

FORMAT = 1
CONFIG, WEIGHTS, TRAIN = "config.json", "weights.safetensors", "train.safetensors"
_SPARE_BYTES = 4 << 20  # config, card, file-system overhead


def save(
    folder: Path,
    *,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    contract: Contract,
    metrics: Mapping[str, Any],
    train_state: Mapping[str, Tensor],
    averaged: Mapping[nn.Parameter, Tensor] | None = None,
) -> None:
    """Replace `folder` by a new checkpoint, atomically for readers and for kills.

    Args:
        folder: the checkpoint, usually <run>/<phase>.
        modules: saved as weights under "<key>.".
        config: entries of config.json; must be JSON (other values are written as strings).
        contract: the robot contract the weights belong to.
        metrics: numbers, kept in config.json and card.md.
        train_state: tensors that resuming needs.
        averaged: tensors saved in the weights in place of these parameters.

    Raises:
        UserError: the disk is full; the previous checkpoint is untouched then.
    """
    weights = _weights(modules, averaged or {})
    config = {
        "format": FORMAT, "contract_hash": contract.hash, **config, "metrics": dict(metrics),
        "origin": origin(),
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    tmp = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    with _disk_full(folder, tmp):
        _require_space(folder.parent, (weights, train_state))
        tmp.mkdir()
        save_file(_storable(weights), tmp / WEIGHTS)
        save_file(_storable(train_state), tmp / TRAIN)
        (tmp / CONFIG).write_text(json.dumps(config, indent=1, default=str) + "\n")
        (tmp / "contract.yaml").write_text(contract.to_yaml())
        (tmp / "card.md").write_text(_card(folder.name, config))
        for path in (*tmp.iterdir(), tmp):
            _fsync(path)
        _swap(tmp, folder)


def adopt(source: Path, folder: Path, contract: Contract) -> None:
    """Copy the checkpoint `source` to `folder`, weights to the last bit, for another contract of the robot:
    one that differs in how its frames are recorded and not in what they show, which the caller has seen to.

    Raises:
        UserError: there is no checkpoint, or the disk is full.
    """
    config = load_config(source) | {"contract_hash": contract.hash, "adopted_from": str(source.absolute())}
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    with _disk_full(folder, tmp):
        shutil.copytree(resolve(source), tmp)
        (tmp / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        (tmp / "contract.yaml").write_text(contract.to_yaml())
        for path in (*tmp.iterdir(), tmp):
            _fsync(path)
        _swap(tmp, folder)


def load_config(folder: Path) -> dict[str, Any]:
    """Content of config.json.

    Raises:
        UserError: there is no checkpoint, or it was written by another format version.
    """
    path = resolve(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not readable ({e}); delete the folder and train the phase again") from e
    if config.get("format") != FORMAT:
        raise UserError(f"{path} has format {config.get('format')}, this version reads {FORMAT}; train again")
    return config


def load_modules(
    folder: Path, modules: Mapping[str, nn.Module], contract: Contract | None = None
) -> dict[str, Any]:
    """Load weights into `modules` (a subset of the saved ones is fine) and return config.json's content.

    Raises:
        UserError: no checkpoint, another contract than `contract`, or weights of another shape.
    """
    config = load_config(folder)
    if contract is not None:
        require_contract(folder, config, contract)
    state = _load(resolve(folder) / WEIGHTS)
    for name, module in modules.items():
        prefix = name + "."
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            module.load_state_dict(part)
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:300]
            raise UserError(f"{folder / WEIGHTS} does not fit the model {name!r}: {reason}") from e
    return config


def load_train_state(folder: Path) -> dict[str, Tensor]:
    """What was saved as `train_state`, on the CPU."""
    return _load(resolve(folder) / TRAIN)


def require_contract(folder: Path, config: Mapping[str, Any], contract: Contract) -> None:
    """Raise UserError unless the checkpoint's contract hash is that of `contract`."""
    if config["contract_hash"] != contract.hash:
        raise UserError(
            f"{folder} was trained for contract {config['contract_hash']} "
            f"but this is contract {contract.hash}: "
            f"use the robot.yaml saved as {folder / 'contract.yaml'}, or another run folder"
        )


def exists(folder: Path) -> bool:
    """Whether a complete checkpoint can be loaded from `folder`."""
    return (folder / CONFIG).exists() or (_old(folder) / CONFIG).exists()


def resolve(folder: Path) -> Path:
    """`folder`, or the previous copy when a kill came between the two renames of a swap.

    Raises:
        UserError: neither exists.
    """
    for candidate in (folder, _old(folder)):
        if (candidate / CONFIG).exists():
            return candidate
    raise UserError(f"there is no checkpoint in {folder}; train the phase {folder.name!r} first (d4-train)")


def _old(folder: Path) -> Path:
    return folder.parent / f".old-{folder.name}"


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is not readable ({e}); delete the folder and train the phase again") from e


def _weights(modules: Mapping[str, nn.Module], averaged: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    return {
        f"{prefix}.{key}": averaged.get(value, value) if isinstance(value, nn.Parameter) else value
        for prefix, module in modules.items()
        for key, value in module.state_dict(keep_vars=True).items()
    }


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors without shared memory, as safetensors demands (tied ones are stored twice)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _require_space(parent: Path, groups: tuple[Mapping[str, Tensor], ...]) -> None:
    needed = sum(t.numel() * t.element_size() for group in groups for t in group.values()) + _SPARE_BYTES
    if shutil.disk_usage(parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _disk_full(folder: Path, tmp: Path) -> Iterator[None]:
    """Turn "no space left" into one sentence, and leave nothing half-written on any error."""
    try:
        yield
    except BaseException as e:
        shutil.rmtree(tmp, ignore_errors=True)
        # safetensors reports the system's error only in its text.
        if getattr(e, "errno", None) == errno.ENOSPC or "os error 28" in str(e):
            kept = "the previous checkpoint is intact" if exists(folder) else "nothing was written"
            raise UserError(
                f"disk full while saving {folder}; {kept}: free some space, then run the same command again"
            ) from e
        raise


def _clean(folder: Path) -> None:
    """Finish what a killed save left: take the old copy back if it is the only one, remove the rest."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    for stale in folder.parent.glob(f".tmp-{folder.name}-*"):
        pid = stale.name.rsplit("-", 1)[1]
        if int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists():
            shutil.rmtree(stale, ignore_errors=True)


def _swap(tmp: Path, folder: Path) -> None:
    old = _old(folder)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _card(name: str, config: Mapping[str, Any]) -> str:
    """card.md: where these weights come from, for a person."""
    facts = {
        "step": config.get("step"),
        "status": config.get("status"),
        "data": config.get("config", {}).get("data"),
        "contract": config["contract_hash"],
        **config["origin"],
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    metrics = config["metrics"].items()
    numbers = [f"| {key} | {value:.6g} |" for key, value in metrics if isinstance(value, int | float)]
    return "\n".join(
        [f"# {name}", "", "| | |", "|---|---|", *rows, "", "| metric | value |", "|---|---|", *numbers, ""]
    )


def origin() -> dict[str, str | None]:
    """Which code makes a checkpoint, or a measurement, where and when: `commit`, `machine`, `date`."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": _commit(), "machine": _machine(), "date": date}


@functools.cache
def _commit() -> str | None:
    """Commit of the source tree this runs from, with "-dirty" if changed; None for an installed package."""
    try:
        here = ["git", "-C", str(Path(__file__).parent)]
        command = [*here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _machine() -> str:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor} x{os.cpu_count()}{gpu}, torch {torch.__version__}"
