"""Mutated recordings through ingest, each in a process of its own with little memory and time.

    .venv/bin/python tests/datasets/fuzz_readers.py --minutes 10 --seed 1 --out /tmp/findings

Whatever comes out must be a dataset that can be read back, or one sentence and nothing on the disk. Anything
else (a traceback, a crash, no end, a gigabyte) is a finding: its input is saved with what happened, once for
every place in the code. Case number N of a seed is always the same: `--case N` runs it alone.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fuzz_samples
import numpy as np
from fuzz_samples import Sample

from d4_datasets.bags import is_bag, read_bag
from d4_datasets.errors import UserError, sentence
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset

MEMORY = 3 << 29  # bytes that a case may take beyond those of this process
SECONDS = 20  # of work, which on a busy machine may take much longer
_WAIT_S = 300
DATASET, SENTENCE, FINDING = "dataset", "sentence", "finding"


# ---- mutations: of bytes, and of text ----

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 62,
            (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_WORDS = (b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"null", b"true", b"[]", b"{}", b'""', b"0",
          b"1e-320", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\0", b"\n", b'"', b"..", b"../" * 9,
          b"/etc/passwd", b"\xf0\x9f\x92\xa3", b"%s%n", b"1_000", b"0x10", b"2024-01-01", b"&a [*a]",
          b"!!python/object:os.system")  # fmt: skip


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _number(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_NUMBERS) % (1 << 8 * size)
    at = rng.randrange(len(data))
    data[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _span(data: bytearray, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(data))
    return begin, min(len(data), begin + rng.choice((1, 4, 16, 100, 4096, 1 << 16)))


def _delete(data: bytearray, rng: random.Random) -> None:
    begin, end = _span(data, rng)
    del data[begin:end]


def _repeat(data: bytearray, rng: random.Random) -> None:
    begin, end = _span(data, rng)
    at = rng.randrange(len(data))
    data[at:at] = data[begin:end] * rng.choice((1, 1, 2, 50))


def _overwrite(data: bytearray, rng: random.Random) -> None:
    begin, end = _span(data, rng)
    data[begin:end] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * (end - begin)


def _word(data: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(data))
    end = begin
    while end < len(data) and data[end : end + 1].isalnum():
        end += 1
    data[begin:end] = rng.choice(_WORDS)


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _number, _number, _number, _cut, _delete, _repeat, _overwrite, _word,
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, is_text: bool) -> bytes:
    """`data` with one to four things changed."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            break
        (_word if is_text and rng.random() < 0.6 else rng.choice(_MUTATIONS))(out, rng)
    return bytes(out[: 1 << 24])


_STATEMENTS = (
    "UPDATE messages SET timestamp = {n} WHERE id % 3 = 0", "UPDATE topics SET name = NULL WHERE id = 2",
    "UPDATE messages SET timestamp = 'x' WHERE id = 3", "UPDATE messages SET timestamp = -timestamp",
    "UPDATE messages SET data = NULL WHERE id = 5", "UPDATE messages SET data = zeroblob({k}) WHERE id % 2",
    "UPDATE messages SET data = randomblob(100)", "UPDATE topics SET type = 'a/msg/B' WHERE id = 1",
    "UPDATE topics SET name = '/same'", "UPDATE topics SET type = x'ff00' WHERE id = 1",
    "UPDATE messages SET topic_id = {n} WHERE id = 4", "UPDATE topics SET id = id << 32",
    "DROP TABLE messages", "DELETE FROM messages",
    "ALTER TABLE messages RENAME TO other", "ALTER TABLE topics RENAME COLUMN type TO kind",
    "CREATE VIEW v AS SELECT 1", "UPDATE message_definitions SET encoded_message_definition = 'uint8 x'",
    "UPDATE message_definitions SET encoding = NULL", "UPDATE topics SET serialization_format = 'json'",
    "UPDATE messages SET timestamp = timestamp * 1000000 WHERE id > 20", "DELETE FROM topics WHERE id = 1",
)  # fmt: skip


def _sql(path: Path, rng: random.Random) -> None:
    text = rng.choice(_STATEMENTS).format(n=rng.choice(_NUMBERS) % (1 << 63), k=rng.choice((0, 9, 1 << 20)))
    with suppress(sqlite3.Error):
        database = sqlite3.connect(path)
        with database:
            database.execute(text)
        database.close()


def change(sample: Sample, folder: Path, rng: random.Random) -> None:
    """A copy of the sample in `folder`, changed."""
    shutil.copytree(sample.root, folder)
    name = rng.choice(sample.files)
    path = folder / name
    if path.suffix == ".db3" and rng.random() < 0.3:
        _sql(path, rng)
        return
    if rng.random() < 0.01:
        path.unlink()
        return
    is_text = path.suffix in (".json", ".jsonl", ".csv", ".yaml", ".msg")
    path.write_bytes(mutate(path.read_bytes(), rng, is_text))


# ---- one case ----


@dataclass
class Outcome:
    """What came of a case: DATASET, SENTENCE or FINDING, in words, and the place in the code of a finding."""

    what: str
    text: str
    place: str = ""


def _read(source: Path, sample: Sample, out: Path) -> str:
    """Ingest, and read back what came of it; returns DATASET."""
    for path in (source, *sorted(source.iterdir())):
        with suppress(UserError):
            if is_bag(path):
                collections.deque(read_bag(path), maxlen=0)
    ingest([source], sample.contract(source), out, msg_path=sample.msg_path(source))
    dataset = Dataset(out)
    for episode in range(dataset.info["total_episodes"]):
        columns = dataset.columns(episode)
        assert np.isfinite(columns["action"]).all()
        for camera in dataset.contract.images if dataset.origin is None else ():
            frames = sum(1 for _ in dataset.frames(camera.name, episode))
            assert frames == len(columns["action"]), f"{frames} frames, {len(columns['action'])} rows"
    return DATASET


def _child(work: Path, sample: Sample) -> None:
    """Run in a process of its own; leaves its answer in a file."""
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + MEMORY, base + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    log = (work / "log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    out = work / "data"
    try:
        answer = _read(work / "in", sample, out)
    except BaseException as error:
        text = sentence(error)
        if text is None:
            answer = FINDING + "\n" + traceback.format_exc()
        else:
            answer = SENTENCE + "\n" + text
            left = sorted(path.name for path in work.iterdir() if path.name not in ("in", "log"))
            if left and not out.exists():
                answer = f"{FINDING}\nleft on the disk: {left} after: {text}"
    (work / "answer").write_text(answer)


def run(sample: Sample, work: Path) -> Outcome:
    """Read `work`/in in a process of its own."""
    inherited = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    pid = os.fork()
    if pid == 0:
        try:
            _child(work, sample)
        finally:
            os._exit(0)
    deadline = time.monotonic() + _WAIT_S
    while (done := os.wait4(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return Outcome(FINDING, f"no end after {_WAIT_S} s", f"hang {sample.name}")
        time.sleep(0.001)
    _, status, usage = done
    answer = (work / "answer").read_text() if (work / "answer").exists() else ""
    what, _, text = answer.partition("\n")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return Outcome(FINDING, f"no end after {SECONDS} s of work", f"hang {sample.name}")
    if os.WIFSIGNALED(status) or not answer:
        log = (work / "log").read_text(errors="replace")[-3000:]
        return Outcome(FINDING, f"status {status}\n{log}", f"crash {sample.name} {log[-200:]}")
    if (taken := (usage.ru_maxrss << 10) - inherited) > MEMORY:
        return Outcome(FINDING, f"{taken >> 20} MiB of memory: {text}", f"memory {sample.name}")
    return Outcome(what, text, _place(text) if what == FINDING else "")


def _place(text: str) -> str:
    """What tells a traceback from others: where it went through our code, and what it was."""
    lines = text.strip().splitlines()
    ours = [line.strip() for line in lines if "d4_datasets/" in line and "line" in line]
    return f"{ours[-1] if ours else ''} {lines[-1].split(':')[0] if lines else ''}"


# ---- many ----


def cases(
    samples: list[Sample], work: Path, seed: int, numbers: Iterator[int]
) -> Iterator[tuple[int, Sample, Path, Outcome]]:
    """(number, sample, its folder, outcome); the folder is gone with the next one."""
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        sample = samples[number % len(samples)]
        folder = work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        change(sample, folder / "in", rng)
        yield number, sample, folder, run(sample, folder)


def prepare(work: Path, only: str = "") -> list[Sample]:
    """The samples, written by a process of its own: what it starts threads for must not be in this one."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            fuzz_samples.write_all(work / "samples")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the samples cannot be written")
    return [sample for sample in fuzz_samples.all_samples(work / "samples") if only in sample.name]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="samples with this in their name")
    parser.add_argument("--case", type=int, help="one case alone, shown in full")
    parser.add_argument("--out", type=Path, default=Path("findings"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes

    def numbers() -> Iterator[int]:
        number = 0
        while time.monotonic() < end:
            yield number
            number += 1

    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="d4-fuzz-") as work:
        samples = prepare(Path(work), options.only)
        chosen = numbers() if options.case is None else iter([options.case])
        for number, sample, folder, outcome in cases(samples, Path(work), options.seed, chosen):
            counts[sample.name, outcome.what] += 1
            if options.case is not None:
                print(sample.name, outcome.what, outcome.text, sep="\n")
            if outcome.what == FINDING and outcome.place not in seen:
                seen.add(outcome.place)
                kept = options.out / f"{sample.name}-{options.seed}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("data", ".tmp*"))
                (kept / "report.txt").write_text(f"{sample.name} case {number}\n{outcome.text}\n")
                print(f"FINDING {kept}: {outcome.place}", flush=True)
    for name in sorted({name for name, _ in counts}):
        row = ", ".join(f"{counts[name, what]} {what}" for what in (DATASET, SENTENCE, FINDING))
        print(f"{name:22} {row}")
    print(f"{counts.total()} cases, {len(seen)} different findings")
    return 1 if seen else 0


if __name__ == "__main__":
    sys.exit(main())
