"""Warnings: one thing at most every few seconds, from any number of senders, in bounded memory."""

import pytest

from d4_nodes.complaints import Complaints


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, to be changed."""
    time = [100.0]
    monkeypatch.setattr("d4_nodes.complaints.time.monotonic", lambda: time[0])
    return time


def test_a_running_count_makes_no_flood(now) -> None:
    """Every missed deadline was news, as its number was."""
    said: list[str] = []
    complain = Complaints(said.append, 5.0)
    for number in range(60):
        complain(f"/eye: deadline missed {number} times")
        now[0] += 0.1
    first, second = said
    assert first == "/eye: deadline missed 0 times"
    assert second == "/eye: deadline missed 51 times (and 50 times in between)"


def test_numbers_of_names_and_kinds_of_trouble_are_told_apart(now) -> None:
    said: list[str] = []
    complain = Complaints(said.append)
    topics = "/eye_1", "/eye_2", "/arm/1/eye", "/arm/2/eye", "/robot1/front_camera/color/image_raw/compressed"
    events = "deadline missed 3 times", "a publisher shows no life any more, 0 left"
    texts = [f"{topic}: {event}" for topic in topics for event in events]
    for text in texts * 3:
        complain(text)
    assert said == texts


def test_a_jump_back_is_other_news_than_one_ahead(now) -> None:
    said: list[str] = []
    complain = Complaints(said.append, 1.0)
    for seconds in (-30.0, 60.0, -29.9):
        complain(f"the clock jumped by {seconds} s")
    assert said == ["the clock jumped by -30.0 s", "the clock jumped by 60.0 s"]


def test_what_was_said_is_forgotten(now) -> None:
    """It was kept for the life of the node."""
    said: list[str] = []
    complain = Complaints(said.append)
    for number in range(10_000):
        complain(f"a picture named p{number}")
    assert len(said) == 10_000
    assert len(complain._said) == 100
    complain("a picture named p9999")
    assert len(said) == 10_000
