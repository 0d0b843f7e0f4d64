"""``d4-eval``: policies in the real simulator on shared starts, and the gates that need a real world."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import tyro

from d4_core import threads
from d4_datasets.errors import UserError, run_cli

if TYPE_CHECKING:
    from d4_core.baselines import BaselineTrainer
    from d4_core.models import Models
    from d4_sim.vector import EpisodeBatch

PolicyName = Literal["random", "data", "bc_scratch", "vpt", "wm_bc", "planner", "imagination", "expert"]
POLICIES: tuple[PolicyName, ...] = ("random", "data", "bc_scratch", "wm_bc", "imagination", "expert")
# the checkpoint that each learned policy acts with
FOLDERS = {
    "bc_scratch": "bc_scratch", "vpt": "vpt", "wm_bc": "agent", "planner": "agent",
    "imagination": "imagination", "bc_scratch_argmax": "bc_scratch", "vpt_argmax": "vpt",
    "wm_bc_argmax": "agent", "imagination_argmax": "imagination",
}  # fmt: skip
SAMPLING = ("bc_scratch", "vpt", "wm_bc", "imagination")  # policies that sample unless told otherwise
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
    """Dataset that the run was trained on (data mean, training of bc_scratch and vpt)."""
    policies: tuple[PolicyName, ...] = POLICIES
    """What to evaluate; results of other policies in eval.json are kept while their weights are in force."""
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
    scratch_steps: int = 1500
    """Training steps of a policy without a world model, and of vpt's inverse dynamics model."""
    scale: float = 1.0
    """Multiplies these training steps."""
    device: str = "auto"
    """auto, cpu or cuda."""
    argmax: bool = False
    """Learned policies take their likeliest action; kept beside the samples, as <policy>_argmax."""
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
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        shared = {
            "world": self.world,
            "episodes": self.args.episodes,
            "seeds": [int(self.seeds[0]), int(self.seeds[-1])],
        }
        if {k: result.get(k) for k in shared} != shared:
            names = list(contract.task_names)
            return {**shared, "tasks": self.tasks.tolist(), "task_names": names, "policies": {}}
        rows = result["policies"].items()
        result["policies"] = {k: row for k, row in rows if row.get("weights") == self._weights(k)}
        return result

    def _weights(self, name: str) -> str | None:
        """Hash of the checkpoint that a policy acts with; None for one that was not learned, or not yet."""
        from d4_core import checkpoint
        from d4_core.models import weights_hash

        folder = self.args.run / FOLDERS.get(name, "")
        return weights_hash(folder) if name in FOLDERS and checkpoint.exists(folder) else None

    # -- policies --------------------------------------------------------------------------------------------

    def policy(self, policy: str) -> None:
        """Evaluate one policy and keep its episodes."""
        began, name = time.perf_counter(), policy
        if self.args.argmax and policy in SAMPLING:
            name += "_argmax"
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
        """Own-task returns of the logged episodes.

        Events may lie in any piece of a long recording that was cut, so that pieces tell little about whole
        episodes: where tasks are events, those who made the logs drive again instead, on the shared starts.
        """
        logs = self.logs
        first, last = logs.episode_start, logs.episode_start + logs.episode_length - 1
        column = np.minimum(logs.task_index, logs.reward.shape[1] - 1)
        own = np.take_along_axis(logs.reward, column[:, None], 1)[:, 0].copy()
        own[first] = 0.0  # no action earned frame 0
        task = logs.task_index[first]
        return {
            "return": np.add.reduceat(own, first).tolist(),
            "success": (own[last] >= self.success_reward).astype(int).tolist(),
            "task": task.tolist(),
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
        if kind == "bc_scratch":
            return ScratchSession(self._trainer().clone(), seed, argmax), {}
        if kind == "vpt":
            from d4_core.baselines import inverse_error

            policy, inverse = self._trainer().vpt()
            return ScratchSession(policy, seed, argmax), {
                "idm": inverse_error(inverse, self.logs, self.held_out)
            }
        if name == "planner":
            session = PlannerSession(self._models("agent"), n, seed)
            return session, {"planner": asdict(session.cfg)}
        return PolicySession(self._models(FOLDERS[name]), n, seed, argmax=argmax), {}

    def _models(self, phase: str) -> Models:
        from d4_core.models import load
        from d4_core.pipeline import pick_device

        return load(self.args.run / phase, self.logs.contract, pick_device(self.args.device))

    def _trainer(self) -> BaselineTrainer:
        """Trains or loads the baselines without a world model."""
        from d4_core.clone import trainer

        steps = max(1, round(self.args.scratch_steps * self.args.scale))
        return trainer(self.args.run, self.args.dataset, self.logs, self.train, steps)

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
        """Video of the best and the worst two episodes."""
        from d4_sim.film import film_again

        seeds = self.seeds[: len(batch.length)]
        name = f"{name}-{self._slug}" if self.args.disturb else name
        film_again(self.args.run / "media", name, self.world, seeds, batch, self.logs.contract.rate_hz)

    def write(self) -> None:
        """The file, aside and renamed, with what others have added to it meanwhile."""
        self.result = self._open()
        self.result["policies"] |= self._own
        path = self.path
        aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        aside.write_text(json.dumps(self.result))
        os.replace(aside, path)


if __name__ == "__main__":
    main()
