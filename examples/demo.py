"""Serve the bundled model with 25 % of its experts in fast memory, ask two questions, say what that cost and saved.

Starts a real `vllm serve` twice, with the plugin and without, and compares the answers token by token. Ends exactly the
processes it started. Run by `make demo`.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.panel import Panel

MODEL = Path(__file__).parent / "models" / "tiny-moe"
OFFLOAD = ("--plugin", "moe-offload", "--moe-offload-cache", "25%")
QUESTIONS = (
    ("Python", "import unittest\n\nclass TestAdd(unittest.TestCase):\n    def test_add(self):\n"),
    (
        "a word problem",
        "Question: Tom has 5 apples. He buys 7 more and gives 3 to Anna. How many apples does Tom have now?\nAnswer:",
    ),
)
ANSWER_TOKENS = 60
START_SECONDS = 600
STOP_SECONDS = 60
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_COLOR": "0",
}
# vLLM's own route for asking its workers something; not for servers that others can reach.
STATS_ROUTE = {"VLLM_SERVER_DEV_MODE": "1"}

console = Console(highlight=False)


class Answer(NamedTuple):
    """What the model wrote."""

    text: str
    tokens: list[int]


class Server(NamedTuple):
    """A running `vllm serve` on loopback."""

    url: str
    log: Path

    def ask(self, prompt: str) -> Answer:
        """Greedy completion of a prompt through the OpenAI API."""
        request = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "return_token_ids": True}
        choice = self.post("/v1/completions", request)["choices"][0]
        return Answer(choice["text"], choice["token_ids"])

    def stats(self) -> dict[str, float]:
        """The plugin's counters, of the only rank."""
        return self.post("/collective_rpc", {"method": "moe_offload_stats"})["results"][0]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One JSON request."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)


@contextmanager
def serve(*flags: str) -> Iterator[Server]:
    """Run `vllm serve` on the bundled model until the block ends; yields once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = Path(sys.executable).with_name("vllm")
    command = ["vllm", "serve", os.path.relpath(MODEL), *flags]
    console.print(f"\n[bold]$ {shlex.join(command)}[/]")
    with tempfile.NamedTemporaryFile(prefix="moe-offload-demo-", suffix=".log") as log:
        process = subprocess.Popen(
            [vllm, *command[1:], "--host", "127.0.0.1", "--port", str(port)],
            env=ENVIRONMENT | os.environ | STATS_ROUTE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        server = Server(f"http://127.0.0.1:{port}", Path(log.name))
        try:
            started = time.monotonic()
            _wait_until_healthy(server, process)
            console.print(f"serving after {time.monotonic() - started:.0f} s")
            yield server
        finally:
            _stop(process)


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    what = f"did not serve within {START_SECONDS} s" if process.poll() is None else f"ended with {process.returncode}"
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-25:])
    raise SystemExit(f"{tail}\n\nmake demo: the server {what}; its last lines are above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server as ^C would, and whatever of its children is left after that."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()


def _ask_all(server: Server) -> list[Answer]:
    return [server.ask(prompt) for _, prompt in QUESTIONS]


def _show_engagement(server: Server) -> None:
    for line in server.log.read_text(errors="replace").splitlines():
        if "moe-offload: " in line:
            console.print("  " + line[line.index("moe-offload: ") :], markup=False)


def _show_cost(stats: dict[str, float]) -> None:
    total, resident, lookups = stats["expert_bytes"], stats["slot_bytes"], stats["hits"] + stats["misses"]
    mib = 2**20
    console.print("\n[bold]What it saved and cost[/]")
    console.print(f"  experts: {total / mib:.1f} MiB in all, {resident / mib:.1f} MiB of them in fast memory")
    console.print(f"  saved:   {(total - resident) / mib:.1f} MiB ({1 - resident / total:.0%} of the experts)")
    console.print(
        f"  lookups: {stats['hits']:.0f} of {lookups:.0f} found in fast memory ({stats['hits'] / lookups:.0%})"
    )
    console.print(
        f"  loads:   {stats['loaded_bytes'] / mib:.1f} MiB read; {stats['stall_seconds']:.2f} s spent waiting for them"
    )


def main() -> int:
    """The demo; 1 if the answers differ from plain vLLM's."""
    with serve(*OFFLOAD) as server:
        _show_engagement(server)
        ours = _ask_all(server)
        stats = server.stats()
    for (title, prompt), answer in zip(QUESTIONS, ours, strict=True):
        console.print(Panel(f"[dim]{_escaped(prompt)}[/]{_escaped(answer.text)}", title=title, title_align="left"))
    console.print("The model is tiny and knows nothing; what counts here is how it is served.")
    _show_cost(stats)
    with serve() as server:
        plain = _ask_all(server)
    differing = [title for (title, _), a, b in zip(QUESTIONS, ours, plain, strict=True) if a.tokens != b.tokens]
    count = sum(len(answer.tokens) for answer in ours)
    if differing:
        console.print(f"\n[red]The tokens DIFFER from plain vLLM's in: {', '.join(differing)}")
        return 1
    console.print(f"\n[green]All {count} tokens equal plain vLLM's.")
    return 0


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
