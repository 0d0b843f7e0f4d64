"""The HTML page of an audit: complete, self-contained, and escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import planted
import pytest
import synthetic

from d4_datasets.audit import audit
from d4_datasets.audit_page import page
from d4_datasets.charts import bars, curve, lag_chart
from d4_datasets.windows import Windows


class _Reader(HTMLParser):
    """Collects tags and attributes, and sees to it that tags close in order."""

    VOID = ("meta", "img", "rect", "polyline", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a dataset with one lag and some dark and frozen frames."""
    made = [planted.episode(lag=1, seed=seed) for seed in range(3)]
    made[1].images[5:20] = 0
    made[2].images[50:80] = made[2].images[50]
    root = synthetic.write(tmp_path_factory.mktemp("page") / "<toy>", made, planted.spec())
    return page(audit(root).to_dict(), Windows(root))


def test_the_page_is_whole_and_needs_nothing_else(text: str) -> None:
    reader = _Reader(text)
    assert reader.open == []
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert len(reader.sources) == 2  # contact sheet and faulty frames
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not re.search(r"(https?:)?//(?!w3\.org)", re.sub(r"data:[^\"]*", "", text))
    assert reader.tags.count("svg") >= 8
    assert "nan" not in re.findall(r'(?:x|y|points|width|height)="([^"]*)"', text)


def test_the_page_says_what_was_found(text: str) -> None:
    assert "Nothing forbids training; 2 warnings to look at first." in text
    assert "of the frames are dark" in text
    assert "longest run 30 frames" in text
    assert "best: 1, 90% interval 1 to 1, from" in text
    assert "base.linear.x" in text
    assert "&lt;toy&gt;" in text
    assert "<toy>" not in text


def test_an_empty_dataset_has_a_page_too(tmp_path: Path) -> None:
    found = audit(synthetic.write(tmp_path / "toy", [])).to_dict()
    text = page(found, None)
    assert _Reader(text).open == []
    assert "Training on this would be wrong: 1 error." in text


def test_charts_show_all_values() -> None:
    assert str(bars([1, 0, 3], ("a", "b"), "three")).count("<rect") == 1 + 3
    assert 'aria-label="&lt;x&gt;"' in str(bars([1], ("", ""), "<x>"))
    assert str(bars([], ("", ""), "none")).startswith("<svg")
    points = re.findall(r'points="([^"]*)"', str(curve([0, 5, 10], "line", 0, 10)))[0].split()
    assert [point.split(",")[1] for point in points] == ["88.0", "48.0", "8.0"]
    chart = str(lag_chart({-1: 0.1, 0: 0.2, 1: 0.9}, 1, (0, 1), 0, "lags"))
    assert "expected" in chart
    assert "best 0.90" in chart
    assert [chart.count(f"var(--s{color})") for color in (1, 2, 3)] == [1, 1, 1]
