"""The phases of a run in their order: build, train, measure the gates, stop with the figure if one fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from d4_core import checkpoint, distributed
from d4_core.arguments import TrainArgs, scaled
from d4_core.config import to_dict
from d4_core.data import latent_statistics, pixel_statistics
from d4_core.gates import (
    Gate,
    Probe,
    agent_gates,
    dynamics_gates,
    fit_probe,
    frames_of,
    record,
    tokenizer_gates,
)
from d4_core.latent_cache import latent_cache
from d4_core.loop import train
from d4_core.memory import require_memory
from d4_core.models import CONTENTS, Models, build, load, weights_hash
from d4_core.phase import Phase
from d4_core.phases import AgentPhase, DynamicsPhase, ImaginationPhase, TokenizerPhase
from d4_core.tokenizer import Tokenizer
from d4_datasets import places, whole
from d4_datasets.course import Course
from d4_datasets.errors import UserError
from d4_datasets.joined import Frames
from d4_datasets.latents import Origin
from d4_datasets.locks import held
from d4_datasets.windows import Windows

BEFORE = {"dynamics": "tokenizer", "agent": "dynamics", "imagination": "agent"}


class Pipeline:
    """State shared by the phases of one run: data, split, latents, probes."""

    def __init__(self, args: TrainArgs) -> None:
        self.args, self.preset = args, scaled(args)
        self.device = pick_device(args.device)
        distributed.init(self.device)
        self.is_writer = distributed.rank() == 0
        self.dataset = places.title(args.dataset)
        if self.is_writer:
            self.logs = self._open()  # builds the frame cache
        distributed.barrier()
        if not self.is_writer:
            self.logs = self._open()
        self.contract = self.logs.contract
        if args.tokenizer is not None and self.logs.origin is None:
            raise UserError(f"--tokenizer is for datasets of latents, and {self.dataset} holds pictures")
        self.train, self.held_out = self.logs.split()
        self.logs.keep_labels(self.train, args.labels, args.labels_from)
        if not len(self.held_out):
            raise UserError(
                f"{self.dataset} has too few episodes to hold one out for the gates: record more, or cut "
                "long recordings with `episode: {max_s: 10}` in the contract and ingest again"
            )
        for phase in args.phases:
            require_memory(self.preset, self.contract, phase, self.device, distributed.world_size())
        self.course = Course(
            self.logs, self.train, seed=args.seed, rank=distributed.rank(), ranks=distributed.world_size(),
            frames_per_step=distributed.share(self.preset.tokenizer_training.batch),
        )  # fmt: skip

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run folder against a second training in it, and say there what this one is.

        Raises:
            UserError: another training holds it.
        """
        if not self.is_writer:
            yield
            return
        run = self.args.run
        run.mkdir(parents=True, exist_ok=True)
        with held(run / ".lock", f"another d4-train works in {run}: wait for it, or give another --run"):
            self._describe()
            yield

    def _open(self) -> Windows:
        """The data; the processes of this machine share the limit of the cache."""
        readers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limit = places.limit_bytes(self.args.cache_gb)
        return Windows(self.args.dataset, self.args.cache, limit=limit, readers=readers)

    def _describe(self) -> None:
        """config.yaml, contract.yaml and notes.json of the run, always whole: d4-clone may read them."""
        run = self.args.run
        about = {
            "preset": self.args.preset, "seed": self.args.seed, "scale": self.args.scale,
            "procs": distributed.world_size(), "labels": self.args.labels,
            "labels_from": self.args.labels_from,
            "dataset": self.dataset, "episodes": len(self.logs.episode_start),
            "frames": self.logs.num_frames, "labelled_share": float(self.logs.action_mask.mean()),
            "settings": to_dict(self.preset),
        }  # fmt: skip
        used = self.preset.tokenizer_training.lpips_features
        note = "LPIPS was not used (no weights file given): the tokenizer is trained on squared error alone."
        if used:
            note = f"The tokenizer's perceptual loss is LPIPS with the weights in {used}."
        texts = {
            "config.yaml": yaml.safe_dump(about, sort_keys=False),
            "contract.yaml": self.contract.to_yaml(),
            "notes.json": json.dumps([note]),
        }
        for name, text in texts.items():
            whole.write(run / name, text)

    def folder(self, phase: str) -> Path:
        """Checkpoint folder of a phase."""
        return self.args.run / phase

    # -- phases ----------------------------------------------------------------------------------------------

    def run_phase(self, phase: str) -> None:
        """Train one phase and measure its gates.

        Raises:
            UserError: the phase before is missing, the data cannot serve it, a gate failed without --force.
        """
        torch.manual_seed(self.args.seed * 1000 + list(CONTENTS).index(phase))
        if phase == "tokenizer" and self.logs.origin is not None:
            self._adopt(self.logs.origin)
        else:
            self._train(phase)
        tokenizer, latents = self._latents()
        failed = self._check(phase, tokenizer, latents) if self.is_writer else []
        if distributed.average_scalar(float(len(failed)), self.device) > 0 and not self.args.force:
            names = "; ".join(str(g) for g in failed)
            raise UserError(f"{phase}: {len(failed)} gate(s) failed, --force goes on: {names}")

    def _train(self, phase: str) -> None:
        work = self._prepare(phase)
        optim = getattr(self.preset.optim, phase)
        data = data_identity(self.logs)
        config: dict[str, Any] = {"phase": phase, "preset": self.preset.up_to(phase), "data": data}
        if phase == "tokenizer" and self.course.at_once is not None:
            config["pieces_at_once"] = self.course.at_once  # another cache would show other frames at a step
        if phase in BEFORE:
            # retrained inputs start this phase afresh
            config["before"] = weights_hash(self.folder(BEFORE[phase]))
        old = self._weights(phase)
        train(
            work, self.args.run, seed=self.args.seed, optim=optim, contract=self.contract, config=config,
            device=self.device, save_every_s=self.args.save_every_s,
        )  # fmt: skip
        if self.is_writer and self._weights(phase) != old:
            record(self.args.run, phase, [])  # what was measured on other weights says nothing about these

    def _adopt(self, origin: Origin) -> None:
        """Take the tokenizer that made the dataset's latents into the run: none is trained without pictures.

        Raises:
            UserError: it is neither in the run nor given, or does not fit the preset or the robot.
        """
        folder, given = self.folder("tokenizer"), self.args.tokenizer
        is_there = checkpoint.exists(folder)
        distributed.barrier()  # all have looked before one writes
        if not is_there:
            if given is None:
                raise UserError(
                    f"{self.dataset} holds latents and no pictures to train a tokenizer on: give the "
                    f"run folder of tokenizer {origin.weights}, which made them, with --tokenizer RUN"
                )
            source = given / "tokenizer" if checkpoint.exists(given / "tokenizer") else given
            self._require_maker(source)
            mine, its = self.preset.tokenizer_config(self.contract), load(source).tokenizer.cfg
            for name in ("cameras", "vectors", "num_latents", "latent_dim", "num_tokens"):
                if getattr(mine, name) != getattr(its, name):
                    raise UserError(
                        f"{source} does not fit preset and contract in {name}: {getattr(its, name)}, not "
                        f"{getattr(mine, name)}; train with the preset and the robot of that tokenizer"
                    )
            if self.is_writer:
                checkpoint.adopt(source, folder, self.contract)
        distributed.barrier()

    def _require_maker(self, folder: Path) -> None:
        """Refuse a tokenizer that did not make the latents of the dataset, if it holds latents."""
        origin, its = self.logs.origin, weights_hash(folder)
        if origin is not None and origin.weights != its:
            raise UserError(
                f"{self.dataset} holds latents of tokenizer {origin.weights}, and {folder} is tokenizer "
                f"{its}: they mean nothing to it; use the run whose tokenizer made them, or a new run folder "
                "with --tokenizer"
            )

    def _weights(self, phase: str) -> str | None:
        """Hash of the phase's weights, None while there are none."""
        return weights_hash(self.folder(phase)) if checkpoint.exists(self.folder(phase)) else None

    def _previous(self, phase: str) -> Models:
        before = BEFORE[phase]
        if not checkpoint.exists(self.folder(before)):
            folder = self.folder(before)
            raise UserError(f"{phase} needs {folder}, which does not exist: train {before} first")
        return load(self.folder(before), self.contract)

    def _prepare(self, phase: str) -> Phase:
        if phase == "tokenizer":
            tokenizer = build(self.preset, self.contract, "tokenizer").tokenizer
            rng, frames = np.random.default_rng(self.args.seed), frames_of(self.logs, self._at_hand())
            pixel_statistics(self.logs, tokenizer, rng, frames)  # rank 0's will be that of all
            episodes = self.course.part if self.course.at_once is None else self.course
            return TokenizerPhase(self.preset.tokenizer_training, tokenizer, self.logs, episodes)
        before, fresh = self._previous(phase), build(self.preset, self.contract, phase)
        tokenizer, latents = self._latents()
        data = (self.logs, latents, self.course.part, self.train)
        if phase == "dynamics":
            assert fresh.dynamics is not None
            return DynamicsPhase(self.preset.dynamics_training, fresh.dynamics, tokenizer, *data)
        assert before.dynamics is not None
        # how a step uses memory is this run's choice, not the checkpoint's
        network = before.dynamics.transformer
        network.cfg = replace(network.cfg, recompute=self.preset.dynamics.recompute)
        inputs = (before.dynamics, before.tokenizer, *data)
        if phase == "agent":
            assert fresh.agent is not None
            self._require_labels()
            before.dynamics.requires_grad_(True)
            # what the heads read is a matter of this phase; a world model trained otherwise serves as well
            reads = self.preset.heads_read_world
            before.dynamics.cfg = replace(before.dynamics.cfg, heads_read_world=reads)
            return AgentPhase(self.preset.agent_training, fresh.agent, *inputs)
        self._require_rewards()
        assert before.agent is not None
        return ImaginationPhase(self.preset.imagination_training, before.agent, *inputs)

    def _require_rewards(self) -> None:
        if self.contract.reward is None:
            raise UserError(
                "imagination training needs a reward: name its topic in the contract and ingest again"
            )

    def _require_labels(self) -> None:
        if not self.logs.labelled[self.train].any():
            topics = ", ".join(a.topic for a in self.contract.actions)
            raise UserError(
                "no frame of this dataset has a known action, so the agent phase has nothing to clone: "
                f"record some bags with {topics} (tokenizer and dynamics are trained)"
            )

    def _at_hand(self) -> np.ndarray:
        """Training episodes whose frames are unpacked, or will be first."""
        return self.train if self.course.at_once is None else self.course(0)

    def _latents(self) -> tuple[Tokenizer, Frames]:
        """The frozen tokenizer with its latent statistics, and the cached latents of every frame."""
        folder = self.folder("tokenizer")
        self._require_maker(folder)
        tokenizer = load(folder, self.contract, self.device).tokenizer
        path, tag = self.args.run / "latents", weights_hash(folder)

        def measure() -> None:
            latent_statistics(tokenizer, self.logs, self._at_hand(), np.random.default_rng(0))

        return tokenizer, latent_cache(tokenizer, self.logs, path, tag, self.logs.digest, measure)

    # -- gates -----------------------------------------------------------------------------------------------

    def _check(self, phase: str, tokenizer: Tokenizer, latents: Frames) -> list[Gate]:
        """Measure, record and print the gates of a phase; returns those that failed."""
        if phase != "imagination":  # its gates are those of d4-eval
            print(f"measuring the gates of the {phase}", flush=True)
        models = load(self.folder(phase), self.contract, self.device)
        gates: list[Gate] = []
        if phase == "tokenizer":
            gates = tokenizer_gates(tokenizer, self.logs, latents, self._probes(latents), self.held_out)
        elif phase == "dynamics":
            assert models.dynamics is not None
            split = (self.train, self.held_out)
            networks, probes = (models.tokenizer, models.dynamics), self._probes(latents)
            gates, curves = dynamics_gates(*networks, self.logs, latents, probes, *split)
            (self.args.run / "media").mkdir(exist_ok=True)
            whole.write(self.args.run / "media" / "open_loop.json", json.dumps(curves))
        elif phase == "agent":
            assert models.agent is not None
            assert models.dynamics is not None
            gates = agent_gates(
                models.agent, models.dynamics, self.logs, latents, self.train, self.held_out,
                relevant_return=self.preset.agent_training.relevant_return,
            )  # fmt: skip
        record(self.args.run, phase, gates, merge=True)
        for gate in gates:
            print(f"  {gate}", flush=True)
        return [g for g in gates if not g.ok]

    def _probes(self, latents: Frames) -> dict[str, Probe]:
        """One probe for every probe stream of the contract."""
        names = [v.name for v in self.contract.vectors("probe")]
        frames = frames_of(self.logs, self.train) if names else self.train
        return {name: fit_probe(latents, self.logs.vectors[name], frames) for name in names}

    def close(self) -> None:
        """Leave the process group, together: a rank that leaves early breaks the others' connections."""
        distributed.barrier()
        self.logs.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def data_identity(logs: Windows) -> str:
    """Names the data in a checkpoint's card and ties the checkpoint to it, wherever the dataset lies."""
    episodes, labelled = len(logs.episode_start), int(logs.action_mask.sum())
    return f"{logs.digest[:12]}: {logs.num_frames} frames, {episodes} episodes, {labelled} labelled frames"


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device; under torchrun each rank takes the GPU of its local rank.

    Raises:
        UserError: another name, or cuda was asked for and there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
