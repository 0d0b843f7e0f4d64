"""docs/guard-node.md says what the guard node really has."""

from pathlib import Path

import pytest

from d4_nodes.ros.guard_parameters import PARAMETERS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guard-node.md").read_text()


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: p.name)
def test_every_parameter_stands_there_with_its_default(parameter) -> None:
    default = str(parameter.default).lower() if isinstance(parameter.default, bool) else parameter.default
    shown = "" if default == "" else f"`{default}`"
    assert f"| `{parameter.name}` | {shown} | {parameter.about} |" in TEXT


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "security").glob("*.xml")), ids=lambda p: p.name)
def test_every_example_policy_is_explained(path) -> None:
    assert f"| `{path.name}` |" in TEXT
