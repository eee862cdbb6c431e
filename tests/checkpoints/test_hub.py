"""The hub's own client pushes to a server that speaks the hub's protocol."""

import base64
import contextlib
import http.server
import json
import threading

import pytest
from huggingface_hub import constants

from alignment_gap.checkpoints.huggingface.hub import push
from alignment_gap.errors import UserError

TOKEN = "hf_no_one_may_read_this"


class Handler(http.server.BaseHTTPRequestHandler):
    """Stores small files in `server.files`; refuses requests without the token."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        self.server.paths.append(self.path)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.private = asked.get("visibility") == "private" or asked.get("private")
            return self.answer(200, {"url": f"{self.server.address}/me/ours", "id": "me/ours", "name": "me/ours"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            return self.answer(
                200,
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]},
            )
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        address = f"{self.server.address}/me/ours/commit/0123"
        self.answer(200, {"success": True, "commitOid": "0123", "commitUrl": address, "hookOutput": ""})

    def answer(self, status, values):
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.paths, server.private = {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with contextlib.closing(server.socket):
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "exported"
    made.mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "weights"), ("README.md", "# ours\n")):
        (made / name).write_text(text)
    return made


@pytest.mark.parametrize("private", [False, True])
def test_every_file_of_the_folder_is_in_the_repository(private, hub, folder):
    assert push(folder, "me/ours", private) == f"{hub.address}/me/ours/commit/0123"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert bool(hub.private) == private


BAD = {
    "not exported": ({}, r"empty is not an exported folder: give the --output of alignment-gap checkpoint export"),
    "name": ({"name": "ours"}, r"'ours' is not a repository of the hub: write USER/NAME"),
    "no token": ({"HF_TOKEN": None}, r"no token of the hub is set: set HF_TOKEN, or log in with `hf auth login`"),
    "refused": ({"HF_TOKEN": "hf_other"}, r"the hub does not take .*exported as me/ours \(.*401.*check the token's"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_pushed_is_one_line_without_the_token(name, hub, folder, tmp_path, monkeypatch):
    changes, message = BAD[name]
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    if "HF_TOKEN" in changes:
        monkeypatch.setenv("HF_TOKEN", changes["HF_TOKEN"]) if changes["HF_TOKEN"] else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=message) as error:
        push(tmp_path / "empty" if name == "not exported" else folder, changes.get("name", "me/ours"))
    assert "\n" not in str(error.value) and "hf_other" not in str(error.value) and not hub.files
