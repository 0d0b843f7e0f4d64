"""The statistics of a study and its page, on results that are made up here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim import study_figures, study_page
from d4_sim.study_results import collect, differences, gap_closed, policy_table, recovered

LEVEL = {
    "random": 5.0,
    "data": 9.0,
    "bc_scratch": 11.0,
    "vpt": 13.0,
    "wm_bc": 16.0,
    "imagination": 20.0,
    "expert": 27.0,
}


def row(level: float, seed: int, count: int = 60) -> dict[str, Any]:
    starts = np.random.default_rng(0).normal(0, 3, count)  # easy and hard ones, shared by all policies
    returns = level + starts + np.random.default_rng([seed, int(10 * level)]).normal(0, 0.5, count)
    success = (returns > 18).astype(int).tolist()
    return {"return": returns.tolist(), "success": success, "fallen": [0] * count, "kl_to_cloned": 0.5,
            "first_ticks": {"imagined": [level / 4] * count, "real": [level / 4 + 1] * count}}  # fmt: skip


def curves(psnr: float) -> dict[str, Any]:
    flat = {"model": [psnr] * 4, "copy_last": [15.0] * 4}
    return {"horizons": [1, 2, 4, 8], "psnr": flat, "ssim": flat, "position": flat, "frames_per_s": 100.0}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for seed in range(3):
        policies = {name: row(level + 0.1 * seed, seed) for name, level in LEVEL.items()}
        put(tmp_path / f"yard-{seed}" / "run" / "eval.json", {"policies": policies})
    for share, psnr in (("0", 18.0), ("0.1", 21.5), ("1", 22.0)):
        put(tmp_path / f"labels-{share}" / "run" / "open_loop.json", {"by_steps": {"4": curves(psnr)}})
    steps = {"by_steps": {"4": curves(20.0), "64": curves(22.0)}}
    put(tmp_path / "shortcut-with" / "run" / "open_loop.json", steps)
    put(tmp_path / "stages.json", {"yard-0/data": {"done": True, "seconds": 60.0, "forced": True}})
    return tmp_path


def test_what_has_not_been_run_is_left_out(out: Path) -> None:
    results = collect(out)
    assert set(results["chains"]["yard"]) == {"0", "1", "2"}
    assert results["chains"]["arm"] == {}
    assert set(results["runs"]) == {"labels-0", "labels-0.1", "labels-1", "shortcut-with"}
    assert json.loads(json.dumps(results)) == results


def test_pairing_over_seeds_finds_the_gain(out: Path) -> None:
    chains = collect(out)["chains"]["yard"]
    found = differences(chains, "imagination", "wm_bc")
    assert found["both"][0] == pytest.approx(4.0, abs=0.2)
    assert 3.5 < found["both"][1] < found["both"][0] < found["both"][2] < 4.5
    assert found["student"][0] == pytest.approx(found["both"][0])
    assert set(found["seeds"]) == {"0", "1", "2"}
    assert differences(chains, "imagination", "planner") is None
    table = policy_table(chains)
    # episodes of one start vary far more than their differences do
    assert table["wm_bc"]["mean"][2] - table["wm_bc"]["mean"][1] > 2 * (found["both"][2] - found["both"][1])
    closed = gap_closed(chains)
    assert closed["seeds"]["0"] == pytest.approx(4 / 11, abs=0.03)
    mean, low, high = closed["mean"]
    assert mean == pytest.approx(np.mean(list(closed["seeds"].values())))
    assert 0.3 < low < mean < high < 0.42
    assert gap_closed({"0": {"policies": {"wm_bc": row(16.0, 0)}}}) is None


def test_where_the_expert_is_not_ahead_no_gap_is_closed() -> None:
    """A loss in the direction of an expert that is behind the clone held as half a gap closed."""
    levels = {"wm_bc": 20.0, "imagination": 17.0, "expert": 15.0}
    chains = {
        str(s): {"policies": {name: row(level + s, s) for name, level in levels.items()}} for s in range(3)
    }
    (line,) = study_page.gap_claim(chains, 3)
    assert line.startswith("- **open**: imagination closes a third of the gap")
    assert "the expert is not surely ahead of the clone: lower end -" in line


def test_share_of_a_gap() -> None:
    assert recovered({"a": 1.0, "b": 3.0, "c": 2.5}, "c", "a", "b") == 0.75


def test_the_page_says_what_holds_and_what_does_not(out: Path) -> None:
    text, _ = study_page.write(out, "# Title\n")
    assert text.startswith("# Title\n")
    assert "- **holds**: after imagination training is better than cloned on the world model" in text
    assert (
        "- **holds**: imagination closes a third of the gap to the expert, in the mean of the chains (0.36 ["
        in text
    )
    assert "between none and all, 8 frames ahead, on the recording above (0.88)" in text
    assert "| the recording above | 0.88 | 0.88 | 0.88 | 0.88 | - |" in text
    assert "- **does not hold**: K = 4 is within 5 % of K = 64 (PSNR 20.00 and 22.00 dB)" in text
    assert "| **all** | 1:00 |" in text
    assert "| 0 | cloned on the world model | 4.00 | 5.00 |" in text
    assert re.search(r"\| the clone, no steps \| [\d.]+ \| - \| 0.00 \| 0.00 \| 4.00 \| 5.00 \|", text)
    assert "planner" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") > 2 and "nan" not in line for line in tables)
    assert not re.search(r"\| --- \|\n(?!\|)", text)  # a table without a row: world models that drove nothing


def test_what_was_cloned_is_told_from_all_of_the_logs(out: Path) -> None:
    for seed in range(3):
        path = out / f"yard-{seed}" / "run" / "eval.json"
        policies = json.loads(path.read_text())["policies"]
        logs = {"return": [2.0, 7.9, 8.1, 20.0], "success": [0, 0, 0, 1]}  # 0.4 of the best is 8
        put(path, {"policies": policies | {"data": logs}})
    text, results = study_page.write(out, "")
    assert re.search(r"\(what is cloned\) \| 14.05 \[.*\| 14.05 \| 14.05 \| 14.05 \| 0.50 \[", text)
    assert "- **holds**: returns after imagination training are above those of the drives" in text
    assert "cloned_drives" not in results["chains"]["yard"]["0"]["policies"]


def test_seeds_of_imagination_have_an_interval(out: Path) -> None:
    for seed in (1, 2):
        policies = {"imagination": row(20.0 + seed, seed)}
        put(out / f"improve-seed_{seed}" / "run" / "eval.json", {"policies": policies})
    text, _ = study_page.write(out, "")
    interval = r"(\S+) \[(\S+), (\S+)\]"
    found = re.search(rf"Over these 3 seeds: {interval} over seeds and starts, {interval} as a t", text)
    assert found is not None
    mean, low, high, _, least, most = map(float, found.groups())
    assert mean == pytest.approx(5.0, abs=0.2)  # of 4, 5 and 6
    assert least < 3.5 < low < mean < high < 6.5 < most


def test_other_starts_have_a_table_of_their_own(out: Path) -> None:
    for seed in range(3):
        rows = {name: row(LEVEL[name] - 1, seed) for name in ("wm_bc", "imagination", "expert")}
        put(out / f"starts-yard-{seed}" / "run" / "eval.json", {"policies": rows})
    text, _ = study_page.write(out, "# Title\n")
    section = text.split("### yard: other starts, on which nothing was decided, 3 full chains\n")[1]
    assert "| cloned on the world model | 15." in section.split("##")[0]
    assert "- **holds**: imagination closes a third of the gap" in section.split("##")[0]


def test_a_study_in_parts_gives_the_same_page(out: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one machine measured is on the page of the next one, and what is measured anew counts."""
    whole, results = study_page.write(out, "")
    second, first = tmp_path_factory.mktemp("second"), tmp_path_factory.mktemp("first") / "results.json"
    first.write_text(study_page.short(results))
    (out / "yard-1").rename(second / "yard-1")
    text, again = study_page.write(second, "", [first])
    assert text == whole
    assert study_page.short(again) == first.read_text()
    changed = json.loads(first.read_text())
    changed["chains"]["yard"]["1"]["policies"]["expert"]["return"] = [99.0] * 40
    first.write_text(json.dumps(changed))
    assert study_page.write(second, "", [first])[0] == whole
    assert "99.00" in study_page.write(out, "", [first])[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"chains": {}}', '{"chains": 1, "runs": {}, "stages": {}}'])
def test_a_part_that_is_none_is_one_sentence(out: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "part.json").write_text(content)
    with pytest.raises(UserError, match=r"is no results\.json of a study"):
        study_page.write(out, "", [tmp_path / "part.json"])


def test_failed_gates_are_on_the_page(out: Path) -> None:
    def gate(ok: bool) -> dict[str, Any]:
        return {"name": f"loss {ok}", "value": 1.0065, "op": ">=", "limit": 1.2, "ok": ok}

    put(out / "yard-0" / "run" / "gates.json", {"dynamics": [gate(True)]})
    put(out / "looks-first" / "run" / "gates.json", {"dynamics": [gate(True), gate(False)]})
    text, _ = study_page.write(out, "")
    assert "1 of 2 runs failed one" in text
    assert "| looks-first | dynamics | loss False | 1.01 | >= 1.2 |" in text


def test_a_look_is_compared_with_its_own(out: Path) -> None:
    psnr = {"none": (20.0, 20.0), "first": (19.8, 23.0), "both": (22.0, 24.0)}
    for arm, (other, own) in psnr.items():
        for name, value in (("open_loop", other), ("open_loop_own_look", own)):
            put(out / f"looks-{arm}" / "run" / f"{name}.json", {"by_steps": {"4": curves(value)}})
    text, _ = study_page.write(out, "")
    found = [line for line in text.splitlines() if line.startswith("Those of the first look recover")]
    assert found[0].startswith("Those of the first look recover -10% of the PSNR")
    assert found[1].startswith("Those of the first look recover 75% of the PSNR")


def test_what_more_training_gives_is_beside_what_it_cost(out: Path) -> None:
    path = out / "yard-0" / "run"
    for run, cpu in ((path, 100.0), (out / "compute-yard-0" / "run", 640.0)):
        put(run / "bc_scratch" / "config.json", {"metrics": {"cpu_s": cpu}})
    put(out / "compute-yard-0" / "run" / "eval.json", {"policies": {"bc_scratch": row(12.0, 0)}})
    text, _ = study_page.write(out, "")
    assert "| cloned from scratch | 100 |" in text
    assert "| cloned from scratch, 10000 steps | 640 |" in text
    # beside the others in the first table, and compared with the clone on the world model
    assert "| cloned from scratch, 10000 steps | 12." in text
    assert "| cloned on the world model - cloned from scratch, 10000 steps |" in text


def test_the_ladder_is_on_the_page(out: Path) -> None:
    """Its file is a list of rungs, not a table."""
    rung = {"rung": "bandit", "seed": 0, "start": 2.9, "after": 29.99, "optimum": 30.0, "closed": 1.0,
            "seconds": 24.0, "passed": True}  # fmt: skip
    put(out / "ladder.json", [rung, rung | {"rung": "oracle", "passed": False}])
    text, _ = study_page.write(out, "")
    assert "| bandit | 0 | 2.90 | 29.99 | 30.00 | 1.00 | 24.00 | ok |" in text
    assert "FAILED" in text


def test_pictures_come_with_the_page(out: Path, tmp_path: Path) -> None:
    run = out / "yard-1" / "run"
    rows = [{"phase": "imagination", "step": s, "kl": 0.1 * s, "value_mean": 1.0, "imagined_reward": 2.0}
            for s in (1, 20)]  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    media = out / "yard-0" / "run" / "media"
    media.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "mp4"):
        (media / f"real_imagination.{kind}").write_bytes(kind.encode())
    lines = list(study_figures.figures(out, tmp_path / "page", "page"))
    assert [line for line in lines if line.startswith("!")] == [
        "![Imagined reward, value and KL over the steps](page/yard-curves.png)\n",
        "![After imagination training, best and worst episodes (dark: over)](page/yard-imagination.png)\n",
    ]
    assert (tmp_path / "page" / "yard-curves.png").stat().st_size > 1000
    assert any("(page/yard-imagination.mp4)" in line for line in lines)
    for kind in ("png", "mp4"):
        assert (tmp_path / "page" / f"yard-imagination.{kind}").read_bytes() == kind.encode()


def test_a_gain_that_is_not_there_is_not_claimed(out: Path) -> None:
    for seed in range(3):
        path = out / f"yard-{seed}" / "run" / "eval.json"
        policies = json.loads(path.read_text())["policies"]
        put(path, {"policies": policies | {"imagination": row(16.0 + (seed - 1), seed)}})
    text, _ = study_page.write(out, "")
    assert "- **not shown**: after imagination training is better than cloned on the world model" in text
    assert "- **does not hold**: imagination closes a third of the gap" in text


def test_equal_returns_show_nothing(out: Path) -> None:
    """Where nobody ever earns anything, a claim was said not to hold, as if the opposite had been shown."""
    for seed in range(3):
        path = out / f"yard-{seed}" / "run" / "eval.json"
        policies = json.loads(path.read_text())["policies"]
        nothing = row(0.0, seed) | {"return": [0.0] * 60}
        put(path, {"policies": policies | {"imagination": nothing, "wm_bc": nothing}})
    text, _ = study_page.write(out, "")
    claim = "after imagination training is better than cloned on the world model in return"
    assert f"- **not shown**: {claim}" in text


def test_what_is_surely_worse_is_another_word_than_what_cannot_be_told(out: Path) -> None:
    """An interval around 0 was said not to hold, as if the opposite had been shown."""
    for seed in range(3):
        path = out / f"yard-{seed}" / "run" / "eval.json"
        policies = json.loads(path.read_text())["policies"]
        put(path, {"policies": policies | {"imagination": row(9.0, seed)}})
    text, _ = study_page.write(out, "")
    found = (
        "- **does not hold**: after imagination training is better than cloned on the world model in return"
    )
    assert f"{found} (from -" in text


def test_nothing_to_show_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results of a study yet"):
        study_page.write(tmp_path, "")
