"""``d4-rollout``: pictures and clips of what a run's networks see, predict and do, from held-out episodes.

Clips are taken by seed and never chosen by eye, and every caption says where they come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor

from d4_core import checkpoint, threads
from d4_core.data import encode_episodes
from d4_core.imagination import Dream, Rollout, imagine
from d4_core.models import CONTENTS, Models, load
from d4_core.open_loop import CONTEXT, continued, transitions_of
from d4_core.pipeline import pick_device
from d4_core.report import write_report
from d4_core.tokenizer import Tokenizer
from d4_datasets import whole
from d4_datasets.errors import UserError, run_cli
from d4_datasets.pictures import GREEN, GREY, ORANGE, Color, Strip, contact_sheet, fit, mp4_bytes, png_bytes
from d4_datasets.windows import Windows

_FPS = 5.0  # of clips: slow enough to compare two panels
_HOLD = 5  # the last frame of a clip stands still this many frames
_PANEL = 256  # height of a panel of a clip, about, in pixels
_TILE = 96  # height of a picture in a sheet, about
_GAP = 6
_STRIPS = 3  # clips shown in a sheet; the others are in the video
_LEGEND = (("real frames the model has seen", GREEN), ("the model's own", ORANGE))
_ENDED = ("after the end it predicts", GREY)


@dataclass(kw_only=True)
class RolloutArgs:
    """Show what a run's models see, predict and do on held-out episodes, as pictures and clips in RUN/media.

    tokenizer: reconstruction.png. dynamics: open_loop.png and .mp4, the future dreamed from a few real
    frames and the logged actions. agent, imagination: dream_<task>.png and .mp4, the policy acting in the
    world model. RUN/report.html is brought up to date.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, as d4-train wrote it."""
    dataset: Path
    """Dataset that the run was trained on; its held-out episodes are shown."""
    phase: Literal["auto", "tokenizer", "dynamics", "agent", "imagination"] = "auto"
    """Show only this phase's checkpoint; auto shows everything that the run has reached."""
    clips: int = 6
    """Number of clips."""
    horizon: int = 16
    """Frames to predict open loop; the policy acts three times as long."""
    seed: int = 0
    """Decides clips, noise and action samples."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class Footage:
    """Clips of a dataset: `frames` (B, T) global indices, where they begin, whether they were held out."""

    frames: np.ndarray
    episodes: np.ndarray
    places: list[str]
    held_out: bool

    def __str__(self) -> str:
        ids = list(dict.fromkeys(self.episodes.tolist()))
        kind = "held-out" if self.held_out else "TRAINING (the dataset is too small to hold any out)"
        return f"{kind} episode{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}"


def main() -> None:
    """Entry point of ``d4-rollout``."""
    run_cli(lambda: _main(tyro.cli(RolloutArgs, prog="d4-rollout")))


def _main(args: RolloutArgs) -> None:
    threads.configure()
    for name, caption in rollout(args).items():
        print(f"{args.run / 'media' / name}\n    {caption}")
    print(f"report: {write_report(args.run)}")


def rollout(args: RolloutArgs) -> dict[str, str]:
    """Write pictures and clips of a run to <run>/media; returns {file name: caption}.

    Raises:
        UserError: there is no checkpoint to show, it has another contract, or all episodes are too short.
    """
    if args.clips < 1 or args.horizon < 1:
        raise UserError(f"--clips {args.clips} --horizon {args.horizon}: both must be at least 1")
    folders = _folders(args)
    logs, device = Windows(args.dataset), pick_device(args.device)
    if logs.origin is not None:
        raise UserError(
            f"{args.dataset} holds latents and no pictures to show beside what the networks see: give a "
            "dataset with pictures"
        )
    media = args.run / "media"
    captions: dict[str, str] = {}
    for folder in folders:
        models = load(folder, logs.contract, device)
        files, told = _SHOW[folder.name](models, logs, args)
        media.mkdir(exist_ok=True)
        step = checkpoint.load_config(folder).get("step")
        for name, data in files.items():
            whole.write(media / name, data)
            captions[name] = (
                f"{told} Checkpoint: {folder.name}, step {step}; seed {args.seed}, clips not selected."
            )
    known = media / "captions.json"
    merged = whole.read_json(known, dict) | captions
    whole.write(known, json.dumps(merged, indent=1))
    return captions


def _folders(args: RolloutArgs) -> list[Path]:
    """Checkpoints to show, in the order of the phases."""
    if args.phase != "auto":
        checkpoint.resolve(args.run / args.phase)  # a sentence if it is missing
        return [args.run / args.phase]
    found = [args.run / phase for phase in CONTENTS if checkpoint.exists(args.run / phase)]
    if not found:
        raise UserError(f"there is no checkpoint in {args.run}; train one first (d4-train)")
    # both would draw the same files; the later policy counts
    return [f for f in found if f.name != "agent" or args.run / "imagination" not in found]


# -- footage -------------------------------------------------------------------------------------------------


def pick_clips(
    logs: Windows, count: int, length: int, seed: int, labelled: bool = False, start: bool = False
) -> Footage:
    """Take `count` clips of `length` frames by seed, from as many held-out episodes as there are.

    Args:
        logs: the dataset.
        count, length: clips, and frames in each.
        seed: decides which.
        labelled: prefer episodes with known actions.
        start: prefer the first frames of the episodes.

    Raises:
        UserError: no episode is that long.
    """
    train, held_out = logs.split()  # with its defaults, as training does
    pool = held_out if len(held_out) else train
    usable = pool[logs.episode_length[pool] >= length]
    if labelled and logs.labelled[usable].any():
        usable = usable[logs.labelled[usable]]
    if not len(usable):
        longest = int(logs.episode_length[pool].max())
        raise UserError(
            f"no held-out episode has {length} frames, the longest has {longest}: lower --horizon"
        )
    rng = np.random.default_rng(seed)
    episodes = np.resize(rng.permutation(usable), count)
    begin = np.empty(count, np.int64)
    for e in np.unique(episodes):
        rows = np.flatnonzero(episodes == e)
        room = logs.episode_length[e] - length
        # several clips of one episode are spread over it
        place = (np.arange(len(rows)) + (0.0 if start else rng.random(len(rows)))) / len(rows)
        begin[rows] = logs.episode_start[e] + np.floor(place * (room + 1))
    seconds = (begin - logs.episode_start[episodes]) / logs.contract.rate_hz
    places = [f"ep. {e}, {s:.1f} s" for e, s in zip(episodes, seconds, strict=True)]
    return Footage(begin[:, None] + np.arange(length), episodes, places, bool(len(held_out)))


def encode_clips(tokenizer: Tokenizer, logs: Windows, footage: Footage) -> Tensor:
    """Packed tokens (B, T, N, L) of clips, encoded with all that came before them in their episodes."""
    ids, which = np.unique(footage.episodes, return_inverse=True)
    whole = [tokenizer.pack(z) for z in encode_episodes(tokenizer, logs, ids)]
    rows = footage.frames - logs.episode_start[footage.episodes][:, None]
    return torch.stack([whole[n][torch.from_numpy(row)] for n, row in zip(which, rows, strict=True)])


@torch.no_grad()
def decode_clips(tokenizer: Tokenizer, tokens: Tensor, camera: str) -> np.ndarray:
    """Pictures uint8 (B, T, H, W, 3) of packed tokens (B, T, N, L), decoded frame by frame."""
    cache = tokenizer.new_cache(len(tokens))
    frames = []
    for t in range(tokens.shape[1]):
        patches = tokenizer.decode_step(tokenizer.unpack(tokens[:, t]), cache)[camera]
        frames.append(tokenizer.to_pixels(camera, patches).clamp(0, 1))
    return (torch.stack(frames, 1) * 255).round().byte().cpu().numpy()


def _steps(models: Models) -> int:
    return models.preset.imagination_training.settings.steps


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(1e-10, np.square((a.astype(np.float32) - b) / 255).mean())))


# -- tokenizer -----------------------------------------------------------------------------------------------


def show_reconstruction(models: Models, logs: Windows, args: RolloutArgs) -> tuple[dict[str, bytes], str]:
    """reconstruction.png: pairs of rows, real frames above what the tokenizer makes of them."""
    tokenizer = models.tokenizer
    columns, rows = 8, max(1, -(-args.clips // 3))
    footage = pick_clips(logs, columns * rows, 1, args.seed)
    tokens = encode_clips(tokenizer, logs, replace(footage, frames=_with_past(logs, footage, tokenizer)))
    strips, psnr = [], []
    for camera in (c.name for c in tokenizer.cfg.cameras):
        made = decode_clips(tokenizer, tokens, camera)[:, -1]
        real = np.asarray(logs.images[camera][footage.frames[:, 0]])
        psnr.append(f"{camera} {_psnr(made, real):.1f} dB")
        for row in range(rows):
            part = slice(row * columns, (row + 1) * columns)
            notes = footage.places[part]
            strips += [Strip(real[part], "real"), Strip(made[part], "reconstructed", notes)]
    numbers = tokenizer.cfg.num_latents * tokenizer.cfg.latent_dim
    told = (
        f"What {numbers} numbers per frame keep: real frames and what the tokenizer makes of them, "
        f"{footage}. PSNR on these {len(footage.frames)} frames: {', '.join(psnr)}."
    )
    return {"reconstruction.png": png_bytes(contact_sheet(strips, tile=_TILE))}, told


def _with_past(logs: Windows, footage: Footage, tokenizer: Tokenizer) -> np.ndarray:
    """Frame indices (B, context) that end with the footage's frame: the history that the decoder may use."""
    past = np.arange(1 - tokenizer.cfg.transformer.context, 1)
    return np.maximum(footage.frames + past, logs.episode_start[footage.episodes][:, None])


# -- dynamics ------------------------------------------------------------------------------------------------


def show_open_loop(models: Models, logs: Windows, args: RolloutArgs) -> tuple[dict[str, bytes], str]:
    """open_loop.png and .mp4: the future from a few real frames and the logged actions, or mirrored ones."""
    footage = pick_clips(logs, args.clips, CONTEXT + args.horizon, args.seed, labelled=True)
    tokens = encode_clips(models.tokenizer, logs, footage)
    camera, steps = models.tokenizer.cfg.cameras[0].name, _steps(models)
    known = bool(logs.labelled[footage.episodes].all())
    assert models.dynamics is not None
    go_on = partial(continued, models.dynamics, logs, footage.frames, tokens, seed=args.seed, steps=steps)
    context, future = tokens.split([CONTEXT, args.horizon], 1)
    versions = {"real": future, "dreamed": go_on(), "copied": context[:, -1:].expand_as(future)}
    if known:
        versions["mirrored"] = go_on(mirror=True)
    made = {
        name: decode_clips(models.tokenizer, torch.cat([context, after], 1), camera)
        for name, after in versions.items()
    }
    real = np.asarray(logs.images[camera][footage.frames])
    last = {name: _psnr(made[name][:, -1], made["real"][:, -1]) for name in ("dreamed", "copied")}
    logged, mirrored = (
        {"dreamed": made["dreamed"]},
        {"dreamed,\nactions mirrored": made["mirrored"]} if known else {},
    )
    sheet = _sheet(
        {"real": real} | logged | mirrored | {"last frame\ncopied": made["copied"]}, footage, args.horizon
    )
    colors = [GREEN] * CONTEXT + [ORANGE] * args.horizon
    cells = [
        [Panel(f"real, {place}", real[i], [GREEN] * len(colors))]
        + [Panel(name.replace("\n", " "), images[i], colors) for name, images in (logged | mirrored).items()]
        for i, place in enumerate(footage.places)
    ]
    actions = (
        "and from the same actions mirrored within their limits" if known else "whose actions are unknown"
    )
    told = (
        f"Open loop from {CONTEXT} real frames: the world model dreams {args.horizon} frames from the logged "
        f"actions, {actions} (K = {steps} sampling steps per frame), {footage}. PSNR of frame {args.horizon} "
        f"after the tokenizer, {len(real)} clips: dreamed {last['dreamed']:.1f} dB, last frame copied "
        f"{last['copied']:.1f} dB."
    )
    return {"open_loop.png": sheet, "open_loop.mp4": _video(cells)}, told


# -- agent ---------------------------------------------------------------------------------------------------


def show_dreams(models: Models, logs: Windows, args: RolloutArgs) -> tuple[dict[str, bytes], str]:
    """dream_<task>.png and .mp4 for every task: the policy acting in the world model from the same starts."""
    length = 3 * args.horizon
    footage = pick_clips(logs, args.clips, CONTEXT, args.seed, start=True)
    context = encode_clips(models.tokenizer, logs, footage)
    camera = models.tokenizer.cfg.cameras[0].name
    paid = logs.contract.reward is not None
    scale = max(float(np.abs(logs.reward).max()), 1e-6)
    files = {}
    for task, name in enumerate(logs.contract.task_names):
        tokens, run = _dream(models, logs, footage, context, task, length, args.seed)
        images = decode_clips(models.tokenizer, tokens, camera)
        before = np.full((len(images), CONTEXT), np.nan)
        reward = [*np.concatenate([before, run.reward.cpu().numpy()], 1)] if paid else [None] * len(images)
        colors = [[GREEN] * CONTEXT + [ORANGE if a else GREY for a in row] for row in _alive(run)]
        acts = [[" ".join(f"{v:+.2f}" for v in a) for a in row] for row in run.action.tolist()]
        # an action stands under the frame it was chosen at; none is chosen at the last one
        texts = [[""] * (CONTEXT - 1) + row + [""] for row in acts]
        cells = [
            [Panel(f"{name}, {place}", images[i], colors[i], reward[i], scale, texts[i])]
            for i, place in enumerate(footage.places)
        ]
        files[f"dream_{name}.mp4"] = _video(cells, columns=3)
        files[f"dream_{name}.png"] = _dream_sheet(images, colors, reward, footage)
    steps, kind = _steps(models), "cloned" if models.policy is None else "imagination-trained"
    told = (
        f"The {kind} policy acting inside the world model, not on the robot: {length} dreamed frames "
        f"(K = {steps}) after {CONTEXT} real ones from {footage}; actions are sampled; "
        f"below the frames: {', '.join(logs.contract.action_names)}. "
        + (f"Bar: predicted reward, full at {scale:g}. " if paid else "There is no reward to predict. ")
        + "Grey: after the end it predicts."
    )
    return files, told


@torch.no_grad()
def _dream(
    models: Models, logs: Windows, footage: Footage, context: Tensor, task: int, length: int, seed: int
) -> tuple[Tensor, Rollout]:
    """The policy acting after the real context: tokens (B, CONTEXT + length, N, L), and the rollout."""
    device = context.device
    batch = transitions_of(logs, footage.frames)
    assert models.dynamics is not None
    dream = Dream(models.dynamics, models.agent, len(context), torch.Generator(device).manual_seed(seed))
    tasks = torch.full((len(context),), task, device=device)
    h = torch.empty(0)
    for t in range(CONTEXT):
        action, labelled = batch["prev_action"][:, t].to(device), batch["prev_labelled"][:, t].to(device)
        h = dream.observe(context[:, t], action, labelled, tasks)
    settings = replace(models.preset.imagination_training.settings, horizon=length)
    policy: Any = models.acting
    run = imagine(dream, policy, h, tasks, settings)
    return torch.cat([context, run.tokens], 1), run


def _alive(run: Rollout) -> list[list[bool]]:
    """(B, H) whether each dreamed frame is still part of the episode; the terminal frame itself is."""
    alive = (run.proceed > 0.5).int().cumprod(1).bool().roll(1, 1)
    alive[:, 0] = True
    return alive.tolist()


_SHOW: dict[str, Callable[[Models, Windows, RolloutArgs], tuple[dict[str, bytes], str]]] = {
    "tokenizer": show_reconstruction,
    "dynamics": show_open_loop,
    "agent": show_dreams,
    "imagination": show_dreams,
}


# -- drawing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One picture stream of a clip, with a colour and perhaps more for each frame.

    Attributes:
        title: text above the picture.
        images: uint8 (T, H, W, 3).
        colors: colour of the bar below each frame.
        meter: values (T,) drawn as a bar, NaN for none.
        scale: the value of a full bar.
        texts: a text below each frame.
    """

    title: str
    images: np.ndarray
    colors: Sequence[Color]
    meter: np.ndarray | None = None
    scale: float = 1.0
    texts: Sequence[str] = ()


def _sheet(rows: dict[str, np.ndarray], footage: Footage, horizon: int) -> bytes:
    """PNG of the first clips: a block of rows for each, with the frames of a few horizons."""
    ahead = np.unique(np.linspace(1, horizon, min(horizon, 9)).round().astype(int))
    columns = np.concatenate([[0, CONTEXT - 1], CONTEXT - 1 + ahead])
    bars = [GREEN, GREEN] + [ORANGE] * len(ahead)
    notes = [f"{1 - CONTEXT}", "0"] + [f"+{h}" for h in ahead]
    strips = []
    for i, place in enumerate(footage.places[:_STRIPS]):
        for number, (name, images) in enumerate(rows.items()):
            last = number == len(rows) - 1  # the copied frame, which nobody predicted
            caption = f"{name}\n{place}" if number == 0 else name
            marks = (
                [GREEN] * len(columns)
                if number == 0
                else [GREEN, GREEN] + [GREY] * len(ahead)
                if last
                else bars
            )
            strips.append(Strip(images[i, columns], caption, notes if last else (), marks))
    return png_bytes(contact_sheet(strips, "Frames ahead of the last real frame", _LEGEND, _TILE))


def _dream_sheet(
    images: np.ndarray, colors: list[list[Color]], reward: list[np.ndarray | None], footage: Footage
) -> bytes:
    """PNG of the first dreams, one row each, with the reward predicted at the frames shown."""
    columns = np.unique(np.linspace(CONTEXT - 1, images.shape[1] - 1, 12).round().astype(int))
    strips = []
    for i, place in enumerate(footage.places[: 2 * _STRIPS]):
        ahead, values = [f"+{t - CONTEXT + 1}" for t in columns], reward[i]
        if values is not None:
            ahead = [
                a if np.isnan(values[t]) else f"{a}  r {values[t]:.2f}"
                for a, t in zip(ahead, columns, strict=True)
            ]
        strips.append(Strip(images[i, columns], place, ahead, [colors[i][t] for t in columns]))
    return png_bytes(contact_sheet(strips, "The policy inside the world model", (*_LEGEND, _ENDED), _TILE))


def _video(cells: list[list[Panel]], columns: int = 2) -> bytes:
    """MP4 of clips in a grid: a cell per clip, its panels side by side."""
    drawn = [np.concatenate([_panel(panel) for panel in cell], 2) for cell in cells]
    if len(drawn) < columns:
        columns = len(drawn)
    blank = np.full_like(drawn[0], 255)
    drawn += [blank] * (-len(drawn) % columns)
    rows = [np.concatenate(drawn[i : i + columns], 2) for i in range(0, len(drawn), columns)]
    frames = np.concatenate(rows, 1)
    return mp4_bytes(np.concatenate([frames, frames[-1:].repeat(_HOLD, 0)]), _FPS)


def _panel(panel: Panel) -> np.ndarray:
    """A panel as frames (T, h, w, 3): title, picture, colour bar, text, meter."""
    images = fit(panel.images, _PANEL)
    count, height, width = images.shape[:3]
    bar = 24 + height
    text = bar + 8
    meter = text + 18 * bool(panel.texts)
    bottom = meter + 18 * (panel.meter is not None) + _GAP
    out = np.full((count, bottom, width + _GAP, 3), 255, np.uint8)
    out[:, 24:bar, :width] = images
    for t in range(count):
        _text(out[t], panel.title, 4, 17)
        out[t, bar : bar + 6, :width] = panel.colors[t]
        if panel.texts:
            _text(out[t], panel.texts[t], 4, text + 13)
        if panel.meter is not None and np.isfinite(panel.meter[t]):
            value = float(panel.meter[t])
            reach = round(min(1.0, abs(value) / panel.scale) * (width - 60))
            out[t, meter + 2 : meter + 16, 60 : 60 + reach] = GREEN if value >= 0 else ORANGE
            _text(out[t], f"{value:+.2f}", 4, meter + 13)
    return out


def _text(picture: np.ndarray, text: str, x: int, y: int) -> None:
    cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (30, 30, 30), 1, cv2.LINE_AA)


if __name__ == "__main__":
    main()
