"""What the launch files share. No ROS."""

from __future__ import annotations

_SWITCH = {
    "true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False,
}  # fmt: skip


def switch(name: str, text: str) -> bool:
    """A launch argument that is on or off, in any usual spelling.

    Raises:
        ValueError: it is neither; what decides whether a robot moves must not be guessed.
    """
    try:
        return _SWITCH[text.strip().lower()]
    except KeyError:
        raise ValueError(f"{name}:={text} is neither true nor false") from None
