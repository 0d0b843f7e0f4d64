"""Small recordings of Minecraft players in the formats of VPT/BASALT and MineRL, made of known frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np

from d4_datasets.contract import Contract

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def in_degrees(spec: dict[str, Any]) -> dict[str, Any]:
    """The content of minecraft.yaml with the other kind of camera: two continuous channels."""
    classes = next(action for action in spec["actions"] if action["name"] == "camera")
    camera = {key: classes[key] for key in ("name", "topic", "type", "align")} | {
        "select": ["pitch", "yaw"], "units": ["deg", "deg"], "low": [-10, -10], "high": [10, 10],
        "safety": "zeros",
    }  # fmt: skip
    return spec | {"actions": [camera if action is classes else action for action in spec["actions"]]}


def contract(name: str = "minecraft", size: tuple[int, int] = (18, 32), **changes: Any) -> Contract:
    """An example contract with small pictures, without cuts and with the camera of minecraft.yaml in degrees;
    `changes` replace whole sections.
    """
    spec = Contract.load(EXAMPLES / f"{name}.yaml").to_dict()
    if name == "minecraft":
        spec = in_degrees(spec)
    spec["observations"][0]["size"] = list(size)
    spec["episode"] = None
    return Contract.from_dict(spec | changes)


def grey(number: int) -> int:
    """The level of frame `number`, far enough from its neighbours' to survive lossy video."""
    return 20 + 23 * number % 220


def write_video(path: Path, frames: int, size: tuple[int, int] = (36, 64), first: int = 0) -> None:
    """A video whose frames are plain grey, each of another level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "10", "preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for number in range(first, first + frames):
            picture = np.full((*size, 3), grey(number), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def line(keys: str = "", dx: float = 0, dy: float = 0, **changes: Any) -> dict[str, Any]:
    """A line of a contractor recording; `keys` are names after key.keyboard., `mouse_*` go into the mouse."""
    mouse = {"x": 640.0, "y": 360.0, "dx": dx, "dy": dy, "dwheel": 0.0, "buttons": [], "newButtons": []}
    mouse |= {name[6:]: changes.pop(name) for name in list(changes) if name.startswith("mouse_")}
    keyboard = {"keys": [f"key.keyboard.{key}" for key in keys.split()], "newKeys": [], "chars": ""}
    out = {"mouse": mouse, "keyboard": keyboard, "isGuiOpen": False, "isGuiInventory": False, "hotbar": 0}
    return out | {"inventory": [], "stats": {}} | changes


def write_lines(path: Path, lines: list[Any]) -> None:
    """Objects as JSON, text as it is, a line each."""
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    path.write_text("".join(f"{text}\n" for text in texts))


def write_recording(
    folder: Path, lines: list[Any], frames: int | None = None, name: str = "setter-74ae-20220315-122354",
    version: str = "8.0", size: tuple[int, int] = (36, 64),
) -> Path:  # fmt: skip
    """A pair of video and lines in the folder of its recorder's version; returns the file of lines."""
    path = folder / version / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, lines)
    write_video(path.with_suffix(".mp4"), len(lines) if frames is None else frames, size)
    return path


def write_stream(
    folder: Path, steps: int, before: int = 0, frames: int | None = None, meta: dict[str, Any] | None = None,
    **arrays: Any,
) -> Path:  # fmt: skip
    """A MineRL stream: `steps` actions, `before` frames that were recorded while the game loaded."""
    folder.mkdir(parents=True)
    total = before + steps + 1
    write_video(folder / "recording.mp4", total if frames is None else frames, (64, 64))
    keys = ("attack", "forward", "back", "left", "right", "jump", "sneak", "sprint")
    content = {f"action${key}": np.zeros(steps, np.int64) for key in keys}
    content |= {"action$camera": np.zeros((steps, 2), np.float32), "reward": np.zeros(steps, np.float32)}
    content |= {name.replace("__", "$"): values for name, values in arrays.items()}
    content = {name: values for name, values in content.items() if values is not None}
    np.savez(folder / "rendered.npz", **content)
    meta = {"true_video_frame_count": total, "duration_steps": steps} if meta is None else meta
    (folder / "metadata.json").write_text(json.dumps(meta))
    return folder
