"""Launch arguments that decide whether a robot moves."""

import pytest

from d4_nodes.launching import switch


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", " on "])
def test_on_in_any_spelling(text):
    """shadow:=True drove the robot, because only `true` counted."""
    assert switch("shadow", text)


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "OFF"])
def test_off_in_any_spelling(text):
    assert not switch("shadow", text)


@pytest.mark.parametrize("text", ["", "ture", "2", "none"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="neither true nor false"):
        switch("shadow", text)
