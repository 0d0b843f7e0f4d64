"""``d4-eval``: policies in the real simulator on shared starts, and the gates that need a real world."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import tyro

from d4_core import threads
from d4_datasets import locks, whole
from d4_datasets.errors import UserError, run_cli

if TYPE_CHECKING:
    from d4_core.baselines import BaselineTrainer, ScratchPolicy
    from d4_core.models import Models
    from d4_sim.vector import EpisodeBatch

PolicyName = Literal[
    "random", "data", "bc_scratch", "bc_early", "vpt", "wm_bc", "planner", "imagination", "expert"
]
POLICIES: tuple[PolicyName, ...] = ("random", "data", "bc_scratch", "wm_bc", "imagination", "expert")
# the checkpoint that each learned policy acts with
FOLDERS = {
    "bc_scratch": "bc_scratch", "bc_early": "bc_early", "vpt": "vpt", "wm_bc": "agent", "planner": "agent",
    "imagination": "imagination", "bc_scratch_argmax": "bc_scratch", "bc_early_argmax": "bc_early",
    "vpt_argmax": "vpt", "wm_bc_argmax": "agent", "imagination_argmax": "imagination",
}  # fmt: skip
SAMPLING = (
    "bc_scratch",
    "bc_early",
    "vpt",
    "wm_bc",
    "imagination",
)  # policies that sample unless told otherwise
SCRATCH_STEPS = 1500  # of a policy without a world model that there is not yet
ASIDE = ".on-"  # in the names of files with results on other starts
EVAL_SEED = 1_000_000  # recorded episodes have hashed 63-bit seeds, so these starts are new


def first_start(seed: int) -> int:
    """The seed of the first of the starts that all policies share; the others follow one by one."""
    return EVAL_SEED + 10_000 * seed


@dataclass(kw_only=True)
class EvalArgs:
    """Run policies in the simulator on the same start states and write eval.json."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of d4-train."""
    dataset: Path
    """Dataset that the run was trained on (data mean, training of bc_scratch, bc_early and vpt)."""
    policies: tuple[PolicyName, ...] = POLICIES
    """What to evaluate; results of other policies in eval.json are kept while their weights are in force, and
    those on other starts in a file beside it, eval.on-<world>.<first>-<last seed>.json."""
    episodes: int = 100
    """Episodes per policy."""
    planner_episodes: int | None = None
    """Of these, those that the planner drives, which is slow; default is all of them."""
    world: str | None = None
    """World with the same contract to drive in; default is the one that is called as the contract."""
    disturb: tuple[str, ...] = ()
    """What happens to commands and pictures meanwhile, such as latency=60 noise=0.1 look=1 (docs/mujoco.md
    has all); results go to eval-<these>.json, and no gate is measured."""
    seed: int = 0
    """Decides the start states and all sampling; baselines are trained with the seed of the run."""
    scratch_steps: int | None = None
    """Training steps of a policy without a world model, and of vpt's inverse dynamics model; by default
    those of the run are taken as they are, or trained for 1500."""
    scale: float = 1.0
    """Multiplies these training steps, where they are not those of the run."""
    device: str = "auto"
    """auto, cpu or cuda."""
    argmax: bool = False
    """Learned policies take their likeliest action; kept beside the samples, as <policy>_argmax."""
    missing: bool = False
    """Leave out the policies that have results on these starts with the weights that are in force."""
    force: bool = False
    """Go on although a gate failed."""


def main() -> None:
    """Entry point of ``d4-eval``."""
    run_cli(_main)


def _main() -> None:
    args = tyro.cli(EvalArgs, prog="d4-eval")
    threads.configure()
    from d4_core.clone import require_run
    from d4_core.report import write_report

    planned = args.episodes if args.planner_episodes is None else args.planner_episodes
    if min(args.episodes, planned) < 1 or args.seed < 0:
        raise UserError("--episodes and --planner-episodes must be above 0, and --seed not below")
    require_run(args.run)
    evaluation = Evaluation(args)
    for name in args.policies:
        evaluation.policy(name)
        evaluation.write()  # an interruption costs the policy that is driving, no other
    failed = evaluation.gates()
    evaluation.write()
    if failed and not args.force:
        raise UserError(f"{len(failed)} gate(s) failed, --force goes on: " + "; ".join(failed))
    report = write_report(args.run)
    print(f"results: {evaluation.path} and {report}")


class Evaluation:
    """Shared starts, loaded models and the growing result."""

    file: ClassVar[str] = "eval.json"

    def __init__(self, args: EvalArgs) -> None:
        from d4_core.clone import open_logs
        from d4_sim.world import has_events, make_world

        self.args = args
        self.logs, self.train, self.held_out = open_logs(args.run, args.dataset)
        self.world = args.world or self.logs.contract.name
        world = make_world(self.world)
        if args.world and world.contract.hash != self.logs.contract.hash:
            raise UserError(f"the world {self.world} has another contract than {args.dataset}")
        self.world = "+".join([self.world, *args.disturb])
        if args.disturb:
            make_world(self.world)
        self.horizon, self.success_reward = world.horizon, world.success_reward
        self.events = has_events(world)
        self.seeds = first_start(args.seed) + np.arange(args.episodes)
        num_tasks = max(1, len(self.logs.contract.task_names))
        self.tasks = np.arange(args.episodes) % num_tasks
        self._own: dict[str, dict[str, Any]] = {}  # rows measured by this process
        self.result = self._open()

    @property
    def path(self) -> Path:
        """The file of the results; those of a disturbed world have their own."""
        if not self.args.disturb:
            return self.args.run / self.file
        name, _, kind = self.file.partition(".")
        return self.args.run / f"{name}-{self._slug}.{kind}"

    @property
    def _slug(self) -> str:
        from d4_sim.suite.disturb import slug

        return slug(self.args.disturb)

    def _open(self) -> dict[str, Any]:
        """The file as it is now, without what other start states or other weights gave."""
        path, contract = self.path, self.logs.contract
        shared = {
            "world": self.world,
            "episodes": self.args.episodes,
            "seeds": [int(self.seeds[0]), int(self.seeds[-1])],
        }
        for place in (path, beside(path, shared)):
            result: dict[str, Any] = whole.read_json(place, dict)
            if {k: result.get(k) for k in shared} == shared:
                break
        else:
            names = list(contract.task_names)
            return {**shared, "tasks": self.tasks.tolist(), "task_names": names, "policies": {}}
        rows = result["policies"].items()
        result["policies"] = {k: row for k, row in rows if row.get("weights") == self._weights(k)}
        return result

    def _weights(self, name: str) -> str | None:
        """What a row is of: the hash of the checkpoint that a policy acts with, or the logs; None where
        nothing was learned, or not yet."""
        from d4_core import checkpoint
        from d4_core.models import weights_hash
        from d4_core.pipeline import data_identity

        if name == "data" and not self.events:
            return data_identity(self.logs)
        folder = self.args.run / FOLDERS.get(name, "")
        return weights_hash(folder) if name in FOLDERS and checkpoint.exists(folder) else None

    # -- policies --------------------------------------------------------------------------------------------

    def policy(self, policy: str) -> None:
        """Evaluate one policy and keep its episodes."""
        began, name = time.perf_counter(), policy
        if self.args.argmax and policy in SAMPLING:
            name += "_argmax"
        found = self.result["policies"].get(name)
        if self.args.missing and found and (name == "data" or len(found["return"]) == self._count(name)):
            self._own[name] = found
            print(f"  {name:12} was there", flush=True)
            return
        if name == "data" and not self.events:
            row = self._data()
        else:
            row = self._episodes(name)
        row |= {"weights": self._weights(name), "seconds": time.perf_counter() - began}
        self.result["policies"][name] = self._own[name] = row
        returns, success = np.array(row["return"]), np.array(row["success"])
        cost = f"({len(returns)} episodes, {row['seconds']:.0f} s)"
        print(f"  {name:12} return {returns.mean():6.2f}  success {success.mean():.2f}  {cost}", flush=True)

    def _data(self) -> dict[str, Any]:
        """Own-task returns of the logged drives: one that lost frames is in the dataset in pieces.

        Events may lie in any piece of a long recording that was cut, so that pieces tell little about whole
        episodes: where tasks are events, those who made the logs drive again instead, on the shared starts.
        """
        logs = self.logs
        first, last = logs.episode_start, logs.episode_start + logs.episode_length - 1
        column = np.minimum(logs.task_index, logs.reward.shape[1] - 1)
        own = np.take_along_axis(logs.reward, column[:, None], 1)[:, 0].copy()
        drives, begin = np.unique(logs.drives, return_index=True)
        end = len(logs.drives) - 1 - np.unique(logs.drives[::-1], return_index=True)[1]
        own[first[begin]] = 0.0  # no action earned frame 0
        pieces = np.add.reduceat(own, first)
        return {
            "return": [float(pieces[logs.drives == drive].sum()) for drive in drives],
            "success": (own[last[end]] >= self.success_reward).astype(int).tolist(),
            "task": logs.task_index[first[begin]].tolist(),
        }

    def _episodes(self, name: str) -> dict[str, Any]:
        from d4_sim.calibration import Recorder, calibrate
        from d4_sim.vector import run_episodes

        session, extra = self._session(name)
        recorder = Recorder(session)
        count = self._count(name)
        seeds, tasks = self.seeds[:count].tolist(), self.tasks[:count].tolist()
        batch = run_episodes(self.world, seeds, tasks, recorder, self.horizon)
        if name in FOLDERS or name == "expert":
            self._film(name, batch)
        row = {
            "return": batch.returns.tolist(),
            "success": batch.success.astype(int).tolist(),
            "fallen": batch.terminal.any(1).astype(int).tolist(),
            "task": tasks,
            **extra,
        }
        if recorder.readings:
            row |= calibrate(session.models, recorder.readings, batch)
        if name in ("wm_bc", "imagination") and not self.args.disturb:
            row["first_ticks"] = self._first_ticks(session.models)
        return row

    def _first_ticks(self, models: Models) -> dict[str, list[float]]:
        """Returns of a policy over the ticks of one imagined rollout, in the model and in the simulator."""
        from d4_sim.dream import imagined_and_real

        imagined, real = imagined_and_real(models, self.world, self.seeds, self.tasks, self.args.seed)
        return {"imagined": imagined.tolist(), "real": real.tolist()}

    def _count(self, name: str) -> int:
        """Episodes of a policy."""
        few = self.args.planner_episodes if name == "planner" else None
        return self.args.episodes if few is None else min(few, self.args.episodes)

    def _session(self, name: str) -> tuple[Any, dict[str, Any]]:
        """The policy as a session, and what else its row of eval.json says."""
        from d4_core.planner import PlannerSession
        from d4_core.session import PolicySession, RandomSession, ScratchSession, whole
        from d4_sim.driver import ScriptedPolicy

        contract, seed, n = self.logs.contract, self.args.seed, self._count(name)
        kind, argmax = name.removesuffix("_argmax"), name.endswith("_argmax")
        if name == "random":
            return RandomSession(contract.action_low, contract.action_high, seed, whole(contract)), {}
        if name in ("expert", "data"):
            return ScriptedPolicy("expert" if name == "expert" else None, seed), {}
        if kind in ("bc_scratch", "bc_early", "vpt"):
            policy, extra = self._clone(kind)
            return ScratchSession(policy, seed, argmax), extra
        if name == "planner":
            session = PlannerSession(self._models("agent"), n, seed)
            return session, {"planner": asdict(session.cfg)}
        return PolicySession(self._models(FOLDERS[name]), n, seed, argmax=argmax), {}

    def _clone(self, kind: str) -> tuple[ScratchPolicy, dict[str, Any]]:
        """A policy without a world model, and what the logs say of it: `clone`, its steps and how well it
        knows commands, those that it was trained on and held-out ones; of vpt `idm`, too, how good its labels
        are (`inverse_error`, `clone_error`).
        """
        from d4_core.baselines import clone_error, inverse_error
        from d4_core.checkpoint import exists, load_config

        trainer, extra, folder = self._trainer(kind), {}, self.args.run / kind
        if kind == "vpt":
            policy, inverse = trainer.vpt()
            extra["idm"] = inverse_error(inverse, self.logs, self.held_out)
        elif kind == "bc_scratch":
            policy = trainer.clone()
        elif self.args.scratch_steps is None and exists(folder):
            policy = trainer.load(kind)
        else:
            policy = trainer.early(self.held_out)
        share = trainer.scratch.relevant_return
        known = {
            name: clone_error(policy, self.logs, episodes, share)
            for name, episodes in (("train", self.train), ("held_out", self.held_out))
        }
        steps = int(load_config(folder)["total_steps"])
        return policy, extra | {"clone": {"steps": steps, **known}}

    def _models(self, phase: str) -> Models:
        from d4_core.models import load
        from d4_core.pipeline import pick_device

        return load(self.args.run / phase, self.logs.contract, pick_device(self.args.device))

    def _trainer(self, name: str) -> BaselineTrainer:
        """Trains or loads a baseline without a world model."""
        from d4_core import checkpoint
        from d4_core.clone import trainer

        args, given = self.args, self.args.scratch_steps
        folders = [args.run / each for each in (("vpt", "vpt_idm") if name == "vpt" else (name,))]
        there = [folder for folder in folders if checkpoint.exists(folder)]
        if given is None and there:
            steps = int(checkpoint.load_config(there[0])["total_steps"])
            if args.scale != 1.0:
                print(f"  {name} is there, of {steps} steps: --scale counts with --scratch-steps", flush=True)
        else:
            steps = max(1, round((SCRATCH_STEPS if given is None else given) * args.scale))
        return trainer(self.args.run, self.logs, self.train, steps)

    # -- gates -----------------------------------------------------------------------------------------------

    def gates(self) -> list[str]:
        """Measure and record the gates that need the simulator; returns what those that failed say.

        They are about the sampling policies, in the world as it was recorded.
        """
        if self.args.disturb:
            return []
        from d4_core.gates import Gate, record

        rows, done = self.result["policies"], []
        fresh = set(self._own)
        if "wm_bc" in fresh:
            correlation = rows["wm_bc"]["reward_correlation"]
            gates = [Gate("reward correlation on real episodes", correlation, ">=", 0.8,
                          "the reward head cannot be trusted off the logged states: train phase 2 longer",
                          {"bias": rows["wm_bc"]["reward_bias"]})]  # fmt: skip
            if "data" in rows:
                bc, data = (float(np.mean(rows[k]["return"])) for k in ("wm_bc", "data"))
                gates.append(Gate("cloned policy / data mean return", bc / max(data, 1e-9), ">=", 1.0,
                                  "cloning is worse than the logs: train phase 2 longer, label more episodes",
                                  {"wm_bc": bc, "data": data}))  # fmt: skip
            record(self.args.run, "agent", gates, merge=True)
            done += gates
        if "imagination" in fresh:
            gates = self._imagination_gates()
            record(self.args.run, "imagination", gates, merge=True)
            done += gates
        for gate in done:
            print(f"  {gate}", flush=True)
        return [str(g) for g in done if not g.ok]

    def _imagination_gates(self) -> list:
        from d4_core.checkpoint import load_config
        from d4_core.gates import Gate
        from d4_core.stats import paired_difference

        rows, clone = self.result["policies"], []
        if "wm_bc" in rows:
            pair = (rows[name]["return"] for name in ("imagination", "wm_bc"))
            mean, low, high = paired_difference(*pair)
            clone = [Gate("gain over the cloned policy, low end of the interval", low, ">", 0.0,
                          "practice has not helped, or there are too few episodes to tell: --episodes, "
                          "then python -m d4_sim.ladder", {"mean": mean, "high": high})]  # fmt: skip
        metrics = load_config(self.args.run / "imagination")["metrics"]
        ticks = rows["imagination"]["first_ticks"]
        imagined, real = (float(np.mean(ticks[kind])) for kind in ("imagined", "real"))
        gap = abs(imagined - real) / max(abs(real), 1e-6)
        return [
            Gate("KL to the cloned policy (nats)", float(metrics["kl"]), "<=", 3.0,
                 "the policy has left its prior: raise beta or train for fewer steps"),
            Gate("event density (rollouts with reward > 0.5)", float(metrics["event_density"]), ">=", 0.05,
                 "imagined rollouts hardly ever see a reward: lengthen the horizon"),
            Gate("imagined against real return, relative gap", gap, "<=", 0.5,
                 "the policy exploits the model: more data, a shorter horizon or a larger beta",
                 {"imagined": imagined, "real": real}),
            *clone,
        ]  # fmt: skip

    # -- output ----------------------------------------------------------------------------------------------

    def _film(self, name: str, batch: EpisodeBatch) -> None:
        """Video of the best and the worst episodes."""
        from d4_sim.film import film_again

        seeds = self.seeds[: len(batch.length)]
        name = f"{name}-{self._slug}" if self.args.disturb else name
        film_again(self.args.run / "media", name, self.world, seeds, batch, self.logs.contract.rate_hz)

    def write(self) -> None:
        """The file, with what others have added to it meanwhile. What is there on other
        starts makes room.
        """
        path = self.path
        with locks.held(path.with_name(f".{path.name}.lock")):
            self.result = self._open()
            self.result["policies"] |= self._own
            there = whole.read_json(path, dict) or self.result
            with whole.aside(path) as new:
                new.write_text(json.dumps(self.result))
                if (other := beside(path, there)) != (own := beside(path, self.result)):
                    os.replace(path, other)
                    print(f"results on other starts are kept in {other}", flush=True)
            own.unlink(missing_ok=True)


def beside(path: Path, result: Mapping[str, Any]) -> Path:
    """Where results are kept that do not have the starts of those in the file `path`."""
    world = re.sub(r"[^\w.=-]", "-", str(result.get("world", "world")))  # it may have the path of a report
    first, last = result.get("seeds", (0, 0))
    return path.with_name(f"{path.stem}{ASIDE}{world}.{first}-{last}{path.suffix}")


if __name__ == "__main__":
    main()
