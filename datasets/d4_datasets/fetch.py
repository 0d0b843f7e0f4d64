"""d4-fetch: the recordings that an index lists, from a web server into a folder.

    {"basedir": "https://host/path/", "relpaths": ["8.0/some-recording", ...]}

Files keep their place below the folder and are written aside first. A file that is there is not asked for
again, and one that was cut off goes on where it was, so the same command continues an interrupted run.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import http.client
import json
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

import tyro

from d4_datasets.errors import UserError, run_cli
from d4_datasets.locks import held

_TIMEOUT_S = 30.0
_TRIES = 4
_WAIT_S = 0.5  # after the first failure, twice as long after each further one
_BLOCK = 2**20
_LARGEST_INDEX = 2**28
_ADDRESS = re.compile(r"https?://[\w.-]+(:\d+)?(/[^\s?#]*)?$")
_ENDINGS = (".mp4", ".jsonl")
_EXTRAS = ("-options.json", ".zip")


# Not OSError: a full disk must end the run.
_TRANSIENT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class _Failed(Exception):
    """A file could not be fetched; the message says why, without its address."""


class _Missing(Exception):
    """The server does not have the file."""


class _Full(Exception):
    """The file would go beyond the limit."""


# ---- the index ----


@dataclass(frozen=True)
class Index:
    """Where recordings are: an address, the names below it, and what is known of single files.

    files: by name with its ending, `bytes` and `sha256`; optional, and checked where given.
    """

    base: str
    names: tuple[str, ...]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_index(source: str) -> Index:
    """The index in a file or at an http(s) address.

    Raises:
        UserError: it cannot be read, is no index, or names a place outside of the folder.
    """
    try:
        if source.startswith(("http://", "https://")):
            with _open(source, {}) as answer:
                text = answer.read(_LARGEST_INDEX)
        else:
            with Path(source).open("rb") as file:
                text = file.read(_LARGEST_INDEX)
        raw = json.loads(text)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot read the index {source}: {_reason(error)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{source} is not JSON; give the index file of a data set") from None
    return _index(raw, source)


def _index(raw: Any, source: str) -> Index:
    base = raw.get("basedir") if isinstance(raw, dict) else None
    names = raw.get("relpaths") if isinstance(raw, dict) else None
    if not (isinstance(base, str) and isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise UserError(f'{source} is no index: it needs "basedir", a text, and "relpaths", a list of texts')
    if not _ADDRESS.match(base):
        raise UserError(f"{source}: basedir {base!r} is no http or https address")
    files = raw.get("files", {})
    if not isinstance(files, dict) or not all(map(_describes, files.values())):
        raise UserError(f'{source}: "files" must map names to {{"bytes": a number, "sha256": a text}}')
    # Real indexes name the video, their description the name without its ending.
    bare = dict.fromkeys(name.removesuffix(".mp4") for name in names)
    for name in bare:
        _check(name, source)
    return Index(base if base.endswith("/") else f"{base}/", tuple(bare), files)


def _describes(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes", 0)) is int
        and isinstance(entry.get("sha256", ""), str)
    )


def _check(name: str, source: str) -> None:
    """Refuse a name that could lead out of the folder or means another file elsewhere."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or part.startswith((".", "~")) for part in parts) or re.search(
        r"[\\:\x00-\x1f\x7f]", name
    ):
        raise UserError(f"{source}: the name {name!r} does not stay inside a folder; nothing was fetched")


def _place(root: Path, name: str) -> Path:
    """Where a file belongs; raises UserError if a link in the folder would lead it elsewhere."""
    path = root / PurePosixPath(name)
    if not path.parent.resolve().is_relative_to(root.resolve()) or path.is_symlink():
        raise UserError(f"{path} lies behind a link that leads out of {root}; remove the link")
    return path


# ---- one file ----


def _open(url: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "d4-fetch", **headers})
    answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    if not answer.url.startswith(("http://", "https://")):
        answer.close()
        raise http.client.HTTPException(f"it leads to {answer.url}, which is no http or https address")
    return answer


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Budget:
    """Bytes that may be fetched in all, shared by the threads."""

    def __init__(self, limit: int | None, held: int = 0) -> None:
        self._limit, self._held, self._lock = limit, held, threading.Lock()
        self.is_spent = False

    def take(self, count: int, forced: bool = False) -> None:
        """Set `count` bytes aside; raises _Full, and from then on always, where there are not so many."""
        with self._lock:
            over = self._limit is not None and self._held + count > self._limit
            self.is_spent |= over
            if over and not forced:
                raise _Full
            self._held += count

    def give_back(self, count: int) -> None:
        """Return bytes of a file that failed."""
        with self._lock:
            self._held -= count


class _Download:
    """One file on its way: `<name>.part` beside it, with the server's mark of its version in `.part.tag`."""

    def __init__(self, url: str, path: Path, known: dict[str, Any], stop: threading.Event) -> None:
        self.url, self.path, self.known, self.stop = url, path, known, stop
        self.part = path.with_name(f"{path.name}.part")
        self.tag = path.with_name(f"{path.name}.part.tag")
        self.size: int | None = None
        self.reserved = 0
        self.md5: str | None = None  # base64, as servers give it

    def run(self, budget: Budget, forced: bool) -> int:
        """Fetch the file; returns its size.

        Raises:
            _Missing, _Full, _Failed: it is not at `path`, and why.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_TRIES):
            size = None
            try:
                self._continue(budget, forced)
                size = self._finish()
                budget.take(size - self.reserved, forced=True)  # a server need not say the size beforehand
                return size
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410):
                    raise _Missing from None
                if error.code == 416:  # the part is not the beginning of what the server has
                    self._forget()
                elif error.code < 500 and error.code not in (408, 429):
                    raise _Failed(_reason(error)) from None
                reason = _reason(error)
            except _TRANSIENT as error:
                reason = _reason(error)
            finally:
                if size is None:
                    budget.give_back(self.reserved)
                    self.reserved = 0
            if attempt + 1 < _TRIES and self.stop.wait(_WAIT_S * 2**attempt):
                break
        raise _Failed(reason)

    def _continue(self, budget: Budget, forced: bool) -> None:
        """Ask for what is not here yet and append it to the part."""
        held = self.part.stat().st_size if self.part.exists() else 0
        tag = self.tag.read_text() if held and self.tag.exists() else ""
        headers = {"Range": f"bytes={held}-", "If-Range": tag} if tag else {}
        with _open(self.url, headers) as answer:
            goes_on = answer.status == 206
            if goes_on and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {held}-"):
                self._forget()
                raise http.client.HTTPException("the server sends another part than the one asked for")
            length = answer.headers.get("Content-Length")
            before = held if goes_on else 0
            self.size = before + int(length) if length is not None and length.isdecimal() else None
            self.md5 = answer.headers.get("Content-MD5")
            budget.take(self.size or 0, forced)
            self.reserved = self.size or 0
            mark = answer.headers.get("ETag") or ""
            if not mark or mark.startswith("W/"):  # a weak one does not name the bytes
                mark = answer.headers.get("Last-Modified") or ""
            self.tag.write_text(mark)
            with self.part.open("ab" if goes_on else "wb") as file:
                self._copy(answer, file)

    def _copy(self, answer: IO[bytes], file: IO[bytes]) -> None:
        while block := answer.read(_BLOCK):
            file.write(block)
            if self.stop.is_set():
                raise _Failed("interrupted")

    def _finish(self) -> int:
        size = self.part.stat().st_size
        wanted = self.known.get("bytes", self.size)
        if self.size is not None and size < self.size:
            raise http.client.HTTPException(f"the connection ended after {size} of {self.size} bytes")
        fault = f"it has {size} bytes instead of {wanted}" if wanted not in (None, size) else self._checksum()
        if fault:
            self._forget()
            raise _Failed(f"{fault}; what came was thrown away")
        self.part.replace(self.path)
        self.tag.unlink(missing_ok=True)
        return size

    def _checksum(self) -> str:
        """What is wrong with the content, empty if nothing is or nothing is known."""
        for name, wanted in (("sha256", self.known.get("sha256")), ("md5", self.md5)):
            if wanted is None:
                continue
            with self.part.open("rb") as file:
                digest = hashlib.file_digest(file, name)
            found = digest.hexdigest() if name == "sha256" else base64.b64encode(digest.digest()).decode()
            if found != (wanted.lower() if name == "sha256" else wanted):
                return f"its {name} is {found}, not {wanted}"
        return ""

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)


# ---- the whole run ----


@dataclass
class Fetched:
    """What a run of `fetch` did, in recordings; `failures` has a sentence for each file."""

    here: int = 0
    new: int = 0
    missing: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    held_back: int = 0
    bytes: int = 0


class _Run:
    """The work that threads share."""

    def __init__(self, index: Index, root: Path, names: Sequence[str], endings: Sequence[str]) -> None:
        self.index, self.stop, self.result = index, threading.Event(), Fetched()
        self.files = {name: [name + ending for ending in endings] for name in names}
        self.places = {file: _place(root, file) for files in self.files.values() for file in files}
        sizes = {file: path.stat().st_size for file, path in self.places.items() if path.is_file()}
        self.held = {
            file: size for file, size in sizes.items() if self._known(file).get("bytes", size) == size
        }
        self.budget = Budget(None)

    def _known(self, file: str) -> dict[str, Any]:
        return self.index.files.get(file, {})

    def recording(self, name: str) -> int | None:
        """Fetch what is not here of a recording; returns the bytes that came, None if it was not begun."""
        total = 0
        for number, file in enumerate(self.files[name]):
            if file in self.held:
                continue
            if number == 0 and self.budget.is_spent:
                return None
            url = self.index.base + urllib.parse.quote(file)
            download = _Download(url, self.places[file], self._known(file), self.stop)
            try:
                # The rest of a recording is small beside its video, which alone would be of no use.
                total += download.run(self.budget, forced=number > 0)
            except _Missing:
                self.result.missing.append(file)
                if file.endswith(_ENDINGS):
                    break
            except _Full:
                return None
            except _Failed as error:
                self.result.failures.append(f"{file} could not be fetched: {error}")
                break
        return total


def fetch(
    index: Index,
    root: Path,
    limit_bytes: int | None = None,
    jobs: int = 4,
    only: str = "*",
    extras: bool = False,
) -> Fetched:
    """Bring the recordings of an index that fit the shell pattern `only` into the folder `root`.

    Args: limit_bytes: no recording is begun that would make those here larger than this in all. extras: the
        options and the saved world of each recording, too.

    Raises:
        UserError: the folder cannot be used.
    """
    root.mkdir(parents=True, exist_ok=True)
    names = [name for name in index.names if fnmatch.fnmatchcase(name, only)]
    if index.names and not names:
        raise UserError(f"no recording of the index fits --only {only}; the first is {index.names[0]}")
    run = _Run(index, root, names, (*_ENDINGS, *_EXTRAS) if extras else _ENDINGS)
    run.budget = Budget(limit_bytes, sum(run.held.values()))
    todo = [name for name in names if not all(file in run.held for file in run.files[name])]
    result = run.result
    result.here = len(names) - len(todo)
    with _only_one(root), ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = [pool.submit(run.recording, name) for name in todo]
        try:
            for size in _told((future.result() for future in as_completed(futures)), len(todo)):
                result.new += bool(size)
                result.held_back += size is None
                result.bytes += size or 0
        except BaseException:
            run.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return result


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold the folder against a second d4-fetch into it."""
    with held(root / ".d4-fetch.lock", f"another d4-fetch is writing to {root}; wait for it to end"):
        yield


def _told(sizes: Iterator[int | None], total: int) -> Iterator[int | None]:
    """Pass sizes on, and say on stderr every few seconds how far it is."""
    began = said = time.monotonic()
    done = 0
    for number, size in enumerate(sizes, 1):
        done += size or 0
        now = time.monotonic()
        if now - said >= 5:
            rate = done / (now - began) / 1e6
            print(
                f"{number} of {total} recordings, {done / 1e9:.2f} GB, {rate:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )
            said = now
        yield size


@dataclass(frozen=True)
class Options:
    """Fetch the recordings that an index file lists (VPT, BASALT: videos and what the players did).

    Files that are there are not fetched again; the same command goes on after an interruption.
    """

    index: Annotated[str, tyro.conf.Positional]
    """The index: a file, or its address."""

    to: Path
    """The folder to put the recordings into."""

    limit_gb: float | None = None
    """Stop before the recordings in the folder become larger than this."""

    jobs: int = 4
    """Recordings fetched at the same time."""

    only: str = "*"
    """Only recordings whose name fits this pattern, such as '*/8.0/*' or '*treechop*'."""

    extras: bool = False
    """Fetch the options and saved worlds of the game, too."""


def main() -> None:
    """The command d4-fetch."""
    run_cli(lambda: _main(tyro.cli(Options, prog="d4-fetch")))


def _main(options: Options) -> int:
    if options.limit_gb is not None and not options.limit_gb > 0:
        raise UserError(f"--limit-gb is {options.limit_gb:g}; it must be above 0")
    index = read_index(options.index)
    limit = None if options.limit_gb is None else round(options.limit_gb * 1e9)
    result = fetch(index, options.to, limit, options.jobs, options.only, options.extras)
    _warn(result.failures, "error")
    _warn([f"{file} is in the index and not on the server" for file in result.missing], "warning")
    print(f"{result.new} new recordings ({result.bytes / 1e9:.2f} GB), {result.here} were here already")
    if result.held_back:
        print(f"{result.held_back} recordings were left out: --limit-gb {options.limit_gb:g} is reached")
    print(f"folder: {options.to}")
    print(f"next:   d4-ingest {options.to} --contract docs/examples/minecraft.yaml --out DATASET")
    return 1 if result.failures else 0


def _warn(sentences: Sequence[str], word: str) -> None:
    for sentence in sentences[:20]:
        print(f"{word}: {sentence}", file=sys.stderr)
    if len(sentences) > 20:
        print(f"{word}: and {len(sentences) - 20} more", file=sys.stderr)


if __name__ == "__main__":
    main()
