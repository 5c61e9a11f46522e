"""Against a server that speaks as much of the hub's protocol as a dataset's download takes."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from embedlib.errors import ConfigError
from embedlib.hub_datasets import downloaded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "data/en/part-0.jsonl": b'{"text": "The station is closed."}\n',
    "data/de/part-0.jsonl": b'{"text": "Der Bahnhof ist geschlossen."}\n',
    "build.py": b"raise SystemExit",
}


class Hub(BaseHTTPRequestHandler):
    """One dataset, `team/lines`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/team/lines/revision/"):
            self.answer(json.dumps({"id": "team/lines", "sha": COMMIT, "siblings": [], "tags": []}).encode())
        elif path == f"/api/datasets/team/lines/tree/{COMMIT}":
            entries = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": name} for name in FILES]
            self.answer(json.dumps(entries).encode())
        elif (name := path.removeprefix(f"/datasets/team/lines/resolve/{COMMIT}/")) in FILES:
            self.answer(FILES[name])
        else:
            self.answer(b"{}", 404)

    def answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_data_is_fetched_and_code_is_not() -> None:
    folder = Path(downloaded("hub:team/lines"))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == {name for name in FILES if "data" in name}
    assert (folder / "data/en/part-0.jsonl").read_bytes() == FILES["data/en/part-0.jsonl"]


@pytest.mark.usefixtures("hub")
def test_a_pattern_chooses_files_of_a_revision() -> None:
    path = Path(downloaded("hub:team/lines@main/data/de/*.jsonl"))
    assert [file.read_bytes() for file in path.parent.glob(path.name)] == [FILES["data/de/part-0.jsonl"]]
    assert not (path.parent.parent / "en").exists()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hub:team", "expected hub:OWNER/NAME"),
        ("hub:team/other", "no dataset that the hub gives"),
        ("hub:team/lines/*.parquet", "has no file"),
    ],
)
def test_what_is_not_there_is_said(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        downloaded(address)
