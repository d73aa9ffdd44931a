"""Data sets by their id on the hub: the real client against a server that speaks its protocol."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.evals import hub, runner, suites

KNOWN = suites.built_in()
SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"test.jsonl": b'{"question": "1+1?", "answer": "so #### 2"}\n', "model.bin": b"x" * 100}


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/datasets/someone/sums/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "someone/sums", "sha": SHA, "siblings": siblings}).encode()
        elif self.path.startswith("/api/datasets/someone/sums/tree/"):
            body = json.dumps(
                [{"type": "file", "path": n, "size": len(b), "oid": SHA} for n, b in FILES.items()]
            ).encode()
        elif self.path.startswith("/datasets/someone/sums/resolve/") and name in FILES:
            body = FILES[name]
        else:
            body = b"{}"
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def fetched(tmp_path):
    """A function: hub id -> the process that fetches it, its output being folder or error."""
    pytest.importorskip("huggingface_hub", reason="pip install -e '.[hub]'")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    program = (
        "import sys; from internlm2_jax.evals import hub, suites\n"
        "print(hub.folder(suites.built_in()['gsm8k'], sys.argv[1]))"
    )
    yield lambda name: subprocess.run(
        [sys.executable, "-c", program, name],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    server.shutdown()


def test_a_data_set_is_fetched_by_its_id(fetched):
    done = fetched("someone/sums")
    folder = Path(done.stdout.strip())
    assert folder.is_dir(), done.stderr
    assert not (folder / "model.bin").exists()  # data only
    suite = dataclasses.replace(KNOWN["gsm8k"], shots=0)
    assert runner.load(suite, folder).items[0].answers == ("2",)


def test_one_that_is_not_there_is_one_line(fetched):
    last = fetched("someone/nothing").stderr.strip().splitlines()[-1]
    assert "UserError: suite gsm8k: someone/nothing cannot be fetched from the hub (" in last
    assert last.endswith("give a folder with --data")


def test_neither_a_folder_nor_an_id():
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        hub.folder(KNOWN["gsm8k"], "/nowhere/at/all")
