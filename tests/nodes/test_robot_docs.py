"""docs/robot.md says what the policy node really has."""

from pathlib import Path

import pytest

from d4_nodes.guard import RULES
from d4_nodes.report import STAGES
from d4_nodes.ros.policy_parameters import PARAMETERS

TEXT = (Path(__file__).parents[2] / "docs" / "robot.md").read_text()


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: p.name)
def test_every_parameter_stands_there_with_its_default(parameter):
    default = parameter.default
    if isinstance(default, bool):
        default = str(default).lower()
    shown = "" if default == "" else f"`{default}`"
    assert f"| `{parameter.name}` | {shown} | {parameter.about} |" in TEXT


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_guard_is_explained(rule):
    assert f"`{rule}`" in TEXT


@pytest.mark.parametrize("stage", STAGES)
def test_every_line_of_the_report_is_explained(stage):
    assert stage in TEXT.partition("## What the report means")[2]
