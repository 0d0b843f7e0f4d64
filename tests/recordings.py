"""Real recordings that tests read where they are: none comes with the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

RECORDINGS = Path(os.environ.get("D4_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


def needs(name: str = "") -> pytest.MarkDecorator:
    """Skip a test where there is no recording, or folder of them, of this name."""
    path = RECORDINGS / name
    return pytest.mark.skipif(
        not path.exists(), reason=f"no {path}; name a folder of recordings in D4_TEST_DATA"
    )
