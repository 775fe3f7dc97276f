"""Runs on a hub: a stand-in that speaks its HTTP keeps what it is sent and gives it back."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import convexhead as ch
from command import call
from convexhead.deploy import pull, push
from convexhead.errors import FileFormatError, HubError

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0" * 39 + "1"


class Handler(BaseHTTPRequestHandler):
    """The requests of creating, committing and downloading."""

    def _answer(self, content=b"", *, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, **value):
        self._answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        files, address = self.server.files, f"http://{self.headers['Host']}"
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.private = asked.get("private") or asked.get("visibility") == "private"
            self._json(url=f"{address}/{asked.get('organization', 'me')}/{asked['name']}")
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self._json(errors=[], warnings=[])
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._json(files=[{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked])
        elif match := re.fullmatch(r"/api/models/(.*)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[f"{match[1]}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            self._json(success=True, commitOid=COMMIT, commitUrl=f"{address}/{match[1]}/commit/{COMMIT}")
        else:
            self._answer(status=404)

    def do_GET(self):
        match = re.fullmatch(r"/(.*)/resolve/[^/]+/(.*)", self.path)
        if match is None:
            return self._answer(status=200 if self.path == "/" else 404)
        content = self.server.files.get(f"{match[1]}/{match[2]}")
        if content is None:
            return self._answer(status=404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(content).hexdigest()
        return self._answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cards, server.tokens = {}, [], set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)  # HF_ENDPOINT sets both
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_comes_back_as_it_was(work, server, tmp_path, capsys):
    address = push(work / "run", "me/photos", token="hf_secret", private=True)
    assert address.endswith("/me/photos")
    assert server.private is True
    assert "Bearer hf_secret" in server.tokens
    assert sorted(server.files) == ["me/photos/README.md", "me/photos/config.json", "me/photos/weights.safetensors"]
    model = pull("me/photos", tmp_path / "back")
    test = ch.TokenStore.open(work / "tokens")["test"]
    before, after = ch.load(work / "run"), ch.load(tmp_path / "back")
    assert (before.decision_function(test) == after.decision_function(test)).all()
    assert model.certificate == before.certificate_
    assert sorted(item.name for item in (tmp_path / "back").iterdir()) == ["config.json", "weights.safetensors"]
    capsys.readouterr()
    assert call("pull", "me/photos", "--out", tmp_path / "back") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert call("pull", "me/photos", "--out", tmp_path / "back", "--overwrite") == 0
    assert "certified" in capsys.readouterr().out


def test_the_card_says_what_is_known(work, capsys):
    capsys.readouterr()
    assert call("push", work / "run", "me/photos", "--card") == 0
    text = capsys.readouterr().out
    clf = ch.load(work / "run")
    right = clf.score(ch.TokenStore.open(work / "tokens")["test"])
    for part in (
        "library_name: convexhead", "pipeline_tag: image-classification", "# photos", "patches:2", "60 images of train",
        f"{100 * right:.1f}% of 21 images, 95% interval", "convexhead fit", str(clf.certificate_),
        "blue, green, light, red",
    ):  # fmt: skip
        assert part in text
    assert "license" not in text
    assert str(work) not in text.split("## How it was made")[0]


def test_what_the_hub_refuses_is_one_line(work, server, tmp_path):
    with pytest.raises(HubError, match="cannot pull 'me/none'"):
        pull("me/none", tmp_path / "run")
    with pytest.raises(HubError, match="cannot pull"):
        pull("no/such/name", tmp_path / "run")
    server.files.update({"me/other/config.json": b"{}", "me/other/weights.safetensors": b"12345678"})
    with pytest.raises(FileFormatError, match="not a convexhead model"):
        pull("me/other", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_hub_nothing_is_waited_for(work, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match="cannot be reached"):
        push(work / "run", "me/photos")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        pull("me/photos", tmp_path / "run")
