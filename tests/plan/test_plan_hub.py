"""A model that is only a name: a hub on this machine gives its configuration and headers, and hears what is asked."""

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.models import build
from vllm_moe_offload.plan.checkpoint import read_folder
from vllm_moe_offload.plan.sizes import model_sizes

REPOSITORY = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import sys
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.plan.hub import read_model
from vllm_moe_offload.plan.sizes import model_sizes
try:
    sizes = model_sizes(read_model(sys.argv[1]), on_cpu=True)
except ConfigError as error:
    sys.exit(str(error))
print(sizes.exact, sizes.expert_bytes, sizes.dense_bytes)
assert not {"vllm", "torch"} & sys.modules.keys()
"""


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the hub serves a repository."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: dict[str, int] = {}
        """Bytes by file."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.split("?")[0].rpartition("/")[2]
        file = self.server.folder / name
        if f"/{REPOSITORY}/resolve/" not in self.path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if REPOSITORY in self.path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        status, part = 200, content
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            status, part = 206, content[int(first) : int(last) + 1 if last else None]
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.server.sent[name] = self.server.sent.get(name, 0) + len(part)
            self.wfile.write(part)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    build("mixtral", tmp_path / "served")
    server = Hub(tmp_path / "served")
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def read(model: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    known |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run([sys.executable, "-c", CODE, model], env=known, capture_output=True, text=True, timeout=120)


def words(folder: Path, exact: bool) -> str:
    sizes = model_sizes(read_folder(folder if exact else folder / "config.json"), on_cpu=True)
    return f"{exact} {sizes.expert_bytes} {sizes.dense_bytes}"


def test_configuration_and_headers_are_all_that_is_fetched(hub: Hub, tmp_path: Path) -> None:
    with (hub.folder / "model.safetensors").open("ab") as file:
        file.truncate(file.tell() + (8 << 20))
    told = read(REPOSITORY, tmp_path / "home", HF_ENDPOINT=hub.address)
    assert told.stdout.strip() == words_of_padded(hub.folder), told.stderr
    assert hub.sent["model.safetensors"] < 1 << 20
    assert hub.sent.keys() == {"config.json", "model.safetensors"}


def words_of_padded(folder: Path) -> str:
    """As ``words``, of a file that has been made longer than its header says."""
    copy = folder.parent / "copy"
    build("mixtral", copy)
    return words(copy, exact=True)


def test_what_an_earlier_start_left_is_enough_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert read(REPOSITORY, home, HF_ENDPOINT=hub.address).returncode == 0
    told = read(REPOSITORY, home, HF_HUB_OFFLINE="1")
    assert told.stdout.strip() == words(hub.folder, exact=False), told.stderr
    (snapshot,) = (home / "hub").glob("models--*/snapshots/*")
    (snapshot / "model.safetensors").write_bytes((hub.folder / "model.safetensors").read_bytes())
    assert read(REPOSITORY, home, HF_HUB_OFFLINE="1").stdout.strip() == words(hub.folder, exact=True)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nobody/nothing", "is not in the Hugging Face cache, and the hub cannot be asked"),
        ("a/b/c", "there is no such file or folder"),
        ("./here", "there is no such file or folder"),
        ("no such name", "is no path and cannot be a name on the hub"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(model: str, said: str, tmp_path: Path) -> None:
    told = read(model, tmp_path, HF_HUB_OFFLINE="1")
    assert told.returncode == 1 and said in told.stderr
    assert told.stderr.startswith(f"MODEL {model}: ") and len(told.stderr.splitlines()) == 1


def test_a_name_that_the_hub_does_not_know(hub: Hub, tmp_path: Path) -> None:
    told = read("someone/else", tmp_path, HF_ENDPOINT=hub.address)
    assert told.returncode == 1 and len(told.stderr.splitlines()) == 1
    assert "the hub has no such model, or shows it only to users with access (`hf auth login`)" in told.stderr
