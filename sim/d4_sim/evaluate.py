"""``d4-eval``: policies in the real simulator on shared starts, and the gates that need a real world."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from d4_core import threads
from d4_datasets.errors import UserError, run_cli

if TYPE_CHECKING:
    from d4_core.models import Models
    from d4_datasets.windows import Windows
    from d4_sim.vector import EpisodeBatch

PolicyName = Literal["random", "data", "bc_scratch", "wm_bc", "imagination", "expert"]
POLICIES: tuple[PolicyName, ...] = ("random", "data", "bc_scratch", "wm_bc", "imagination", "expert")
EVAL_SEED = 1_000_000  # recorded episodes have hashed 63-bit seeds, so these starts are new


@dataclass(kw_only=True)
class EvalArgs:
    """Run policies in the simulator on the same start states and write eval.json."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of d4-train."""
    dataset: Path
    """Dataset that the run was trained on (data mean, training of the from-scratch baseline)."""
    policies: tuple[PolicyName, ...] = POLICIES
    """What to evaluate; results of other policies in eval.json are kept."""
    episodes: int = 100
    """Episodes per policy."""
    seed: int = 0
    """Decides the start states and all sampling."""
    scratch_steps: int = 1500
    """Training steps of the from-scratch baseline."""
    scale: float = 1.0
    """Multiplies the baseline's training steps."""
    device: str = "auto"
    """auto, cpu or cuda."""
    argmax: bool = False
    """Take the most likely action instead of sampling."""
    force: bool = False
    """Go on although a gate failed."""


def main() -> None:
    """Entry point of ``d4-eval``."""
    run_cli(_main)


def _main() -> None:
    args = tyro.cli(EvalArgs, prog="d4-eval")
    threads.configure()
    from d4_core.report import write_report

    evaluation = Evaluation(args)
    for name in args.policies:
        evaluation.policy(name)
        evaluation.write()  # an interruption costs the policy that is driving, no other
    failed = evaluation.gates()
    evaluation.write()
    if failed and not args.force:
        raise UserError(f"{len(failed)} gate(s) failed, --force goes on: " + "; ".join(failed))
    report = write_report(args.run)
    print(f"results: {args.run / 'eval.json'} and {report}")


class Evaluation:
    """Shared starts, loaded models and the growing result."""

    def __init__(self, args: EvalArgs) -> None:
        from d4_datasets.windows import Windows
        from d4_sim.world import make_world

        self.args = args
        self.logs: Windows = Windows(args.dataset)
        self.world = self.logs.contract.name
        world = make_world(self.world)
        self.horizon, self.success_reward = world.horizon, world.success_reward
        self.seeds = EVAL_SEED + 10_000 * args.seed + np.arange(args.episodes)
        num_tasks = max(1, len(self.logs.contract.task_names))
        self.tasks = np.arange(args.episodes) % num_tasks
        path = args.run / "eval.json"
        self.result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        shared = {
            "world": self.world,
            "episodes": args.episodes,
            "seeds": [int(self.seeds[0]), int(self.seeds[-1])],
        }
        if {k: self.result.get(k) for k in shared} != shared:
            self.result = {
                **shared,
                "tasks": self.tasks.tolist(),
                "task_names": list(self.logs.contract.task_names),
                "policies": {},
            }
        self.checks: dict[str, list] = {}

    # -- policies --------------------------------------------------------------------------------------------

    def policy(self, name: str) -> None:
        """Evaluate one policy and keep its episodes."""
        began = time.perf_counter()
        if name == "data":
            row = self._data()
        else:
            row = self._episodes(name)
        row["seconds"] = time.perf_counter() - began
        self.result["policies"][name] = row
        returns, success = np.array(row["return"]), np.array(row["success"])
        cost = f"({len(returns)} episodes, {row['seconds']:.0f} s)"
        print(f"  {name:12} return {returns.mean():6.2f}  success {success.mean():.2f}  {cost}", flush=True)

    def _data(self) -> dict[str, Any]:
        """Own-task returns of the logged episodes."""
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
        from d4_sim.vector import run_episodes

        session = self._session(name)
        recorder = Recorder(session)
        keep = name in ("wm_bc", "imagination", "expert", "bc_scratch")
        batch = run_episodes(
            self.world, self.seeds.tolist(), self.tasks.tolist(), recorder, self.horizon, keep_frames=keep
        )
        if batch.frames is not None:
            self._film(name, batch)
        row = {
            "return": batch.returns.tolist(),
            "success": batch.success.astype(int).tolist(),
            "fallen": batch.terminal.any(1).astype(int).tolist(),
            "task": self.tasks.tolist(),
        }
        if recorder.rewards:
            row |= self._calibration(recorder, batch)
        return row

    def _session(self, name: str) -> Any:
        from d4_core.session import PolicySession, RandomSession, ScratchSession
        from d4_sim.driver import ScriptedPolicy

        contract, seed, n = self.logs.contract, self.args.seed, self.args.episodes
        if name == "random":
            return RandomSession(contract.action_low, contract.action_high, seed)
        if name == "expert":
            return ScriptedPolicy("expert", seed)
        if name == "bc_scratch":
            return ScratchSession(self._scratch(), seed)
        phase = "agent" if name == "wm_bc" else "imagination"
        return PolicySession(self._models(phase), n, seed, argmax=self.args.argmax)

    def _models(self, phase: str) -> Models:
        from d4_core.models import load
        from d4_core.pipeline import pick_device

        return load(self.args.run / phase, self.logs.contract, pick_device(self.args.device))

    def _scratch(self) -> Any:
        """Train the from-scratch baseline, or load it."""
        from d4_core.baselines import ScratchPhase, ScratchPolicy, ScratchTraining
        from d4_core.config import action_parts
        from d4_core.loop import train
        from d4_core.optim import OptimConfig
        from d4_core.phase import freeze

        contract = self.logs.contract
        size, num_tasks = contract.images[0].size, max(1, len(contract.task_names))
        assert size is not None
        cfg = ScratchTraining(steps=max(1, round(self.args.scratch_steps * self.args.scale)))
        policy = ScratchPolicy(action_parts(contract), 15, num_tasks, size, cfg.frames)
        phase = ScratchPhase(cfg, policy, self.logs, self.logs.split()[0])
        optim = OptimConfig(lr=1e-3, weight_decay=0.05)
        train(phase, self.args.run, seed=self.args.seed, optim=optim, contract=contract,
              config={"phase": "bc_scratch", "steps": cfg.steps})  # fmt: skip
        return freeze(policy)

    # -- calibration and gates -------------------------------------------------------------------------------

    def _calibration(self, recorder: Recorder, batch: EpisodeBatch) -> dict[str, Any]:
        """Reward head against the real rewards of the same frames."""
        predicted = np.stack(recorder.rewards, 1)  # (N, T): at frames 0..T-1
        own = np.take_along_axis(batch.reward, self.tasks[:, None, None], 2)[..., 0][:, : predicted.shape[1]]
        alive = np.arange(predicted.shape[1]) < batch.length[:, None]
        alive[:, 0] = False
        x, y = predicted[alive], own[alive]
        is_defined = len(x) > 2 and min(x.std(), y.std()) > 1e-6
        correlation = float(np.corrcoef(x, y)[0, 1]) if is_defined else float("nan")
        return {"reward_correlation": correlation, "reward_bias": float((x - y).mean())}

    def gates(self) -> list[str]:
        """Measure and record the gates that need the simulator; returns what those that failed say."""
        from d4_core.gates import Gate, record

        rows, done = self.result["policies"], []
        fresh = set(self.args.policies)
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
        from d4_sim.dream import imagined_and_real

        metrics = load_config(self.args.run / "imagination")["metrics"]
        imagined, real = imagined_and_real(
            self._models("imagination"), self.world, self.seeds, self.tasks, self.args.seed
        )
        self.result["imagined"] = {"imagined": imagined.tolist(), "real": real.tolist()}
        gap = abs(imagined.mean() - real.mean()) / max(abs(real.mean()), 1e-6)
        return [
            Gate("KL to the cloned policy (nats)", float(metrics["kl"]), "<=", 3.0,
                 "the policy has left its prior: raise beta or train for fewer steps"),
            Gate("event density (rollouts with reward > 0.5)", float(metrics["event_density"]), ">=", 0.05,
                 "imagined rollouts hardly ever see a reward: lengthen the horizon"),
            Gate("imagined against real return, relative gap", float(gap), "<=", 0.5,
                 "the policy exploits the model: more data, a shorter horizon or a larger beta",
                 {"imagined": float(imagined.mean()), "real": float(real.mean())}),
        ]  # fmt: skip

    # -- output ----------------------------------------------------------------------------------------------

    def _film(self, name: str, batch: EpisodeBatch) -> None:
        """Video of the best and the worst two episodes."""
        from d4_sim.film import write_film

        write_film(self.args.run / "media", name, batch)

    def write(self) -> None:
        """eval.json, aside and renamed."""
        path = self.args.run / "eval.json"
        aside = path.with_name(f".tmp-{os.getpid()}-eval.json")
        aside.write_text(json.dumps(self.result))
        os.replace(aside, path)


class Recorder:
    """Passes a session through and keeps the rewards that it predicted."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.rewards: list[np.ndarray] = []
        if hasattr(session, "bind"):
            self.bind = session.bind

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Start n episodes."""
        self.session.reset(n, tasks)

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """The session's actions."""
        action = self.session.act(images, vectors, alive)
        if hasattr(self.session, "predicted_reward"):
            self.rewards.append(self.session.predicted_reward.cpu().numpy().copy())
        return action


if __name__ == "__main__":
    main()
