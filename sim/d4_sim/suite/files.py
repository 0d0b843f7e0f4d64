"""Models that other packages bring: their MJCF files are read, their code is not run.

dm_control and gymnasium-robotics stop working within a few releases of MuJoCo, their models do not. So the
packages are wanted as folders of files only, whatever MuJoCo is installed; what is a task and what it rewards
is this project's own code, measured against theirs where theirs runs (docs/mujoco.md).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from d4_datasets.errors import UserError


@dataclass(frozen=True)
class Package:
    """A package with models: the folder inside it, and the versions whose models are known to be the same."""

    name: str
    module: str
    folder: str
    tested: str


DM_CONTROL = Package("dm_control", "dm_control", "suite", "1.0.41")
FETCH = Package("gymnasium-robotics", "gymnasium_robotics", "envs/assets/fetch", "1.4.2")


def model_file(package: Package, name: str) -> Path:
    """The MJCF file of that name.

    Raises:
        UserError: the package or the file is not there.
    """
    get = f"pip install --no-deps {package.name}=={package.tested} (its files are enough)"
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the model {name} comes with {package.name}, which is not installed: {get}.")
    path = Path(next(iter(spec.submodule_search_locations))) / package.folder / name
    if not path.exists():
        have = importlib.metadata.version(package.name)
        raise UserError(f"{package.name} {have} has no file {package.folder}/{name}: {get}.")
    return path
