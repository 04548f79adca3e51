"""How well the next layers' routers predict experts, beside what history and frequency say of the same tokens.

One engine serves all prompts, one after another, and records their trace. The first three quarters are the history; on
the rest, every predictor is asked one and two layers ahead, at every token. The gate is asked in the engine, since no
trace holds hidden states; the others in replay.

    python benchmarks/gate.py
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.registry import predictor_for_replay
from vllm_moe_offload.predict.token_vectors import ModelVectors
from vllm_moe_offload.replay.accuracy import Accuracy
from vllm_moe_offload.replay.forecast import forecast
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace_file import read_trace

ROOT = Path(__file__).parent.parent
DISTANCES = (1, 2)


class GateScore:
    """Asks the gate predictor of an engine about every step, whether or not the engine finds that worth its time."""

    def __init__(self, worker: Any):
        from vllm_moe_offload.integration.method import OffloadedMoEMethod

        model = worker.model_runner.get_model()
        self._predictor, self._runtime = model.moe_offload._history.predictor, model.moe_offload.runtime
        self.shape = self._predictor.shape
        self.counts = False
        self.accuracy = Accuracy(self.shape.layers, self.shape.top_k, DISTANCES)
        self._observe, self._runtime.observe = self._runtime.observe, self.observe
        self._hidden = np.empty(0)
        self._runtime.prefetcher.begin_step = lambda *rows: None
        for module in model.modules():
            if isinstance(method := getattr(module, "quant_method", None), OffloadedMoEMethod):
                method.show = self._show

    def _show(self, read: Any) -> None:
        self._hidden = read()

    def observe(self, layer: int, experts: Any, weights: Any) -> None:
        self._observe(layer, experts, weights)
        rows = self._runtime._num_rows
        if not rows:
            return
        experts, hidden = experts[:rows].astype(np.int64), self._hidden
        if layer == 0:
            self._step, self._said = self._predictor.begin([None] * rows), {}
        for distance in DISTANCES:
            said = self._said.pop((layer, distance), None)
            if said is not None and self.counts:
                self.accuracy.note(distance, layer, said, experts)
        self._predictor.note_router_input(lambda: hidden)
        self._step.observe(layer, experts, weights[:rows])
        for distance in DISTANCES:
            if layer + distance < self.shape.layers:
                self._said[layer + distance, distance] = self._step.predict(layer + distance)


def serve(model: Path, texts: list[str], held_out: int, tokens: int, trace: Path) -> Accuracy:
    """Record a trace of ``texts``, and score the gate on the last ``held_out``.."""
    from vllm import LLM, SamplingParams

    offload = {"cache": "25%", "predictor": "gate", "history": "off", "trace": str(trace)}
    llm = LLM(
        str(model),
        enforce_eager=True,
        enable_prefix_caching=False,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=1,
        additional_config={"moe_offload": offload},
    )
    (score,) = llm.collective_rpc(GateScore)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number, text in enumerate(texts):
        score.counts = number >= len(texts) - held_out
        llm.generate([text], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return score.accuracy


def replay(model: Path, trace_file: Path, held_out: int) -> dict[str, Accuracy]:
    """What predictors that need no engine say of the same requests."""
    from safetensors import safe_open

    trace = read_trace(trace_file)
    shape, first = ModelShape(*trace.shape), trace.num_requests - held_out
    with safe_open(model / "model.safetensors", "pt") as tensors:
        embeddings = tensors.get_tensor("model.embed_tokens.weight").float().numpy()
    scores = {}
    for name in ("history", "frequency", "coactivation"):
        history = HistoryStore(shape)
        history.extend(trace.select(np.arange(first)).requests())
        if name == "history":
            vectors = ModelVectors(lambda wanted: embeddings[wanted], embeddings.shape[1])
            predictor = HistoryPredictor(shape, history, lambda vectors=vectors: vectors)
            predictor.learn_all()
        else:
            predictor = predictor_for_replay(name, shape, history)
        scores[name] = Accuracy(shape.layers, shape.top_k, DISTANCES)
        forecast(predictor, trace.select(np.arange(first, trace.num_requests)), (), scores[name])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "models" / "tiny-moe")
    parser.add_argument("--prompts", type=Path, default=ROOT / "examples" / "prompts.jsonl")
    parser.add_argument("--tokens", type=int, default=96, help="to generate for each prompt")
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    texts = [json.loads(line)["text"] for line in options.prompts.read_text().splitlines()]
    held_out = len(texts) // 4
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "engine.trace"
        scores = {"gate": serve(options.model, texts, held_out, options.tokens, trace)}
        scores |= replay(options.model, trace, held_out)
        tokens = read_trace(trace).num_tokens
    table = Table(title=f"{len(texts)} requests, {tokens} tokens; asked about the last {held_out} requests")
    top_k = scores["gate"].counts[0]
    for column in ("", *(f"recall@{top_k}, {d} ahead" for d in DISTANCES), *(f"ECE, {d} ahead" for d in DISTANCES)):
        table.add_column(column)
    for name, score in scores.items():
        recalls = [f"{np.nanmean(score.recall(distance, top_k)[max(DISTANCES) :]):.3f}" for distance in DISTANCES]
        table.add_row(name, *recalls, *(f"{score.calibration_error(distance):.4f}" for distance in DISTANCES))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
