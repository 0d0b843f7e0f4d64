"""`d4-minecraft`: check, benchmark, ladder, record, train."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from d4_core import threads
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError, run_cli
from d4_sim.minecraft.game import MOST_LATE, Engine, Rung, engine

EngineName = Literal["minerl", "luanti", "luanti_wild", "crafter", "crafter_peaceful"]
GameName = Literal["minerl", "luanti", "luanti_wild"]
EXAMPLES = Path("docs/examples")


@dataclass(kw_only=True)
class Check:
    """Say what an engine needs on this machine, what is missing, and how to get it.

    Exit code 1 if something is missing for the --engine that was named.
    """

    engine: Literal["all", EngineName] = "all"
    """What to look at."""
    python: str = ""
    """Interpreter that has MineRL."""

    def run(self) -> int:
        """Print a line for everything, and what is missing at the end."""
        from d4_sim.minecraft.check import check, needs

        names = list(needs("")) if self.engine == "all" else [self.engine]
        lacking = False
        for name in names:
            found = check(name, self.python)
            width = max(len(f.name) for f in found)
            print(f"{engine(name).title}:")
            for f in found:
                print(f"  {f.name:{width}}  {f.value}")
            for f in found:
                if f.missing:
                    print(f"  MISSING {f.name}: {f.missing}")
            lacking |= any(f.missing for f in found)
        return int(lacking and self.engine != "all")


@dataclass(kw_only=True)
class Benchmark:
    """Play episodes with a policy, and write which milestones it reaches, and when.

    The same command continues; a larger --episodes adds to what is there.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run folder of d4-train, one of its phases, or `random`."""
    engine: EngineName | None = None
    """The game. Only minerl is Minecraft; others are reported under their own names. Without it that is
    minerl for whoever acts with keyboard and mouse, and crafter for everybody else."""
    episodes: int = 100
    """Episodes in all; the paper has 1000."""
    out: Path | None = None
    """Folder for results; runs/benchmark/<engine>-<policy> without it."""
    jobs: int = 1
    """Environments at a time, each a process of its own."""
    minutes: float | None = None
    """Length of an episode; 60 in Minecraft."""
    prompt: str | None = None
    """Ask for this task throughout, instead of the ladder."""
    seed: int = 0
    """Decides the worlds and all sampling."""
    repeats: int = 2
    """How often an episode is played again whose environment hung or died, before it counts as it stood."""
    part: str = "1/1"
    """Play a part of the episodes: 1/4 to 4/4 in four processes with the same --out. Each takes a GPU of its
    own where there are several; CUDA_VISIBLE_DEVICES=2 gives it that one."""
    keep: Path | None = None
    """Also record the episodes, as d4-ingest takes them."""
    python: str | None = None
    """minerl: the interpreter that has MineRL."""
    env: str | None = None
    """minerl: a registered environment other than MineRLHumanSurvival-v0."""
    set: tuple[str, ...] = ()
    """Further options of the engine, as name=value."""
    contract: Path | None = None
    """What the policy `random` acts by."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def run(self) -> int:
        """Play what is missing, then the table."""
        from d4_sim.minecraft import benchmark
        from d4_sim.minecraft.policies import load_policy
        from d4_sim.minecraft.results import Results, never_began, write_table
        from d4_sim.stages import handled_by

        _at_least(self, episodes=1, jobs=1, seed=0, repeats=0)
        part = _part(self.part)
        threads.configure()
        if self.jobs > 1 and any(text.startswith("display=") for text in self.set):
            raise UserError("--set display= gives all games the same display: leave it out, or --jobs 1")
        if self.contract and self.checkpoint != "random":
            raise UserError("--contract is for `random`; a trained policy acts by its own")
        given = Contract.load(self.contract) if self.contract else None
        game = engine(self.engine or _game_for(self, given))
        if self.keep is not None and game.kind != "game":
            raise UserError(
                f"--keep records games of keyboard and mouse; for {game.title} there is d4-record"
            )
        contract = given or _of_world(game)
        policy = load_policy(self.checkpoint, self.jobs, _device(self.device, part), contract)
        rungs = (Rung(self.prompt, None),) if self.prompt else game.ladder
        minutes = game.minutes if self.minutes is None else self.minutes
        plan = benchmark.Plan(
            engine=game, options=_options(game, self), rungs=rungs, ticks=_ticks(game, minutes),
            seed=self.seed, repeats=self.repeats, keep=self.keep,
        )  # fmt: skip
        benchmark.require_ready(plan, policy)
        _require_game(game, self.python)
        about = _about(plan, policy.identity, policy.contract, self.prompt)
        name = policy.identity.replace(" ", "-")
        out = self.out or Path("runs/benchmark") / f"{game.name}-{name}"
        results = Results(out, about, part)
        done = {int(result["episode"]) for result in results.episodes() if not never_began(result)}
        todo = [n for n in range(self.episodes) if n not in done and n % part[1] == part[0]]
        if done:
            more = f", more than the {self.episodes} asked for" if len(done) > self.episodes else ""
            print(f"{_many(len(done), 'episode')} there already{more}")
        try:
            with handled_by(_Once()), results.alone():
                if todo:
                    benchmark.Benchmark(plan, policy, results, _say).play(todo, self.jobs)
        except BaseException:
            if results.episodes():  # a table of what is finished, whatever became of the rest
                write_table(out, game, about, self.episodes)
            raise
        print(write_table(out, game, about, self.episodes))
        if failed := sum(map(never_began, results.episodes())):
            print(f"{_many(failed, 'episode')} did not begin; the same command tries that again")
        print(f"results: {out / 'table.md'}, {out / 'results.json'} and {out / 'events'}")
        return 0


@dataclass(kw_only=True)
class Ladder:
    """Run the ladder of prompts over recorded events: which rung when, and which milestones."""

    replay: Path
    """A recording of a contractor (<name>.jsonl), or events of a benchmark (<out>/events/<n>.jsonl)."""
    engine: GameName | None = None
    """The game of a recording that does not say it; without it that is Minecraft."""

    def run(self) -> int:
        """Print the rungs that it gets to."""
        from d4_sim.minecraft.replay import climb, read_recorded

        recorded = read_recorded(self.replay, self.engine)
        game = engine(recorded.engine)
        minute = 60 * recorded.rate_hz
        print(f"{recorded.name}: {recorded.ticks} ticks, {recorded.ticks / minute:.1f} minutes, {game.title}")
        for number, step in enumerate(climb(game.ladder, recorded), 1):
            count = f"{step.done:g} of {step.rung.count or 'any'}"
            end = "not done" if step.end is None else f"done at {step.end / minute:.2f} min"
            print(f"{number:3d}  {step.rung.task:24} {count:10} from {step.begin / minute:6.2f} min  {end}")
        reached: dict[str, int] = {}
        for tick, told in recorded.told:
            for name in told.reached:
                reached.setdefault(name, tick)
        if recorded.damaged:
            print(f"{_many(recorded.damaged, 'line')} could not be read: what happened there is not counted")
        times = ", ".join(f"{name} {tick / minute:.2f}" for name, tick in reached.items()) or "none"
        print(f"milestones (minutes): {times}")
        if recorded.had:
            print(f"there from the start, so not reached here: {', '.join(recorded.had)}")
        return 0


@dataclass(kw_only=True)
class Record:
    """Play, and write it as data of contractors: <out>/<engine>-<n>-<part>.mp4 and .jsonl, for d4-ingest."""

    out: Path
    """Folder for the recordings; more are added to what is there."""
    engine: GameName = "minerl"
    """The game."""
    player: str = "person"
    """person (a window), scripted (the engine's own), module:function, or a recording to play again."""
    minutes: float = 10.0
    """Length of the session."""
    episodes: int = 1_000_000
    """At most so many episodes."""
    episode_minutes: float = 60.0
    """Length of an episode that does not end by itself."""
    seed: int = 0
    """Decides the worlds."""
    most_late: float = MOST_LATE
    """A part is left out if a larger share of its pictures came half a tick late."""
    zoom: int = 2
    """Pixels of the window for one of the game."""
    python: str | None = None
    """minerl: the interpreter that has MineRL."""
    env: str | None = None
    """minerl: a registered environment other than MineRLHumanSurvival-v0."""
    set: tuple[str, ...] = ()
    """Further options of the engine, as name=value."""

    def run(self) -> int:
        """Record, and say what came of it."""
        from d4_sim.minecraft.record import Settings, make_player, play

        _at_least(self, episodes=1, zoom=1, seed=0)
        if not 0 <= self.most_late <= 1:
            raise UserError(f"--most-late {self.most_late:g} is a share: give a number from 0 to 1")
        game = engine(self.engine)
        settings = Settings(
            out=self.out, ticks=_ticks(game, self.minutes), episode_ticks=_ticks(game, self.episode_minutes),
            episodes=self.episodes, seed=self.seed, most_late=self.most_late,
        )  # fmt: skip
        options = _options(game, self)
        _require_game(game, self.python)
        session = play(game, options, make_player(self.player, game, self.zoom), settings)
        print(
            f"{session.ticks} ticks in {_many(session.episodes, 'episode')}, "
            f"{_many(len(session.parts), 'part')} in {self.out}"
        )
        for what, late in (("pictures", session.late_ms), ("actions", session.action_ms)):
            if late and max(late) > 0:
                median, most = np.percentile(late, [50, 95])
                print(
                    f"{what} late by: median {median:.1f} ms, 95 % {most:.1f} ms, at most {max(late):.1f} ms"
                )
        if session.missed:
            print(
                f"{_many(session.missed, 'tick')} passed unseen; a part of the recording ends before each gap"
            )
        if session.refused:
            refused = _many(session.refused, "part")
            print(f"{refused} left out: over {self.most_late:.0%} of their pictures came late")
        if not session.parts:
            raise UserError("nothing was recorded that can be used")
        contract = example("luanti.yaml" if self.engine == "luanti" else "minecraft.yaml")
        print(f"next: d4-ingest {self.out} --contract {contract} --out <dataset>")
        return 0


@dataclass(kw_only=True)
class Train:
    """Name the whole recipe over contractors' recordings, with hours, disk and days, and run it.

    The same command continues. Steps: d4-fetch (with --index), d4-ingest, d4-audit, d4-train phase by phase.
    """

    recordings: Path = Path("runs/minecraft/recordings")
    """Folder of recordings; gets what is fetched."""
    index: tuple[str, ...] = ()
    """Indexes to fetch from, addresses or files; github.com/openai/Video-Pre-Training links them."""
    out: Path = Path("runs/minecraft")
    """Folder for dataset and run."""
    contract: Path | None = None
    """Keyboard and mouse, and the tasks; docs/examples/minecraft.yaml of this repository without it."""
    preset: Literal["nano", "small", "base", "large", "paper"] = "base"
    """Model size and training settings."""
    hours: float = 100.0
    """Recordings to fetch, in hours; the paper has 2541."""
    gpus: int | None = None
    """GPUs that train; all of this machine, or its CPU, without it."""
    jobs: int = 4
    """Processes that fetch and ingest."""
    scale: float = 1.0
    """Multiplies the steps of every phase."""
    seed: int = 0
    """Decides training."""
    set: tuple[str, ...] = ()
    """Preset fields to override, as in d4-train, for example dynamics_training.batch=8."""
    skip: Path | None = None
    """A file that names recordings to leave out, one a line, as d4-ingest takes it."""
    force: bool = False
    """Go on although a gate failed."""
    dry_run: bool = False
    """Only say what would be done and what it costs."""

    def run(self) -> int:
        """Print the recipe; then do it."""
        from d4_sim.minecraft import recipe as recipes

        _at_least(self, jobs=1, seed=0, **({} if self.gpus is None else {"gpus": 0}))
        if not (0 < self.hours < math.inf and 0 < self.scale < math.inf):
            raise UserError("--hours and --scale must be above 0, and finite")
        recipe = self._recipe()
        here = recipes.stock(self.recordings)
        recipes.require_usable(recipe, here, self.dry_run)
        for line in recipes.told(recipe, here, measure=True):
            _say(line)
        if self.dry_run:
            for stage in recipes.plan(recipe, here):
                for words in stage.commands:
                    print(f"$ {shlex.join(words)}")
            for why in recipes.refusals(recipe, here):
                print(f"this machine stops it: {why}")
        else:
            recipes.require_space(recipe, here)
            if code := recipes.run(recipe, here, _say):
                return code
        played = recipes.played_in(self.recordings)
        how = "--python <python with MineRL>" if played == "minerl" else f"--engine {played}"
        print(f"next: d4-minecraft benchmark {self.out / 'run'} --episodes 1000 {how}")
        return 0

    def _recipe(self) -> Any:
        import torch

        from d4_sim.minecraft.recipe import Recipe

        gpus = torch.cuda.device_count() if self.gpus is None else self.gpus
        return Recipe(
            index=self.index, recordings=self.recordings, out=self.out,
            contract=self.contract or example("minecraft.yaml"),
            preset=self.preset, hours=self.hours, gpus=gpus, jobs=self.jobs, scale=self.scale, seed=self.seed,
            force=self.force, set=self.set, skip=self.skip,
        )  # fmt: skip


# ---- what they share ----


class _Once:
    """Stops this command at the first signal; a second one would stop its tidying up."""

    def __init__(self) -> None:
        self._told = False

    def __call__(self, number: int, frame: Any) -> None:
        from d4_sim.stages import Interrupted

        if not self._told:
            self._told = True
            raise Interrupted(number)


def _say(text: str) -> None:
    print(text, flush=True)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def example(name: str) -> Path:
    """A contract of this repository, from wherever the command is run."""
    path = EXAMPLES / name
    return path if path.exists() else Path(__file__).resolve().parents[3] / path


def _at_least(args: Any, **least: int) -> None:
    for name, value in least.items():
        if getattr(args, name) < value:
            raise UserError(f"--{name.replace('_', '-')} must be at least {value}")


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise UserError(f"--part {text} is not like 1/4")
    return int(first) - 1, int(count)


def _device(name: str, part: tuple[int, int]) -> Any:
    """The device of a part: the parts of a benchmark take the GPUs of a machine in turn."""
    import torch

    from d4_core.pipeline import pick_device

    device = pick_device(name)
    if device.type == "cuda" and part[1] > 1:
        device = torch.device("cuda", part[0] % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _ticks(game: Engine, minutes: float) -> int:
    if not 0 < minutes <= 10_000:
        raise UserError("--minutes must be above 0 and at most 10000")
    ticks = max(1, round(minutes * 60 * game.rate_hz))
    if game.kind == "world" and ticks > (most := round(game.minutes * 60 * game.rate_hz)):
        raise UserError(
            f"{game.title} ends after {most} ticks: --minutes may be at most {most / 60 / game.rate_hz:.3g}"
        )
    return ticks


def _options(game: Engine, args: Any) -> dict[str, Any]:
    """The options of an engine out of a command's; one that it does not take is a mistake."""
    given = {name: getattr(args, name) for name in ("python", "env") if getattr(args, name) is not None}
    if "python" in given and shutil.which(given["python"]) is None:
        raise UserError(f"--python {given['python']} is no program: give the interpreter that has MineRL")
    for text in args.set:
        name, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--set {text} is not like name=value")
        given[name] = value
    for name in given:
        if name not in game.options:
            takes = ", ".join(game.options) or "none"
            raise UserError(f"{game.title} takes no option {name!r}; it takes {takes}")
    return given


def _require_game(game: Engine, python: str | None) -> None:
    if game.script is not None:
        from d4_sim.minecraft.check import require_minerl

        require_minerl(python or "")


def _game_for(args: Benchmark, given: Contract | None) -> EngineName:
    """The game that is played with what a policy acts by; Crafter with nothing said."""
    from d4_sim.minecraft.keys import require_keyboard_and_mouse
    from d4_sim.minecraft.policies import RANDOM, contract_of

    contract = given if args.checkpoint == RANDOM else contract_of(args.checkpoint)
    if contract is None:
        return "minerl" if args.python or args.env else "crafter"
    try:
        require_keyboard_and_mouse(contract, contract.name)
    except UserError:
        return "crafter"
    return "minerl"


def _of_world(game: Engine) -> Contract | None:
    """The contract of a world; a game has as many as there are ways to look at it."""
    if game.kind != "world":
        return None
    from d4_sim.world import world_class

    return Contract.load(world_class(game.name).contract_path())


def _about(plan: Any, policy: str, contract: Contract, prompt: str | None) -> dict[str, Any]:
    """What a folder of results is of; what differs here must not be mixed."""
    from d4_sim.minecraft.results import ladder_key

    prompts = f"{prompt} throughout" if prompt else f"ladder of {len(plan.rungs)} prompts"
    apart = {name: value for name, value in plan.options.items() if name not in ("python", "display")}
    return ({"options": apart} if apart else {}) | {
        "engine": plan.engine.name, "policy": policy, "contract": contract.hash, "seed": plan.seed,
        "ticks": plan.ticks, "minutes": plan.ticks / 60 / plan.engine.rate_hz, "prompts": prompts,
        "ladder": ladder_key(plan.rungs), "repeats": plan.repeats,
    }  # fmt: skip


Command = (
    Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Benchmark, tyro.conf.subcommand("benchmark")]
    | Annotated[Ladder, tyro.conf.subcommand("ladder")]
    | Annotated[Record, tyro.conf.subcommand("record")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


def _main() -> int:
    from d4_sim.stages import Interrupted

    command: Any = tyro.cli(Command, prog="d4-minecraft", description=__doc__)  # type: ignore[arg-type]
    try:
        return int(command.run())
    except Interrupted as stop:
        print("stopped; what is done is kept and the same command continues", file=sys.stderr)
        return 128 + int(stop.args[0])


def main() -> None:
    """Entry point of ``d4-minecraft``."""
    run_cli(_main)


if __name__ == "__main__":
    main()
