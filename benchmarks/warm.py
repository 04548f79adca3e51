"""Prepare the history of an engine that has served for a while: what it remembers, and the heads it has learned.

An engine with everything resident serves some prompts and records their trace; history and heads are then written as an
engine writes them, without its patience: learning takes all of a core here. Prompts that are held out lie beside them.

    python benchmarks/warm.py /tmp/warm --model /tmp/wide --stored-tokens 20000
    python benchmarks/decode.py --model /tmp/wide --warm /tmp/warm --arm none='{}' --arm history='{"predictor": ...}'

The folder then has `history/` (copied for every engine that starts with it), `engine.trace`, and `held_out.jsonl`.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from engines import Engine, Variant
from prompts import EXAMPLES, Prompt, in_turns, read_prompts, split_by_domain, split_within_domains, write_prompts
from safetensors import safe_open

from vllm_moe_offload.learning.heads_file import HEADS_FILE
from vllm_moe_offload.learning.process import TrainingJob, train
from vllm_moe_offload.predict.token_vectors import ModelVectors
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

TINY_MOE = Path(__file__).parent.parent / "examples" / "models" / "tiny-moe"
HISTORY, TRACE, HELD_OUT = "history", "engine.trace", "held_out.jsonl"
SEATS = 16


def record(model: Path, prompts: Sequence[Prompt], tokens: int, stored_tokens: int, trace: Path) -> Trace:
    """Serve the prompts, again and again until so many tokens are recorded: greedily at first, then sampled."""
    arguments = {
        "model": str(model),
        "enforce_eager": True,
        "max_num_seqs": SEATS,
        "enable_prefix_caching": False,
    }
    offload = {"cache": "100%", "predictor": "none", "trace": str(trace)}
    engine = Engine.start(Variant("recording", offload, arguments))
    try:
        recorded = served = 0
        while recorded < stored_tokens:
            batch = [[prompts[(served + place) % len(prompts)].text] for place in range(SEATS)]
            result = engine.run(batch, tokens, seed=served if served >= len(prompts) else None)
            recorded += result["prompt_tokens"] + SEATS * (tokens - 1)
            served += SEATS
    finally:
        engine.stop()
    return read_trace(trace)


def model_vectors(model: Path) -> ModelVectors:
    """The model's own token embeddings, from its checkpoint."""
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                if name.endswith("embed_tokens.weight"):
                    rows = tensors.get_tensor(name).float().numpy()
                    return ModelVectors(rows.__getitem__, rows.shape[1])
    raise ValueError(f"{model} has no embed_tokens.weight")


def learn(trace: Trace, vectors: ModelVectors, directory: Path) -> None:
    """Write the history of a trace into `directory`, and heads learned from it beside it."""
    store = HistoryStore(trace.shape)
    store.extend(trace.requests())
    path = HistoryArchive(directory).save(trace.fingerprint, store)
    with tempfile.TemporaryDirectory() as scratch:
        known = np.unique(store.to_trace().tokens)
        table = Path(scratch) / "vectors.npz"
        np.savez(table, tokens=known, rows=vectors.look_up(known).astype(np.float16))
        heads = path.with_name(HEADS_FILE)
        train(TrainingJob(str(path), str(heads), trace.fingerprint, str(table), cpu_share=1.0, parent=os.getppid()))


def prepare(out: Path, model: Path, split: tuple[list[Prompt], list[Prompt]], tokens: int, stored_tokens: int) -> Trace:
    """Make the folder `out` from nothing: learn from the first half of `split`, keep the second beside it."""
    out.mkdir(parents=True)
    trace = record(model, split[0], tokens, stored_tokens, out / TRACE)
    learn(trace, model_vectors(model), out / HISTORY)
    write_prompts(out / HELD_OUT, split[1])
    return trace


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--model", type=Path, default=TINY_MOE)
    parser.add_argument("--prompts", type=Path, nargs="+", default=[EXAMPLES], help="JSON lines: text and domain")
    parser.add_argument("--held-out", nargs="+", default=[], metavar="DOMAIN", help="default: every second one")
    parser.add_argument("--within", action="store_true", help="hold out every second prompt of each domain instead")
    parser.add_argument("--stored-tokens", type=int, default=20_000, help="at least; prompts count too")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate per request")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; remove it or name another folder")
    prompts = in_turns(read_prompts(options.prompts))
    try:
        split = split_within_domains(prompts) if options.within else split_by_domain(prompts, options.held_out)
    except ValueError as error:
        parser.error(str(error))
    trace = prepare(options.out, options.model, split, options.tokens, options.stored_tokens)
    summary = {"requests": trace.num_requests, "tokens": trace.num_tokens, "held_out_prompts": len(split[1])}
    print(f"{options.out}: {json.dumps(summary)}")


if __name__ == "__main__":
    main()
