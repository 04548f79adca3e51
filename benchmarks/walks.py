"""How many files of the package a value goes through: routing, a record, a prediction, a demand of the daemon.

    python benchmarks/walks.py [--files]

Engines serve a few prompts in this process: without prediction, with it, and with slots of a daemon in other threads.
A file counts if a function of it runs inside one of the functions that the walk begins with: one for each thread that
the value comes to. What other threads do meanwhile does not count.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parent.parent / "vllm_moe_offload"
CACHE = "25%"
DAEMON_BYTES = 64 << 20
TOKENS = 32


class Walk(NamedTuple):
    """A value's way through the code."""

    name: str
    starts: tuple[tuple[str, str], ...]
    """Where it begins in each of its threads: the file and the qualified name of a function."""


READ = ("pool/loader.py", "RecordLoader._read")
ROUTING = Walk(
    "the routing of a layer to the slots of its experts",
    (("integration/method.py", "OffloadedMoEMethod.compute"), READ),
)
RECORD = Walk(
    "a record from the checkpoint to its slot",
    (
        ("integration/streaming.py", "StreamedLayer._keep_back.<locals>.keep_back"),
        ("integration/loading.py", "ModelOffload.record"),
        ("store/writer.py", "StoreWriter._write"),
        READ,
    ),
)
PREDICTION = Walk("a prediction to the loads it starts", (("prefetch/prefetcher.py", "Prefetcher.look_ahead"),))
DEMAND = Walk(
    "a demand of the daemon, on both sides",
    (("client/remote_pool.py", "RemotePool._demand"), ("daemon/session.py", "Session._reply"), READ),
)
WALKS = (ROUTING, RECORD, PREDICTION, DEMAND)


class Tracer:
    """Notes which files of the package run inside of walks."""

    def __init__(self) -> None:
        self.files: dict[Walk, set[str]] = {walk: set() for walk in WALKS}
        self._starts: dict[tuple[str, str], list[Walk]] = {}
        self._inside = threading.local()

    @contextmanager
    def tracing(self, *walks: Walk) -> Iterator[None]:
        """Trace these in this thread, and in those that are started meanwhile."""
        self._starts = {}
        for walk in walks:
            for file, function in walk.starts:
                self._starts.setdefault((f"{PACKAGE}/{file}", function), []).append(walk)
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(PACKAGE)):
            return
        begun = self._starts.get((code.co_filename, code.co_qualname), [])
        running = self._inside.__dict__.setdefault("walks", [])
        if event == "return":
            for walk in begun:
                if walk in running:
                    running.remove(walk)
            return
        running.extend(begun)
        for walk in set(running):
            self.files[walk].add(code.co_filename.removeprefix(f"{PACKAGE}/"))


def serve_prompts(offload: dict[str, Any]) -> None:
    """An engine in this process serves the example prompts one by one."""
    from prompts import EXAMPLES, read_prompts
    from vllm import LLM, SamplingParams
    from warm import TINY_MOE

    llm = LLM(
        str(TINY_MOE),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        additional_config={"moe_offload": {"cache": CACHE} | offload},
    )
    for prompt in read_prompts([EXAMPLES])[:4]:
        llm.generate([prompt.text], SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True), use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()


@contextmanager
def daemon(path: Path, stores: Path) -> Iterator[None]:
    """A daemon in a thread of this process."""
    from vllm_moe_offload.daemon.histories import DaemonHistories
    from vllm_moe_offload.daemon.models import DaemonModels
    from vllm_moe_offload.daemon.server import DaemonServer
    from vllm_moe_offload.daemon.socket_file import SocketFile

    models, histories = DaemonModels(stores, DAEMON_BYTES, {}, "lfu", None), DaemonHistories(None)
    server = DaemonServer(SocketFile.claim(path, None), models, histories, DAEMON_BYTES, None, None)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield
    finally:
        server.stop("done")
        thread.join()
        models.close()
        histories.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--files", action="store_true", help="name the files")
    options = parser.parse_args()
    tracer = Tracer()
    with tempfile.TemporaryDirectory(prefix="walks-") as folder:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_PLUGINS": "moe-offload",
            "VLLM_MOE_OFFLOAD_STORE_ROOT": f"{folder}/stores",
        }
        path = Path(folder) / "daemon.sock"
        with tracer.tracing(ROUTING, RECORD):
            serve_prompts({"predictor": "none", "daemon": "off"})
        with tracer.tracing(PREDICTION):
            serve_prompts({"predictor": "gate", "daemon": "off", "history": "off"})
        with tracer.tracing(DEMAND), daemon(path, Path(folder) / "stores"):
            serve_prompts({"predictor": "none", "daemon": f"unix:{path}"})
    if READ[0] not in tracer.files[PREDICTION]:
        sys.exit("the engine with prediction started no load: this machine is too busy to say")
    for walk, files in tracer.files.items():
        print(f"{len(files):3} files: {walk.name}")
        if options.files:
            print("".join(f"      {file}\n" for file in sorted(files)), end="")


if __name__ == "__main__":
    main()
