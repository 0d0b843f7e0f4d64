"""d4-fetch against a server on the loopback that can cut, forget, change and lie."""

import base64
import fcntl
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import fetch
from d4_datasets.errors import UserError
from d4_datasets.fetch import Index, read_index


class Server:
    """Files by path, how often each was asked for and from where, and what goes wrong."""

    def __init__(self):
        self.files, self.asked = {}, []
        self.cut_after = {}  # path: bytes after which the connection breaks, once
        self.status = {}  # path: statuses to answer first
        self.headers = {}  # path: further headers
        self.has_tags = self.has_ranges = True
        self.together = self.most = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                owner.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.base = f"http://127.0.0.1:{self.http.server_port}/data/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def answer(self, request):
        path = request.path.removeprefix("/data/")
        wanted = request.headers.get("Range")
        with self.lock:
            self.asked.append((path, wanted))
            self.together += 1
            self.most = max(self.most, self.together)
            statuses = self.status.get(path, [])
            status = statuses.pop(0) if statuses else 200
        try:
            if status != 200 or path not in self.files:
                request.send_response(status if status != 200 else 404)
                for name, value in self.headers.get(path, {}).items():
                    request.send_header(name, value)
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            self.send(request, path, self.files[path], wanted)
        finally:
            with self.lock:
                self.together -= 1

    def send(self, request, path, content, wanted):
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        begin = 0
        if wanted and self.has_ranges and request.headers.get("If-Range") == tag:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                request.send_response(416)
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
        request.send_response(206 if begin else 200)
        if begin:
            request.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if self.has_tags:
            request.send_header("ETag", tag)
        for name, value in self.headers.get(path, {}).items():
            request.send_header(name, value)
        body = content[begin:]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        cut = self.cut_after.pop(path, None)
        request.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            request.close_connection = True

    def times(self, path):
        return sum(asked == path for asked, _ in self.asked)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "_BLOCK", 1000)
    monkeypatch.setattr(fetch, "_WAIT_S", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def recordings(server, *names, size=5000):
    """Put recordings on the server; returns their index."""
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        server.files[f"{name}.mp4"] = rng.bytes(size)
        server.files[f"{name}.jsonl"] = rng.bytes(100)
    return Index(server.base, names)


def here(root):
    return sorted(
        str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")
    )


def test_recordings_come_with_their_lines_and_keep_their_place(server, tmp_path):
    index = recordings(server, "8.0/one-a", "10.0/two-b")
    result = fetch.fetch(index, tmp_path)
    assert (result.new, result.here, result.missing, result.failures) == (2, 0, [], [])
    assert here(tmp_path) == ["10.0/two-b.jsonl", "10.0/two-b.mp4", "8.0/one-a.jsonl", "8.0/one-a.mp4"]
    for name, content in server.files.items():
        assert (tmp_path / name).read_bytes() == content
    assert result.bytes == sum(map(len, server.files.values()))


def test_what_is_there_is_not_asked_for_again(server, tmp_path):
    index = recordings(server, "a", "b")
    fetch.fetch(index, tmp_path)
    server.asked.clear()
    assert fetch.fetch(index, tmp_path).here == 2
    assert server.asked == []
    (tmp_path / "b.jsonl").unlink()
    assert fetch.fetch(index, tmp_path).new == 1
    assert server.asked == [("b.jsonl", None)]


def test_a_broken_connection_goes_on_where_it_was(server, tmp_path):
    index = recordings(server, "a")
    server.cut_after["a.mp4"] = 3000
    result = fetch.fetch(index, tmp_path)
    assert result.failures == []
    assert server.asked[:2] == [("a.mp4", None), ("a.mp4", "bytes=3000-")]
    assert (tmp_path / "a.mp4").read_bytes() == server.files["a.mp4"]
    assert here(tmp_path) == ["a.jsonl", "a.mp4"]


def test_an_interrupted_run_goes_on_where_it_was(server, tmp_path, monkeypatch):
    index = recordings(server, "a")
    monkeypatch.setattr(fetch, "_TRIES", 1)
    server.cut_after["a.mp4"] = 2000
    result = fetch.fetch(index, tmp_path)
    assert result.failures == ["a.mp4 could not be fetched: the connection ended after 2000 of 5000 bytes"]
    assert not (tmp_path / "a.mp4").exists()
    assert fetch.fetch(index, tmp_path).new == 1
    assert ("a.mp4", "bytes=2000-") in server.asked
    assert (tmp_path / "a.mp4").read_bytes() == server.files["a.mp4"]


def test_two_versions_of_a_file_are_never_joined(server, tmp_path, monkeypatch):
    index = recordings(server, "a")
    monkeypatch.setattr(fetch, "_TRIES", 1)
    server.cut_after["a.mp4"] = 2000
    fetch.fetch(index, tmp_path)
    server.files["a.mp4"] = b"new" * 1000
    assert fetch.fetch(index, tmp_path).failures == []
    assert (tmp_path / "a.mp4").read_bytes() == server.files["a.mp4"]


@pytest.mark.parametrize("lack", ["has_tags", "has_ranges"])
def test_servers_that_cannot_go_on_begin_again(server, tmp_path, lack):
    index = recordings(server, "a")
    setattr(server, lack, False)
    server.cut_after["a.mp4"] = 2000
    assert fetch.fetch(index, tmp_path).failures == []
    assert (tmp_path / "a.mp4").read_bytes() == server.files["a.mp4"]


def test_a_part_that_was_complete_already(server, tmp_path):
    index = recordings(server, "a")
    content = server.files["a.mp4"]
    (tmp_path / "a.mp4.part").write_bytes(content)
    (tmp_path / "a.mp4.part.tag").write_text(f'"{hashlib.sha1(content).hexdigest()}"')
    assert fetch.fetch(index, tmp_path).failures == []
    assert (tmp_path / "a.mp4").read_bytes() == content


def test_missing_recordings_are_named_and_the_others_come(server, tmp_path):
    index = recordings(server, "a", "b", "c")
    del server.files["b.mp4"]
    result = fetch.fetch(index, tmp_path)
    assert (result.new, result.missing, result.failures) == (2, ["b.mp4"], [])
    assert "b.jsonl" not in here(tmp_path)


def test_failures_are_one_sentence_each_and_the_others_come(server, tmp_path):
    index = recordings(server, "a", "b")
    server.status["a.mp4"] = [403]
    result = fetch.fetch(index, tmp_path)
    assert result.failures == ["a.mp4 could not be fetched: the server answers 403 Forbidden"]
    assert result.new == 1


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    index = recordings(server, "a")
    server.status["a.mp4"] = [503, 429, 500]
    assert fetch.fetch(index, tmp_path).failures == []
    assert server.times("a.mp4") == 4
    server.status["a.mp4"] = [503] * 9
    (tmp_path / "a.mp4").unlink()
    assert "503" in fetch.fetch(index, tmp_path).failures[0]


def test_checksums_and_sizes_are_verified(server, tmp_path):
    index = recordings(server, "a", "b", "c", "d")
    digest = {name: hashlib.sha256(content).hexdigest() for name, content in server.files.items()}
    server.headers["a.mp4"] = {"Content-MD5": base64.b64encode(hashlib.md5(b"other").digest()).decode()}
    good = base64.b64encode(hashlib.md5(server.files["d.mp4"]).digest()).decode()
    server.headers["d.mp4"] = {"Content-MD5": good}
    files = {
        "b.mp4": {"sha256": "0" * 64}, "c.mp4": {"bytes": 4999},
        "d.mp4": {"sha256": digest["d.mp4"].upper(), "bytes": 5000},
    }  # fmt: skip
    result = fetch.fetch(Index(server.base, index.names, files), tmp_path, jobs=1)
    assert [text.split(" it")[0] for text in result.failures] == [
        f"{name}.mp4 could not be fetched:" for name in ("a", "b", "c")
    ]
    assert "its md5 is" in result.failures[0]
    assert "its sha256 is" in result.failures[1]
    assert "5000 bytes instead of 4999" in result.failures[2]
    assert here(tmp_path) == ["d.jsonl", "d.mp4"]


def test_the_limit_holds_for_all_recordings_together(server, tmp_path):
    index = recordings(server, *"abcdef")
    result = fetch.fetch(index, tmp_path, limit_bytes=16_000, jobs=2)
    assert (result.new, result.held_back) == (3, 3)
    assert len(here(tmp_path)) == 6
    again = fetch.fetch(index, tmp_path, limit_bytes=16_000)
    assert (again.new, again.here, again.held_back) == (0, 3, 3)
    assert fetch.fetch(index, tmp_path, limit_bytes=10**6).new == 3


def test_several_come_at_a_time(server, tmp_path):
    barrier = threading.Barrier(3, timeout=10)
    send = server.send

    def wait(request, path, *rest):
        if path.endswith(".mp4"):
            barrier.wait()
        send(request, path, *rest)

    server.send = wait
    assert fetch.fetch(recordings(server, *"abc"), tmp_path, jobs=3).new == 3
    assert server.most == 3


def test_a_part_of_an_index_and_the_extras(server, tmp_path):
    index = recordings(server, "data/8.0/treechop-a", "data/8.0/other-b", "data/9.0/other-c")
    server.files["data/8.0/treechop-a-options.json"] = b"{}"
    with pytest.raises(UserError, match=r"no recording of the index fits --only \*/9.9/\*; the first is"):
        fetch.fetch(index, tmp_path, only="*/9.9/*")
    assert fetch.fetch(index, tmp_path, only="*/8.0/*").new == 2
    result = fetch.fetch(index, tmp_path, only="*treechop*", extras=True)
    assert result.failures == []
    assert result.missing == ["data/8.0/treechop-a.zip"]  # few recordings lack a saved world, and do without
    assert (tmp_path / "data/8.0/treechop-a-options.json").read_bytes() == b"{}"


# ---- names and places ----


@pytest.mark.parametrize(
    "name",
    ["../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a/.", "..", "", "~/a", "a\\b", "C:/a", "a\x00b",
     "a\nb", ".ssh/a", "a/.hidden", "http://elsewhere/a"],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder_are_refused(server, tmp_path, name):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"basedir": server.base, "relpaths": ["fine", name]}))
    with pytest.raises(UserError, match="does not stay inside a folder; nothing was fetched"):
        read_index(str(path))
    assert server.asked == []


@given(st.text(max_size=12))
def test_whatever_name_is_let_through_stays_inside(name):
    try:
        index = fetch._index({"basedir": "http://x", "relpaths": [name]}, "index")
    except UserError:
        return
    root = Path("/nowhere/at/all")
    for one in index.names:
        assert fetch._place(root, one + ".mp4").resolve().is_relative_to(root)


def test_links_in_the_folder_lead_nowhere(server, tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (root / "8.0").symlink_to(outside)
    with pytest.raises(UserError, match="behind a link that leads out"):
        fetch.fetch(recordings(server, "8.0/a"), root)
    (root / "b.mp4").symlink_to(outside / "b.mp4")
    with pytest.raises(UserError, match="behind a link"):
        fetch.fetch(recordings(server, "b"), root)
    assert list(outside.iterdir()) == []


def test_names_are_quoted_in_addresses(server, tmp_path):
    index = recordings(server, "a b?c#d%")
    server.files = {name.replace(" ", "%20").replace("%", "%25").replace("%2520", "%20").replace("?", "%3F")
                    .replace("#", "%23"): content for name, content in server.files.items()}  # fmt: skip
    assert fetch.fetch(index, tmp_path).failures == []
    assert here(tmp_path) == ["a b?c#d%.jsonl", "a b?c#d%.mp4"]


def test_redirects_to_other_places_than_the_web_are_refused(server, tmp_path):
    index = recordings(server, "a")
    server.status["a.mp4"] = [302] * 9
    server.headers["a.mp4"] = {"Location": "file:///etc/passwd"}
    result = fetch.fetch(index, tmp_path)
    assert len(result.failures) == 1
    assert here(tmp_path) == []


# ---- the index ----


def test_real_indexes_name_the_video_and_their_description_does_not(tmp_path):
    path = tmp_path / "index.json"
    names = ["data/8.0/a.mp4", "data/8.0/b", "data/8.0/a"]
    path.write_text(json.dumps({"basedir": "https://host/path", "relpaths": names}))
    assert read_index(str(path)) == Index("https://host/path/", ("data/8.0/a", "data/8.0/b"))


def test_an_index_may_have_an_address(server):
    server.files["index.json"] = json.dumps({"basedir": server.base, "relpaths": ["a"]}).encode()
    assert read_index(f"{server.base}index.json").names == ("a",)
    with pytest.raises(UserError, match="the server answers 404"):
        read_index(f"{server.base}none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "is no index"), ("{}", "is no index"),
        ('{"basedir": 3, "relpaths": []}', "is no index"),
        ('{"basedir": "http://x", "relpaths": "a"}', "is no index"),
        ('{"basedir": "http://x", "relpaths": [3]}', "is no index"),
        ('{"basedir": "file:///etc", "relpaths": ["a"]}', "no http or https address"),
        ('{"basedir": "ftp://x", "relpaths": ["a"]}', "no http or https address"),
        ('{"basedir": "http://[x", "relpaths": ["a"]}', "no http or https address"),
        ('{"basedir": "http://x", "relpaths": ["a"], "files": {"a.mp4": {"bytes": "5"}}}', "must map names"),
        ('{"basedir": "http://x", "relpaths": ["a"], "files": []}', "must map names"),
    ],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "index.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_index(str(path))


def test_an_index_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the index .*: No such file"):
        read_index(str(tmp_path / "none.json"))


# ---- the command ----


def test_the_command_says_what_came_and_what_did_not(server, tmp_path, capsys):
    recordings(server, "a", "b", "c")
    del server.files["b.mp4"]
    server.status["c.mp4"] = [403]
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"basedir": server.base, "relpaths": ["a.mp4", "b.mp4", "c.mp4"]}))
    assert fetch._main(fetch.Options(str(path), tmp_path / "out")) == 1
    shown = capsys.readouterr()
    assert "1 new recordings" in shown.out
    assert "error: c.mp4 could not be fetched: the server answers 403 Forbidden" in shown.err
    assert "warning: b.mp4 is in the index and not on the server" in shown.err
    with pytest.raises(UserError, match="--limit-gb is -1"):
        fetch._main(fetch.Options(str(path), tmp_path / "out", limit_gb=-1))


def test_a_second_run_into_the_same_folder_is_refused(server, tmp_path):
    with (tmp_path / ".d4-fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another d4-fetch is writing"):
            fetch.fetch(recordings(server, "a"), tmp_path)


def test_a_full_disk_ends_the_run(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch._Download, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        fetch.fetch(recordings(server, *"abcd"), tmp_path)
