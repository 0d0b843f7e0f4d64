"""Which version of a game was played is in the results: two versions are not the same game."""

from __future__ import annotations

from pathlib import Path

import fake_game

from d4_datasets.contract import Contract
from d4_sim.minecraft import benchmark, game
from d4_sim.minecraft.policies import load_policy
from d4_sim.minecraft.results import Results, table, versions

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "minecraft.yaml"
ABOUT = {"seed": 0, "policy": "random", "minutes": 1, "ticks": 5, "prompts": "none", "repeats": 2}


def play(out: Path, numbers: list[int]) -> list[str]:
    lines: list[str] = []
    plan = benchmark.Plan(engine=fake_game.ENGINE, options={}, rungs=fake_game.ENGINE.ladder, ticks=5)
    policy = load_policy("random", 1, "cpu", Contract.load(EXAMPLE))
    benchmark.Benchmark(plan, policy, Results(out, ABOUT), lines.append).play(numbers, 1)
    return lines


def test_episodes_of_another_version_are_said(tmp_path, monkeypatch) -> None:
    """A folder took episodes of two releases of a game without a word."""
    monkeypatch.setitem(game._ENGINES, "fake", "fake_game:ENGINE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert not any("warning" in line for line in play(tmp_path, [0]))
    assert not any("warning" in line for line in play(tmp_path, [1]))
    path = tmp_path / "episodes.jsonl"
    path.write_text(path.read_text().replace("Fake 1.0", "Fake 0.9"))
    said = [line for line in play(tmp_path, [2, 3]) if "warning" in line]
    assert said == ["warning: played in Fake 0.9 so far, and this is Fake 1.0"]
    episodes = Results(tmp_path, ABOUT).episodes()
    assert versions(episodes) == {"Fake 0.9": 2, "Fake 1.0": 2}
    text = table(fake_game.ENGINE, ABOUT, episodes)
    assert "Played in Fake 0.9 (2 episodes), Fake 1.0 (2 episodes)." in text
