"""Episodes whose environment never begins: they end neither themselves nor the benchmark for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import stubborn_game

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft import benchmark, cli, game
from d4_sim.minecraft.episode import world_seed
from d4_sim.minecraft.policies import load_policy
from d4_sim.minecraft.results import Results, read_episodes

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "minecraft.yaml"


@pytest.fixture(autouse=True)
def stubborn(monkeypatch):
    monkeypatch.setitem(game._ENGINES, "stubborn", "stubborn_game:ENGINE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def contract(tmp_path) -> Path:
    spec = Contract.load(EXAMPLE).to_dict()
    spec["observations"][0]["size"] = [16, 24]
    path = tmp_path / "small.yaml"
    path.write_text(Contract.from_dict(spec).to_yaml())
    return path


def bad(*numbers: int) -> str:
    return ",".join(str(world_seed(0, number)) for number in numbers)


def play(out: Path, contract: Path, numbers, jobs: int, options: dict[str, str], repeats: int = 2) -> list:
    lines: list[str] = []
    engine = stubborn_game.ENGINE
    plan = benchmark.Plan(engine=engine, options=options, rungs=engine.ladder, ticks=20, repeats=repeats)
    policy = load_policy("random", jobs, "cpu", Contract.load(contract))
    results = Results(out, {"seed": 0})
    benchmark.Benchmark(plan, policy, results, lines.append).play(numbers, jobs)
    return [results.episodes(), lines]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_world_that_never_emerges_counts_as_one_without_milestones(tmp_path, contract, jobs) -> None:
    """It was tried without limit while any other environment gave answers, and then ended the benchmark."""
    found, lines = play(tmp_path / "out", contract, range(4), jobs, {"bad": bad(1)})
    assert [(e["episode"], e["ticks"], e["cut"]) for e in found] == [
        (0, 20, False), (1, 0, True), (2, 20, False), (3, 20, False),
    ]  # fmt: skip
    assert (found[1]["crashes"], found[1]["reached"], found[1]["ended"]) == (3, {}, "lost")
    assert sum("does not start" in line for line in lines) == 2
    assert (tmp_path / "out" / "events" / "000001.jsonl").exists()


def test_bad_worlds_that_are_left_over_do_not_fail_again_and_again(tmp_path, contract) -> None:
    """Others began in an earlier run, so it is these worlds and not the game."""
    play(tmp_path / "out", contract, range(1), 1, {})
    found, _ = play(tmp_path / "out", contract, [1, 2], 1, {"bad": bad(1, 2)})
    assert [(e["episode"], e["cut"]) for e in found] == [(0, False), (1, True), (2, True)]


def test_what_never_began_is_begun_when_the_benchmark_goes_on(tmp_path, contract) -> None:
    """Episodes lost to a display that had gone stayed failures of the policy for ever."""
    out = tmp_path / "out"
    args = {"checkpoint": "random", "engine": "stubborn", "contract": contract, "out": out, "minutes": 0.02}
    assert cli.Benchmark(episodes=3, set=(f"bad={bad(1, 2)}",), **args).run() == 0
    assert [(e["ticks"], e["cut"]) for e in read_episodes(out)] == [(24, False), (0, True), (0, True)]
    text = (out / "benchmark.json").read_text().replace(bad(1, 2), "")
    (out / "benchmark.json").write_text(text)  # as if the display had come back, with the same options
    assert cli.Benchmark(episodes=3, set=("bad=",), **args).run() == 0
    assert [(e["episode"], e["ticks"], e["cut"]) for e in read_episodes(out)] == [
        (0, 24, False), (1, 24, False), (2, 24, False),
    ]  # fmt: skip


def test_a_first_world_that_never_emerges_is_not_the_game(tmp_path, contract) -> None:
    """Whether it is the game shows when other episodes are tried, also without repetitions."""
    found, _ = play(tmp_path / "out", contract, range(2), 1, {"bad": bad(0)}, repeats=0)
    assert [(e["episode"], e["cut"]) for e in found] == [(0, True), (1, False)]


def test_a_game_that_stops_working_records_nothing(tmp_path, contract) -> None:
    """Ten episodes in a row that do not begin are not ten bad worlds."""
    play(tmp_path / "out", contract, range(1), 1, {})
    with pytest.raises(UserError, match=r"does not start: .* \(10 times\)"):
        play(tmp_path / "out", contract, range(1, 30), 1, {"bad": "all"})
    assert len(Results(tmp_path / "out", {"seed": 0}).episodes()) == 1


def test_a_game_that_is_gone_when_a_benchmark_goes_on_records_nothing(tmp_path, contract) -> None:
    """Its sentence was taken for lost environments, and those for zeros: others had been played before."""
    play(tmp_path / "out", contract, range(1), 1, {})
    with pytest.raises(UserError, match="this game was uninstalled"):
        play(tmp_path / "out", contract, range(1, 5), 1, {"bad": "gone"})
    assert len(Results(tmp_path / "out", {"seed": 0}).episodes()) == 1


def test_what_is_finished_has_a_table_when_the_benchmark_fails(tmp_path, contract, monkeypatch) -> None:
    out = tmp_path / "out"
    args = {"checkpoint": "random", "engine": "stubborn", "contract": contract, "out": out, "minutes": 0.02}
    args |= {"set": (f"bad={bad(*range(1, 30))}",)}
    assert cli.Benchmark(episodes=1, **args).run() == 0
    (out / "table.md").unlink()
    with pytest.raises(UserError, match="does not start"):
        cli.Benchmark(episodes=30, **args).run()
    assert "1 episode of random" in (out / "table.md").read_text()
