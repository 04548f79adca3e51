"""Measure this machine for the simulator: how fast records load, and what a layer and a step of a model take.

Loads: an engine's pools demand absent experts of the model's store, 1, 2, … at a time; between demands the processor
works for as long as a layer takes. Layers: an engine whose cache holds all experts but one, timed inside, at two batch
sizes; from their difference comes what one more expert costs. Finding slots: steps without a kernel. Prefill: how
long a prompt's step takes in that engine.

    python benchmarks/profile_machine.py --model /tmp/wide --out machine.json
    vllm-moe-offload replay TRACE.npz --hardware machine.json --record-bytes N
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from engines import Engine, Variant
from prompts import EXAMPLES, read_prompts
from remembering import all_but_one
from safetensors import safe_open
from warm import TINY_MOE

from vllm_moe_offload.plan.loads import AT_ONCE, demand_seconds, finding_seconds, fit_loads
from vllm_moe_offload.replay.hardware import HardwareProfile, ModelProfile
from vllm_moe_offload.store.reader import Store

BATCHES = (1, 8)
TOKENS = 96
ROUNDS = 4


class LayerTimes(NamedTuple):
    """Of steps of one batch size, in seconds."""

    experts: float
    """A layer's experts."""
    between: float
    """From there to the next layer's."""
    step: float
    """From a step's last layer to the next step's first."""
    distinct: float
    """Experts a layer used."""


def layer_times(engine: Engine, texts: Sequence[str], batch: int) -> LayerTimes:
    """What decoding takes inside an engine that has what it needs."""
    engine.run([[texts[place % len(texts)]] for place in range(batch)], TOKENS)
    engine.ask("layer_times")
    runs: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        prompts = [[texts[(number * batch + place) % len(texts)]] for place in range(batch)]
        runs.append(engine.run(prompts, TOKENS))
    times = engine.ask("layer_times")[str(batch)]
    counters = [run["decode_counters"] for run in runs]
    uses = sum(c["hits"] + c["misses"] for c in counters) / sum(c["steps"] for c in counters)
    return LayerTimes(times["experts"], times["between"], times["step"], uses / runs[0]["totals"]["layers"])


def dense_bytes_per_layer(model: Path, layers: int) -> int:
    """Of everything in the layers that is no routed expert."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                if ".layers." in name and ".experts." not in name:
                    slice_ = tensors.get_slice(name)
                    total += int(np.prod(slice_.get_shape())) * 2
    return total // layers


def profile(model: Path, texts: Sequence[str], stores: Path | None, eager: bool) -> dict[str, Any]:
    """Everything measured, and the profile made of it."""
    with tempfile.TemporaryDirectory(prefix="profile-", dir=stores) as folder:
        arguments = {
            "model": str(model),
            "enforce_eager": eager,
            "enable_prefix_caching": False,
            "max_num_seqs": max(BATCHES),
        }
        offload = {"cache": all_but_one(model), "predictor": "none", "store": folder}
        engine = Engine.start(Variant("all but one", offload, arguments))
        try:
            engine.run([[text] for text in texts[:8]], 8)
            engine.ask("time_layers")
            one, many = (layer_times(engine, texts, batch) for batch in BATCHES)
            prefill = engine.run([texts], 1, prompt_tokens=512)["ttft"]
        finally:
            engine.stop()
        (manifest,) = Path(folder).glob("*/manifest.json")
        store = Store.open(manifest.parent)
        config = json.loads((model / "config.json").read_text())
        demands = demand_seconds(store, one.experts + one.between)
        finding = finding_seconds(store, config["num_experts_per_tok"])
        record = store.layers[0].layout.record_bytes
        layers = len(store.layers)
        store.close()
    shape = ModelProfile(record, dense_bytes_per_layer(model, layers), _expert_parameters(config))
    hardware = fit(one, many, demands, prefill, shape, layers, config["num_experts_per_tok"])
    hardware = replace(hardware, demand_overhead_seconds=finding)
    return {
        "profile": asdict(hardware),
        "measured": {"batch": dict(zip(BATCHES, (one._asdict(), many._asdict()), strict=True)), "demands": demands},
    }


def fit(
    one: LayerTimes,
    many: LayerTimes,
    demands: Sequence[float],
    prefill: float,
    model: ModelProfile,
    layers: int,
    top_k: int,
) -> HardwareProfile:
    """The profile whose loads, and layers of one row, take as long as the measured ones; wider layers nearly."""
    latency, moving = fit_loads(demands)
    alone = model.dense_bytes_per_layer / model.record_bytes + one.distinct
    more = max(1e-9, (many.experts - one.experts) / (many.distinct - one.distinct))
    more = min(more, (one.experts + one.between) / alone)
    reading = alone * more
    rows = 512
    flops = 2 * rows * (top_k * model.expert_parameters + model.dense_bytes_per_layer // 2)
    return HardwareProfile(
        name="this machine",
        bytes_per_second=model.record_bytes / moving,
        load_latency_seconds=latency,
        memory_bytes_per_second=model.record_bytes / more,
        flops_per_second=flops * layers / prefill,
        layer_overhead_seconds=max(0.0, one.experts + one.between - reading),
        loads_at_once=AT_ONCE,
        step_overhead_seconds=max(0.0, one.step - one.between),
        model=model,
    )


def _expert_parameters(config: dict[str, Any]) -> int:
    return 3 * config["hidden_size"] * config["moe_intermediate_size"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=TINY_MOE, help="see widen.py for bigger ones")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[EXAMPLES])
    parser.add_argument("--stores", type=Path, help="where to build the store: the disk to measure")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="profile to write, for replay --hardware"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured too")
    options = parser.parse_args()
    texts = [prompt.text for prompt in read_prompts(options.prompts)]
    result = profile(options.model, texts, options.stores, options.eager)
    options.out.write_text(json.dumps(result["profile"], indent=1))
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
