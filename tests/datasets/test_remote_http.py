"""Datasets on a web server of this machine, which lists nothing and now and then hangs up."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import synthetic
from test_bounded import used
from test_shards import write

from d4_datasets import remote
from d4_datasets.errors import UserError
from d4_datasets.windows import Windows

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'd4[http]'")


class Server(ThreadingHTTPServer):
    """Serves a folder, counts what is asked for, and hangs up in the middle of files in `broken`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.asked, self.broken, self.refused = Counter[str](), set[str](), set[str]()
        owner = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *_: object) -> None:
                pass

            def list_directory(self, path: str) -> None:
                self.send_error(403)

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                owner.asked[name] += 1
                if name in owner.refused:
                    self.send_error(403)
                    return
                if name in owner.broken:
                    owner.broken.remove(name)
                    self.send_response(200)
                    self.send_header("Content-Length", "100000")
                    self.end_headers()
                    self.wfile.write(b"x" * 10)
                    self.close_connection = True
                    return
                super().do_GET()

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    write(folder / "one", (12, 5))
    write(folder / "two", (20,), 50)
    (folder / "all.txt").write_text("one\ntwo\n")
    return folder


@pytest.fixture
def server(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "_PAUSE_S", 0)
    with Server(made) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_list_on_a_server_is_read_within_a_limit(server, made, tmp_path) -> None:
    alone = [Windows(made / name) for name in ("one", "two")]
    windows = Windows(f"{server.url}/all.txt", tmp_path, limit=120_000)
    np.testing.assert_array_equal(windows.images["cam"][:], np.concatenate([w.images["cam"] for w in alone]))
    np.testing.assert_array_equal(windows.action, np.concatenate([w.action for w in alone]))
    assert used(windows.pieces._cache) <= 120_000
    windows.close()
    asked = server.asked["d4.json"]
    Windows(f"{server.url}/all.txt", tmp_path, limit=120_000).close()
    assert server.asked["d4.json"] <= asked + 2  # looked at, not fetched and unpacked again


def test_a_server_that_hangs_up_is_asked_again(server, made, tmp_path) -> None:
    server.broken |= {"d4.json", "file-000.mp4"}
    windows = Windows(f"{server.url}/two", tmp_path)
    np.testing.assert_array_equal(windows.images["cam"][:], Windows(made / "two").images["cam"])
    windows.close()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("three", r"http://127.0.0.1:\d+/three is not a d4 dataset: meta/info.json is missing"),
        ("none.txt", r"http://127.0.0.1:\d+/none.txt is not there"),
    ],
)
def test_what_is_not_there_is_one_sentence(server, tmp_path, what, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        Windows(f"{server.url}/{what}", tmp_path)


def test_what_may_not_be_read_is_one_sentence(server, tmp_path) -> None:
    server.refused.add("d4.json")
    with pytest.raises(UserError, match=r"meta/d4.json cannot be read: 403"):
        Windows(f"{server.url}/one", tmp_path)
    assert not list(tmp_path.glob("index-*"))


def test_nobody_is_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE_S", 0)
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/x/meta/info.json cannot be read: .*"):
        Windows("http://127.0.0.1:1/x", tmp_path)


def test_frames_are_those_that_were_recorded(server, tmp_path) -> None:
    windows = Windows(f"{server.url}/two", tmp_path)
    np.testing.assert_array_equal(windows.images["cam"][:], synthetic.episode(20, 50).images)
    windows.close()
