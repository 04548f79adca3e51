"""The peers of peers.py and how each is started: names, files, programs, and what each needs besides experts."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import read_config, stored_tensors
from comparison import PLAIN, console
from engines import VLLM, Engine, Program, Variant
from footprint import Allowance, Footprint
from read_ahead import ReadAhead

from vllm_moe_offload.bench.engine import EngineError

OURS, LLAMA, ACCELERATE = "ours", "llama", "accelerate"
KINDS = (PLAIN, OURS, f"{LLAMA}-bf16", f"{LLAMA}-f16", ACCELERATE)
KV_CACHE_BYTES = 64 << 20
"""Of vLLM: with llama.cpp's context and one request, more would only be lost for experts."""
PROBE_TOKENS = 16


class Peer(NamedTuple):
    """One way to serve the model: a kind of KINDS, and the device's read-ahead in KiB if it is to be another."""

    kind: str
    read_ahead: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Peer":
        """Read `llama-bf16` or `llama-bf16@128`. Raises ValueError."""
        kind, found, kib = text.partition("@")
        if kind not in KINDS or (found and not kib.isdecimal()):
            raise ValueError(f"--peers {text}: no such peer; there are {', '.join(KINDS)}, and @KIB behind one of them")
        return cls(kind, int(kib) if found else None)

    @property
    def name(self) -> str:
        """As it is given and shown."""
        return self.kind if self.read_ahead is None else f"{self.kind}@{self.read_ahead}"

    @property
    def gguf_type(self) -> str | None:
        """Of the file it reads, if it is llama.cpp."""
        return self.kind.removeprefix(f"{LLAMA}-") if self.kind.startswith(LLAMA) else None


class Weights(NamedTuple):
    """Bytes of a checkpoint."""

    experts: int
    others: int

    @classmethod
    def of(cls, model: Path) -> "Weights":
        """Counted in its safetensors files."""
        sizes = {True: 0, False: 0}
        for tensor in stored_tensors(model):
            sizes[tensor.is_expert] += tensor.bytes_of(tensor.shape)
        return cls(sizes[True], sizes[False])


class Bench:
    """The peers of one model, their files in a folder, and how to start them."""

    def __init__(self, folder: Path, model: Path, pythons: Mapping[str, str], prompt: str, eager: bool) -> None:
        """`pythons`: interpreters of the peers that are not vLLM. `prompt`: to measure what peers need with."""
        self.folder, self.model, self.pythons = folder / model.name, model, pythons
        self.prompt, self.eager = prompt, eager
        self.weights = Weights.of(model)
        self.folder.mkdir(parents=True, exist_ok=True)

    def variant(self, peer: Peer, allowance: Allowance) -> Variant:
        """How to start a peer with what it may use."""
        read_ahead = None if peer.read_ahead is None else ReadAhead(self.folder, peer.read_ahead)
        threads = len(os.sched_getaffinity(0))
        common: dict[str, Any] = {"checkpoint": str(self.model), "threads": threads}
        if peer.gguf_type is not None:
            context = read_config(self.model)["max_position_embeddings"]
            arguments = common | {"gguf": str(self._gguf(peer.gguf_type)), "context": context}
            program = self._program(LLAMA)
        elif peer.kind == ACCELERATE:
            arguments = common | {"offload": str(self.folder / "offload")}
            program = self._program(ACCELERATE)
        else:
            arguments = {
                "model": str(self.model),
                "enforce_eager": self.eager,
                "enable_prefix_caching": False,
                "max_num_seqs": 1,
                "kv_cache_memory_bytes": KV_CACHE_BYTES,
            }
            program = VLLM
        offload = {"cache": f"{allowance.experts}B", "daemon": "off"} if peer.kind == OURS else None
        return Variant(peer.name, offload, arguments, None, program, allowance.limit, read_ahead)

    def footprint(self, peer: Peer) -> Footprint:
        """What a peer needs besides experts: measured once, without a limit, and kept. Raises EngineError."""
        file = self.folder / f"{peer.kind}{'-eager' if self.eager and peer.kind == OURS else ''}.footprint.json"
        if not file.exists():
            console.print(f"measuring what {peer.kind} needs besides experts …")
            file.write_text(json.dumps(self._measure(Peer(peer.kind))._asdict()))
        return Footprint(**json.loads(file.read_text()))

    def _measure(self, peer: Peer) -> Footprint:
        engine = Engine.start(self.variant(peer, Allowance(None, self.weights.experts // 4)))
        try:
            result = engine.run([[self.prompt]], PROBE_TOKENS)
            mapped = engine.mapped_bytes([self.folder, self.model])
        finally:
            engine.stop()
        mapped_weights = self.weights.others if peer.gguf_type is not None else 0
        return Footprint.of(result["peak_bytes"], mapped, result["totals"].get("slot_bytes", 0), mapped_weights)

    def write_gguf(self, peer: Peer) -> None:
        """Write the file that a peer reads if it is llama.cpp and the file is missing. Raises EngineError."""
        if peer.gguf_type is None or self._gguf(peer.gguf_type).exists():
            return
        script = Path(__file__).with_name("gguf_model.py")
        command = [self.pythons[LLAMA], str(script), str(self.model), str(self._gguf(peer.gguf_type))]
        try:
            subprocess.run([*command, "--type", peer.gguf_type], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise EngineError(f"{peer.name}: {error.stderr.strip().splitlines()[-1]}") from error
        except OSError as error:
            raise EngineError(f"{peer.name}: {error}") from error

    def _gguf(self, type_name: str) -> Path:
        return self.folder / f"{type_name}.gguf"

    def _program(self, kind: str) -> Program:
        return Program(Path(__file__).with_name(f"{kind}_worker.py"), self.pythons[kind])
