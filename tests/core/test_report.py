"""The report: everything a run folder can hold, nothing at all, and what lies between."""

import json
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from d4_core.report import improvement, results, summary_table, verdict, write_report
from d4_datasets import pictures
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

CONTRACT = {
    "name": "yard",
    "rate_hz": 10,
    "latency_ms": 40,
    "observations": [
        {
            "name": "overhead",
            "topic": "/image",
            "type": "sensor_msgs/msg/Image",
            "size": [64, 64],
            "align": {"strategy": "hold", "timeline": "header", "tolerance_ms": 150},
        },
        {
            "name": "pose",
            "topic": "/pose",
            "type": "geometry_msgs/msg/PoseStamped",
            "select": ["pose.position.x", "pose.position.y"],
            "units": ["m", "m"],
            "role": "probe",
            "align": {"strategy": "hold", "timeline": "header", "tolerance_ms": 150},
        },
    ],
    "actions": [
        {
            "name": "base",
            "topic": "/cmd_vel",
            "type": "geometry_msgs/msg/Twist",
            "select": ["linear.x"],
            "units": ["m/s"],
            "low": [-1.0],
            "high": [1.0],
            "max_rate": [30.0],
            "safety": "zeros",
            "align": {"strategy": "hold", "timeline": "receive", "tolerance_ms": 250},
        }
    ],
}

LOSSES = {  # name: (first, last) value of the curves of each phase
    "tokenizer": {
        "loss": (1.0, 0.92),
        "pixels": (0.09, 0.0011),
        "saturation": (0.002, 0.03),
        "grad_norm": (2.1, 0.3),
    },
    "dynamics": {
        "loss": (1.0, 0.95),
        "dynamics": (0.4, 0.03),
        "flow_mse": (0.5, 0.06),
        "grad_norm": (1.5, 0.2),
    },
    "agent": {"loss": (4.0, 3.1), "policy": (4.1, 2.2), "reward": (2.9, 0.31), "bc_nats": (4.2, 2.3)},
    "bc_scratch": {"policy": (4.3, 2.9)},
    "imagination": {
        "policy": (0.02, -0.4),
        "kl": (0.0001, 0.09),
        "imagined_return": (0.7, 2.1),
        "value": (0.1, 2.0),
    },
}


def _gate(name, value, op, limit, ok, hint="", **detail):
    return {"name": name, "value": value, "limit": limit, "op": op, "ok": ok, "hint": hint, "detail": detail}


GATES = {
    "tokenizer": [
        _gate(
            "psnr_db",
            27.4,
            ">=",
            24.0,
            True,
            "train longer or raise num_latents",
            per_camera={"overhead": 27.41},
        ),
        _gate(
            "probe_error_m",
            0.031,
            "<=",
            0.06,
            True,
            "raise motion_weight so that the robot is drawn",
            frames=512,
        ),
        _gate("latent_cosine", 0.21, "<=", 0.9, True),
    ],
    "dynamics": [
        _gate(
            "beats_copy_last_8",
            0.46,
            "<=",
            0.8,
            True,
            "more data, or more steps",
            ratio=[0.91, 0.62, 0.46, 0.4317],
        ),
        _gate("action_shuffle_ratio", 1.31, ">=", 1.1, True, "add labelled recordings"),
        _gate(
            "mirror_over_noise",
            0.94,
            ">",
            1.0,
            False,
            "actions change the dream less than chance does: train on",
        ),
    ],
    "agent": [
        _gate("reward_correlation", 0.93, ">=", 0.8, True),
        _gate("bc_nats_heldout", 2.41, "<=", 3.2, True),
    ],
}


def _frames(count: int, seed: int) -> np.ndarray:
    """A disc that drives around between two pads, uint8 [count, 64, 64, 3]."""
    y, x = np.mgrid[:64, :64]
    frames = np.full((count, 64, 64, 3), (196, 190, 178), np.uint8)
    frames[:, (y - 16) ** 2 + (x - 14) ** 2 < 60] = (200, 60, 50)
    frames[:, (y - 46) ** 2 + (x - 50) ** 2 < 60] = (60, 90, 200)
    for t in range(count):
        cx, cy = 32 + 18 * np.cos(0.2 * t + seed), 32 + 18 * np.sin(0.27 * t + seed)
        frames[t][(y - cy) ** 2 + (x - cx) ** 2 < 26] = (240, 200, 40)
    return frames


def _write_metrics(run: Path, rng: np.random.Generator) -> None:
    lines = []
    for phase, curves in LOSSES.items():
        for step in range(20, 4001, 20):
            part = np.exp(-step / 600)
            noise = rng.normal(0.0, 0.06, len(curves))
            values = {
                name: last + (first - last) * part * (1 + noise[i]) + noise[i] * 0.3 * abs(last)
                for i, (name, (first, last)) in enumerate(curves.items())
            }
            cost = {"frames_per_s": 900 + rng.normal(0, 40), "wait_s": 0.001, "wall_s": step * 0.1}
            lines.append(json.dumps({"phase": phase, "step": step, "time": 1.7e9 + step, **values, **cost}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"phase": "imagin')  # killed while writing


def _write_phases(run: Path, contract: Contract) -> None:
    for number, phase in enumerate(LOSSES):
        folder = run / phase
        folder.mkdir()
        metrics = {
            "wall_s": 410.0 + 150 * number,
            "cpu_s": 780.0 + 280 * number,
            "peak_rss_mb": 1320.5 + number,
        }
        config = {"format": 1, "phase": phase, "step": 4000, "total_steps": 4000, "status": "done", "seed": 0}
        config |= {"contract_hash": contract.hash, "metrics": metrics | {"frames_per_s": 912.3}}
        (folder / "config.json").write_text(json.dumps(config))
        facts = {"commit": "0123456789abcdef0123", "machine": "Some CPU x2", "date": "2025-11-02"}
        rows = [f"| {key} | {value} |" for key, value in facts.items()]
        (folder / "card.md").write_text("\n".join([f"# {phase}", "", "| | |", "|---|---|", *rows, ""]))


def _write_evaluation(run: Path, rng: np.random.Generator) -> None:
    means = {
        "random": 0.12,
        "data": 0.8,
        "bc_scratch": 0.85,
        "wm_bc": 1.25,
        "imagination": 1.9,
        "expert": 2.9,
    }
    start = rng.normal(0, 0.35, 64)
    policies = {}
    task = np.arange(64) % 2
    for name, mean in means.items():
        returns = np.maximum(0.0, mean + start + rng.normal(0, 0.5, 64))
        success = (returns > 1.0).astype(int)
        policies[name] = {"return": returns.tolist(), "success": success.tolist(), "task": task.tolist()}
    real = rng.uniform(0, 2, 40)
    imagined = (real + rng.normal(0.1, 0.2, 40)).tolist()
    policies["imagination"]["first_ticks"] = {"imagined": imagined, "real": real.tolist()}
    evaluation = {"policies": policies, "episodes": 64, "seeds": [100, 163]}
    evaluation["task_names"] = ["reach_red", "reach_blue"]
    (run / "eval.json").write_text(json.dumps(evaluation))


def _write_media(run: Path) -> None:
    media = run / "media"
    media.mkdir()
    h = [1, 2, 4, 8, 16]
    position = {
        "model": [0.05, 0.07, 0.11, 0.19, 0.34], "copy_last": [0.08, 0.15, 0.27, 0.43, 0.6],
        "random": [0.74, 0.73, 0.75, 0.74, 0.74], "reconstruction": [0.03, 0.03, 0.031, 0.03, 0.032],
    }  # fmt: skip
    psnr = {
        "model": [26.1, 25.2, 23.9, 22.3, 20.8], "copy_last": [24.0, 22.4, 21.1, 20.2, 19.5],
        "random": [18.1, 18.0, 18.1, None, 18.1], "reconstruction": [27.4, 27.4, 27.3, 27.4, 27.4],
    }  # fmt: skip
    (media / "open_loop.json").write_text(
        json.dumps({"horizons": h, "probe": "pose", "position": position, "psnr": psnr})
    )
    true, dream = _frames(48, 0), _frames(48, 0)[:, :, ::-1]
    strips = [pictures.Strip(true[:24:2], "camera"), pictures.Strip(dream[:24:2], "dream")]
    pictures.write_png(
        media / "open_loop.png", pictures.contact_sheet(strips, "Held-out episode, every 2nd frame")
    )
    for name in ("dream_red.mp4", "dream_blue.mp4"):
        clip = np.concatenate([true, dream], axis=2).repeat(2, 1).repeat(2, 2)
        (media / name).write_bytes(pictures.mp4_bytes(clip, 10))
    captions = {
        "open_loop.png": "What the camera saw and, below, the dream from four frames and the actions.",
        "dream_red.mp4": "Reality left, dream right <b>task red</b>",
    }
    (media / "captions.json").write_text(json.dumps(captions))


def fake_run(run: Path) -> Path:
    """A finished run as training, gates and evaluation leave it."""
    rng = np.random.default_rng(0)
    contract = Contract.from_dict(CONTRACT)
    run.mkdir(parents=True)
    data = {"dataset": "data/yard", "episodes": 2400, "frames": 96_000, "labelled_share": 0.21}
    config = {"preset": "nano", "seed": 0, "scale": 0.5, **data}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "contract.yaml").write_text(contract.to_yaml())
    (run / "gates.json").write_text(json.dumps(GATES))
    (run / "notes.json").write_text(json.dumps(["LPIPS not used: no weights file given."]))
    _write_metrics(run, rng)
    _write_phases(run, contract)
    _write_evaluation(run, rng)
    _write_media(run)
    return run


class Page(HTMLParser):
    """Visible text and attributes of a page; a tag closed out of order is an error."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.attributes, self._open, self.details = "", [], [], 0
        self.feed(path.read_text())
        assert not self._open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += " " + " ".join(data.split())


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def run(full, tmp_path) -> Path:
    """A copy to damage, with two curves only: charts are what takes time."""
    shutil.copytree(full, tmp_path / "run")
    lines = (full / "metrics.jsonl").read_text().splitlines()[:3]
    keep = ("phase", "step", "pixels")
    kept = [{key: value for key, value in json.loads(line).items() if key in keep} for line in lines]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def page(full) -> Page:
    return Page(write_report(full))


def test_page_loads_nothing_from_elsewhere(full, page):
    text = (full / "report.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "poster")]
    assert links
    assert all(value.startswith(("data:image/png;base64,", "data:video/mp4;base64,", "#")) for value in links)
    assert sum(value.startswith("data:video") for value in links) == 2


def test_head_says_what_was_trained_on_what(page):
    contract = Contract.from_dict(CONTRACT)
    assert (
        "1 of 8 gates failed: dynamics mirror_over_noise (0.94, needs > 1); not evaluated: imagination."
        in page.text
    )
    for fact in (
        "Some CPU x2",
        "2025-11-02",
        "0123456789ab",
        "nano, steps x 0.5",
        "100 to 163",
        contract.hash[:12],
    ):
        assert fact in page.text
    assert "2,400 episodes, 96,000 frames, 2 h 40 min, 21 % of the frames with known actions" in page.text
    assert ("code", "title", contract.hash) in page.attributes


def test_results_gain_and_tasks_are_shown(full, page):
    evaluation = json.loads((full / "eval.json").read_text())
    mean, low, high = results(evaluation)["imagination"].returns
    assert f"{mean:.2f} {low:.2f} to {high:.2f}" in page.text
    mean, low, high = improvement(evaluation)
    assert low > 0
    assert f"{mean:+.2f} return per episode, 95 % interval {low:+.2f} to {high:+.2f}" in page.text
    assert "imagination training made the policy better" in page.text
    success = np.array(evaluation["policies"]["wm_bc"]["success"])
    assert "reach_red" in page.text
    assert f"reach_blue {100 * np.mean(evaluation['policies']['random']['success'][1::2]):.0f} %" in page.text
    assert f"{100 * success[::2].mean():.0f} %" in page.text


def test_gates_have_value_limit_badge_hint_and_folded_details(full, page):
    assert "mirror_over_noise" in page.text
    assert "0.94 > 1 FAILED" in page.text
    assert "27.4 >= 24 OK" in page.text
    assert "raise motion_weight" in page.text
    assert "[0.91, 0.62, 0.46, 0.432]" in page.text
    assert (full / "report.html").read_text().count("<details><summary>") == 4  # folded


def test_curves_costs_dynamics_and_notes_are_there(page):
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert [label for label in labels if label.startswith("Error of pose (m), lower is better")]
    assert [label for label in labels if label.startswith("PSNR (dB)")]
    for curves in LOSSES.values():
        assert set(curves) <= {label.split(" over ")[0] for label in labels}
    assert not [label for label in labels if label.startswith(("wait_s", "wall_s"))]
    assert (
        "9 min 20 s 17 min 40 s 912 1,322 MB" in page.text
    )  # wall, CPU, frames per second and memory of dynamics
    assert "LPIPS not used: no weights file given." in page.text
    assert "dream blue" in page.text  # no caption given: the file's name


def test_text_of_others_is_escaped(page):
    assert "Reality left, dream right <b>task red</b>" in page.text


def test_charts_follow_the_page_and_have_the_identifiers_they_use(full, page):
    text = (full / "report.html").read_text()
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 3 + sum(len(curves) + 1 for curves in LOSSES.values())
    assert not re.findall(r"#0[0-9a-f]{5}\b", "".join(charts))
    for chart in charts:
        assert "var(--s1)" in chart
        used = set(re.findall(r"#(\w+)[\")]", chart))
        assert used <= set(re.findall(r' id="(\w+)"', chart))


def test_report_of_an_empty_folder_says_not_run_everywhere(tmp_path):
    page = Page(write_report(tmp_path))
    assert "No gate was evaluated" in page.text
    assert "Evaluation was not run." in page.text
    assert "Open-loop prediction was not run." in page.text
    assert page.text.count("not run") >= 10
    assert "not recorded" in page.text


PARTS = [
    "config.yaml",
    "contract.yaml",
    "metrics.jsonl",
    "gates.json",
    "eval.json",
    "notes.json",
    "media",
    *LOSSES,
]


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_missing(run, part):
    shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()
    assert run.name in Page(write_report(run)).text
    summary_table(run)


@pytest.mark.parametrize("text", ["{", "[1]", "17", ""])
def test_broken_files_are_named_in_the_notes(run, text):
    names = ["config.yaml", "gates.json", "eval.json", "dynamics/config.json", "media/open_loop.json"]
    for name in names:
        (run / name).write_text(text)
    (run / "contract.yaml").write_text("name: 1")
    page = Page(write_report(run))
    for name in names:
        assert f"{name} could not be read and is left out." in page.text
    assert "contract.yaml" in page.text


def test_unfinished_phase_says_where_it_stopped(run):
    config = json.loads((run / "agent" / "config.json").read_text())
    (run / "agent" / "config.json").write_text(json.dumps(config | {"status": "training", "step": 1200}))
    assert "stopped at step 1,200 of 4,000" in Page(write_report(run)).text


def test_report_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    (tmp_path / "report.html").write_text("yesterday")
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "yesterday" not in Page(tmp_path / "report.html").text


def test_folder_that_is_not_there_is_a_users_mistake(tmp_path):
    for function in (write_report, summary_table):
        with pytest.raises(UserError, match="there is no run folder"):
            function(tmp_path / "nothing")


def test_verdict_is_one_sentence():
    ok = {phase: [_gate("g", 2.0, ">", 1.0, True)] for phase in LOSSES}
    assert verdict(ok) == ("All 4 gates passed (tokenizer, dynamics, agent, imagination).", "ok")
    text, kind = verdict({"tokenizer": ok["tokenizer"]})
    assert text == "The only gate passed (tokenizer); not evaluated: dynamics, agent, imagination."
    assert kind == "unknown"
    four = {"agent": [_gate(name, 0.0, ">", 1.0, False) for name in "abcd"]}
    assert "agent c (0, needs > 1) and 1 more; not evaluated" in verdict(four)[0]
    nan = {"agent": [_gate("bc", float("nan"), "<=", 1.0, False)]}
    assert verdict(nan)[0].startswith("1 of 1 gates failed: agent bc (n/a, needs <= 1)")


def test_gain_needs_the_same_episodes():
    policies = {"wm_bc": {"return": [1.0, 2.0]}, "imagination": {"return": [2.0, 3.0, 4.0]}}
    assert improvement({"policies": policies}) is None
    policies["imagination"]["return"] = [2.0, 3.0]
    assert improvement({"policies": policies}) == (1.0, 1.0, 1.0)


def test_other_policies_are_described_where_they_were_run(run, page):
    assert "inverse dynamics" not in page.text
    evaluation = json.loads((run / "eval.json").read_text())
    policies = evaluation["policies"]
    policies["vpt_argmax"] = policies["planner"] = policies["wm_bc"]
    (run / "eval.json").write_text(json.dumps(evaluation))
    text = Page(write_report(run)).text
    assert "actions that an inverse dynamics model guessed; likeliest actions" in text
    assert "planning in the world model at every tick" in text


def test_policies_that_all_score_the_same_still_draw(tmp_path):
    policies = {name: {"return": [0.0, 0.0]} for name in ("wm_bc", "imagination", "mine")}
    (tmp_path / "eval.json").write_text(json.dumps({"policies": policies}))
    page = Page(write_report(tmp_path))
    assert "mine" in page.text
    assert "no difference can be told from zero" in page.text


def test_summary_table_has_the_same_results(full):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(full))
    text = console.export_text()
    evaluation = json.loads((full / "eval.json").read_text())
    for name, result in results(evaluation).items():
        share = f"{100 * result.success:.0f}"
        assert re.search(rf"{name}\s.*{result.returns[0]:.2f}\s.*\s{share}\s%", text)
    assert f"{improvement(evaluation)[0]:+.2f}" in text
    assert "1 of 8 gates failed" in text


def test_style_and_template_lie_beside_the_module():
    for name in ("report_style.css", "report_template.html"):
        assert (resources.files("d4_core") / name).is_file()
