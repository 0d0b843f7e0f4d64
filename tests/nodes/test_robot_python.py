"""What runs in the robot's process runs on the oldest ROS 2 that is supported: Python 3.10, NumPy 1.21 and
OpenCV 4.5. And it uses nothing that NumPy 2 has removed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "datasets", ROOT / "d4_nodes"]
WALL = "what runs in the robot's own process knows no torch and no command line"

# module -> what came after the oldest version, or has been removed since
TOO_NEW = {
    "tomllib": {"*"},
    "typing": {
        "Self", "Never", "LiteralString", "assert_never", "assert_type", "reveal_type", "Required",
        "NotRequired", "Unpack", "TypeVarTuple", "dataclass_transform", "override", "TypeAliasType", "TypeIs",
    },
    "datetime": {"UTC"},
    "enum": {"StrEnum", "ReprEnum", "verify", "member", "nonmember"},
    "asyncio": {"TaskGroup", "timeout", "timeout_at", "Runner", "Barrier"},
    "contextlib": {"chdir"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod", "fma"},
    "operator": {"call"},
    "hashlib": {"file_digest"},
    "logging": {"getLevelNamesMapping"},
    "inspect": {"getmembers_static", "markcoroutinefunction"},
    "sys": {"exception", "monitoring", "activate_stack_trampoline"},
    "os": {"process_cpu_count", "unshare", "setns", "pidfd_spawn", "timerfd_create"},
    "warnings": {"deprecated"},
    "copy": {"replace"},
    "builtins": {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"},
    "numpy": {
        "exceptions", "dtypes", "strings", "astype", "isdtype", "concat", "permute_dims", "matrix_transpose",
        "unique_all", "unique_counts", "unique_inverse", "unique_values", "vecdot", "vecmat", "matvec",
        "trapezoid", "cumulative_sum", "cumulative_prod", "bitwise_count", "from_dlpack", "unstack", "bool",
        "long", "ulong", "acos", "asin", "atan", "atan2", "pow",
        "float_", "complex_", "NaN", "Inf", "infty", "product", "cumproduct", "sometrue", "alltrue", "in1d",
        "trapz", "row_stack", "cast", "find_common_type", "obj2sctype", "string_", "unicode_", "msort",
    },
    "cv2": {"IMREAD_COLOR_RGB", "IMREAD_COLOR_BGR"},
}  # fmt: skip
METHODS = {"add_note", "walk", "with_segments"}  # of exceptions and of paths
KEYWORDS = {("numpy", "quantile"): "method", ("numpy", "percentile"): "method"}


def find(module: str) -> Path | None:
    """The file of one of our modules."""
    for folder in FOLDERS:
        path = folder / module.replace(".", "/")
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.exists():
                return candidate
    return None


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported; the name of `import x` is empty."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module or "", alias.name) for alias in node.names)


def closure(modules: list[str]) -> dict[str, Path]:
    """These modules and those of ours that they import, and so on."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        path = find(module)
        if module in found or path is None:
            continue
        found[module] = path
        for name, attribute in imported(ast.parse(path.read_text())):
            waiting += [name, f"{name}.{attribute}"] if name.startswith("d4_") else []
    return found


def complaints(source: str) -> list[str]:
    """What in a module's text is too new, or gone."""
    try:
        tree = ast.parse(source, feature_version=(3, 10))
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    names = {"builtins": "builtins"}  # local name -> module
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0]: a.name.split(".")[0] for a in node.names}
    for module, name in imported(tree):
        new = TOO_NEW.get(module, set())
        if "*" in new or name in new:
            found.append(f"{module}.{name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id, "")
            found += [f"{module}.{node.attr}"] if node.attr in TOO_NEW.get(module, set()) else []
        if isinstance(node, ast.Name) and node.id in TOO_NEW["builtins"]:
            found.append(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            func = node.func
            found += [f".{func.attr}()"] if func.attr in METHODS and not _is_os(func) else []
            module = names.get(getattr(func.value, "id", ""), "")
            word = KEYWORDS.get((module, func.attr))
            found += [f"{func.attr}({word}=)"] if word in [k.arg for k in node.keywords] and word else []
    return found


def _is_os(func: ast.Attribute) -> bool:
    return isinstance(func.value, ast.Name) and func.value.id in ("os", "ast")


def robot_modules() -> dict[str, Path]:
    tomllib = pytest.importorskip("tomllib")  # the tests themselves may be newer
    walls = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [wall] = [wall for wall in walls if wall["name"] == WALL]
    return closure(wall["source_modules"])


def test_the_robots_process_needs_no_newer_python_or_numpy() -> None:
    modules = robot_modules()
    assert {"d4_nodes.guard", "d4_datasets.contract", "d4_datasets.fields"} <= set(modules)
    found = {name: complaints(path.read_text()) for name, path in modules.items()}
    assert not {name: said for name, said in found.items() if said}


def test_the_robots_process_needs_nothing_of_the_importer() -> None:
    ours = {name for name in robot_modules() if name.startswith("d4_datasets.")}
    names = (
        "align", "contract", "errors", "fields", "files", "latents", "messages", "section", "signals",
        "stills", "whole",
    )  # fmt: skip
    assert ours <= {f"d4_datasets.{name}" for name in names}


@pytest.mark.parametrize(
    "source",
    [
        "from typing import Self",
        "import typing\nx: typing.Never",
        "import tomllib",
        "from datetime import UTC",
        "import datetime as dt\ndt.UTC",
        "try:\n    pass\nexcept* ValueError:\n    pass",
        "raise ExceptionGroup('', [])",
        "import asyncio\nasyncio.TaskGroup()",
        "def f():\n    error.add_note('x')",
        "import numpy as np\nnp.trapezoid(x)",
        "import numpy as np\nnp.float_(3)",
        "import numpy as np\nnp.quantile(x, 0.5, method='lower')",
        "import cv2\ncv2.IMREAD_COLOR_RGB",
    ],
)
def test_the_scan_finds_what_it_is_for(source) -> None:
    assert complaints(source)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.walk('.'); os.eventfd(0)",
        "import numpy as np\nnp.bool_(1); np.quantile(x, 0.5)",
        "match x:\n    case 1: pass",
        "from dataclasses import dataclass\n@dataclass(kw_only=True)\nclass A: ...",
    ],
)
def test_the_scan_leaves_alone_what_is_old_enough(source) -> None:
    assert not complaints(source)
