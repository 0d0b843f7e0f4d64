"""The hosted workflow is YAML, covers every supported ROS 2, and names only what is here."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / ".github" / "workflows" / "ros.yml").read_text()


def test_it_covers_the_supported_distributions() -> None:
    [job] = yaml.safe_load(TEXT)["jobs"].values()
    assert job["strategy"]["matrix"]["distro"] == ["humble", "jazzy", "lyrical"]
    assert job["container"] == "ros:${{ matrix.distro }}"
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])


def test_the_files_and_modules_it_names_exist() -> None:
    tests = re.findall(r"tests/\S+\.py", TEXT)
    left_out = {"test_soak_node.py"}  # it holds pauses to 10 ms, in which shared machines stand still
    there = {path.name for path in (ROOT / "tests" / "ros").glob("test_*.py")}
    assert {Path(name).name for name in tests} == there - left_out
    assert all(f"Left out: the soak ({name})" in TEXT for name in left_out)
    modules = re.search(r"for module in (.+); do", TEXT)
    assert modules is not None
    files = [f"d4_nodes/d4_nodes/{module.replace('.', '/')}.py" for module in modules[1].split()]
    for name in [*tests, *files, "ros2_ws/src", "datasets", "d4_core", "d4_nodes"]:
        assert (ROOT / name).exists(), name


def test_the_simulated_robot_runs_where_one_python_has_ros_and_mujoco() -> None:
    """Humble's Python is 3.10, and d4 itself needs 3.11; the others make d4's Python from that of ROS."""
    [job] = yaml.safe_load(TEXT)["jobs"].values()
    [step] = [step for step in job["steps"] if "test_launch_files.py" in step.get("run", "")]
    assert step["if"] == "matrix.distro != 'humble'"
    assert "python3 -m venv /opt/d4" in step["run"]
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()
