"""Decode and prefill on a GPU, as ratios of one run: plain vLLM with every expert in its memory, vLLM's own offloading
at equal memory, and ours in both modes, without and with prediction.

    python benchmarks/gpu/compare.py --shape qwen3-30b-a3b --layers 12 --shares 25,50 --out FOLDER --budget 400

Every engine is a process of its own. One that fails or overruns is said so, and the rest go on. What is in ``--out``
already is not run again, so a run that was cut short is completed by the same command.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from forecast import forecast_of, measured_profile
from random_model import FORMATS, SHAPES, Shape, make

Results: TypeAlias = dict[tuple[str, int], dict[str, Any]]
"""What was measured, by the arm's name and share."""
WORKER = Path(__file__).parent / "measured_engine.py"
PREDICTING = "with-prediction"
"""Serves what is measured before it is measured, and waits until heads have been learned from that."""
RECORDING = "recording"
"""Host-managed once more, for the trace that the forecast is made from; its times are not compared."""
_EACH_SECONDS = 150
_LEAST_SECONDS = 20
_IN_PIECES = {"mode": 3, "cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8]}
"""Compilation in graphs that end at MoE layers: without it those of host-managed experts run without graphs."""
_GROUP = 4
"""Layers that vLLM's prefetching offloader takes together."""


class Arm(NamedTuple):
    """One engine: arguments of ``LLM`` besides those of all, and settings of the plugin."""

    name: str
    share: int
    """Percent of the experts in the GPU's memory."""
    engine: dict[str, Any]
    offload: dict[str, Any] | None = None


class Wanted(NamedTuple):
    """A ratio of two arms, and what it should be."""

    what: str
    ratio: float | None
    """None where one of the two was not measured."""
    bound: float
    at_least: bool

    @property
    def state(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "yes" if (self.ratio >= self.bound) == self.at_least or self.ratio == self.bound else "NO"


def arms(shape: Shape, fmt: str, shares: list[int]) -> Iterator[Arm]:
    """Every engine, the plain one first."""
    yield Arm("plain", 100, {})
    yield Arm("ours-all", 100, {}, {"cache": "100%", "predictor": "none"})
    everything = shape.layers * shape.experts * shape.expert_bytes(fmt)
    for share in shares:
        cache = {"cache": f"{share}%"}
        outside = everything * (100 - share) / 100
        yield Arm("device-managed", share, {}, cache | {"predictor": "none"})
        yield Arm(PREDICTING, share, {}, cache | {"predictor": "history", "history": "off"})
        yield Arm("host-managed", share, {}, cache | {"predictor": "none", "host_cache": "95%"})
        in_pieces = {"compilation_config": _IN_PIECES}
        yield Arm("host-managed-pieces", share, in_pieces, cache | {"predictor": "none", "host_cache": "95%"})
        experts_only: dict[str, Any] = {"cpu_offload_gb": outside / 2**30, "cpu_offload_params": ["experts"]}
        yield Arm("vllm-uva", share, experts_only)
        groups = {"offload_group_size": _GROUP, "offload_num_in_group": max(1, round(_GROUP * (100 - share) / 100))}
        yield Arm("vllm-prefetch", share, {"offload_backend": "prefetch", "offload_params": ["experts"]} | groups)
        yield Arm(RECORDING, share, {}, cache | {"predictor": "none", "host_cache": "95%"})


def engine_arguments(model: Path, arm: Arm, batches: list[int], prefill: int, extra: dict[str, Any]) -> dict[str, Any]:
    """What ``LLM`` is given: the same for all arms, so that only where experts are differs."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": 2 * prefill,
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": prefill,
        "kv_cache_memory_bytes": 2 << 30,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
        "moe_backend": "triton",
        "attention_backend": "TRITON_ATTN",
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL",
            "cudagraph_capture_sizes": sorted({1, 2, 4, *batches}),
        },
    }
    arguments |= arm.engine | extra
    if arm.offload is not None:
        arguments["additional_config"] = {"moe_offload": arm.offload}
    return arguments


def forecasts(results: Results, shape: Shape, options: argparse.Namespace) -> Iterator[Wanted]:
    """Device-managed decoding of one request beside what the replay makes of the same routing."""
    if ("plain", 100) not in results or "1" not in results["plain", 100]["tpot"] or options.rates is None:
        return
    plain = results["plain", 100]["tpot"]["1"]
    profile = measured_profile(plain, shape.layers, options.rates, options.rates.with_name("manager.json"))
    record_bytes = shape.expert_bytes(options.format)
    for name, share in results:
        if name == "device-managed":
            trace = options.out / f"{RECORDING}-{share}.trace"
            expected = forecast_of(trace, share, profile, record_bytes)
            ratio = None if expected is None else results[name, share]["tpot"]["1"] / expected
            yield Wanted(f"{share} %: device-managed / its forecast", ratio, 1.15, False)


def measure(arm: Arm, arguments: dict[str, Any], options: argparse.Namespace, seconds: float) -> dict[str, Any] | None:
    """Run one engine; its result, or None with the end of its log printed."""
    name = f"{arm.name}-{arm.share}"
    result, log = options.out / f"{name}.json", options.out / f"{name}.log"
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    if arm.name == RECORDING:
        arguments["additional_config"]["moe_offload"]["trace"] = str(options.out / f"{name}.trace")
    job = {"engine": arguments, "batches": options.batches, "tokens": options.tokens, "prefill": options.prefill}
    job["learns"] = arm.name == PREDICTING
    surroundings = {
        "VLLM_PLUGINS": "" if arm.offload is None else "moe-offload",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
    }
    began = time.monotonic()
    with log.open("w") as output:
        command = [sys.executable, str(WORKER), json.dumps(job | {"vocabulary": 8000}), str(result)]
        try:
            code: int | str = subprocess.run(
                command, env=os.environ | surroundings, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"over {seconds:.0f} s"
    print(
        f"{name}: {'measured' if result.exists() else f'FAILED ({code})'} in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    if result.exists():
        return json.loads(result.read_text())
    print("\n".join(f"    {line[:300]}" for line in log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return None


def wanted(results: Results, batches: list[int], link: float | None) -> Iterator[Wanted]:
    """What the ratios should be. ``link`` is what the link alone takes for all experts, seconds; None: not known."""

    def ratio(of: tuple[str, int], to: tuple[str, int], batch: int) -> float | None:
        if of not in results or to not in results:
            return None
        return float(results[of]["tpot"][str(batch)] / results[to]["tpot"][str(batch)])

    shares = sorted({share for _, share in results if share < 100})
    for batch in batches:
        yield Wanted(
            f"batch {batch}: every expert in memory / plain",
            ratio(("ours-all", 100), ("plain", 100), batch),
            1.02,
            False,
        )
        for share in shares:
            what, ours = f"batch {batch}, {share} %", ("device-managed", share)
            for name in ("vllm-uva", "vllm-prefetch"):
                yield Wanted(f"{what}: {name} / device-managed", ratio((name, share), ours, batch), 3.0, True)
            predicted = ratio((PREDICTING, share), ours, batch)
            yield Wanted(f"{what}: with prediction / without", predicted, 1.0, False)
            yield Wanted(
                f"{what}: host-managed / device-managed", ratio(("host-managed", share), ours, batch), 1.0, True
            )
    for share in shares:
        found = results.get(("device-managed", share))
        reached = None if found is None or link is None else link / found["prefill_seconds"]
        yield Wanted(f"{share} %: prefill, share of the link's speed", reached, 0.85, True)


def same_tokens(results: Results) -> Iterator[str]:
    """For each arm, whether it gave the tokens of the plain engine, batch by batch."""
    plain = results.get(("plain", 100))
    for (name, share), found in results.items():
        if plain is not None and found is not plain:
            same = [batch for batch, tokens in found["tokens"].items() if tokens == plain["tokens"][batch]]
            of_all = ", ".join(found["tokens"])
            yield f"{name}-{share}: tokens of the plain engine at batch {', '.join(same) or 'none'} of {of_all}"


def predicted(results: Results) -> Iterator[str]:
    """What prediction did in each arm that predicts."""
    for (name, share), found in results.items():
        if name == PREDICTING:
            stats = found["stats"]
            learned, loads, useful = (stats[key] for key in ("learned_tokens", "prefetches", "prefetch_useful"))
            nothing = "" if loads else ": NOTHING WAS PREDICTED, its times are those of device-managed"
            yield f"{name}-{share}: learned from {learned} tokens, {loads} speculative loads, {useful} useful{nothing}"


def report(results: Results, shape: Shape, options: argparse.Namespace) -> None:
    """Times, ratios, and what was wanted of them."""
    columns = "".join(f"{f'ms/token, batch {batch}':>20}" for batch in options.batches)
    print(f"\n{'':<22}{columns}{'prefill s':>12}{'GiB':>8}")
    for (name, share), found in results.items():
        times = "".join(f"{1e3 * found['tpot'][str(batch)]:>20.2f}" for batch in options.batches)
        memory = f"{found['device_bytes'] / 2**30:>8.1f}" if "device_bytes" in found else f"{'-':>8}"
        print(f"{f'{name}-{share}':<22}{times}{found['prefill_seconds']:>12.3f}{memory}")
    print()
    link = link_seconds(options.rates, shape, options.format)
    for one in (*wanted(results, options.batches, link), *forecasts(results, shape, options)):
        bound = f"{'>=' if one.at_least else '<='} {one.bound:g}"
        print(f"{one.what:<58}{'-' if one.ratio is None else f'{one.ratio:.3f}':>8}  {bound:<8} {one.state}")
    print(*same_tokens(results), *predicted(results), sep="\n")


def link_seconds(rates: Path | None, shape: Shape, fmt: str) -> float | None:
    """What all experts take through the link measured by ``integration.selftest``; None where it was not."""
    if rates is None or not rates.is_file():
        return None
    fastest = max(json.loads(rates.read_text()).get("copies_together", {"": 0}).values())
    return shape.layers * shape.experts * shape.expert_bytes(fmt) / fastest if fastest else None


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--shares", type=_numbers, default=[25, 50], help="percent of the experts in the GPU's memory")
    parser.add_argument("--batches", type=_numbers, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--only", help="names of arms, separated by commas")
    parser.add_argument("--settings", type=json.loads, default={}, help="further arguments of LLM(), JSON")
    parser.add_argument("--models", type=Path, default=Path("/tmp/random-models"))
    parser.add_argument("--rates", type=Path, help="what integration.selftest measured")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=600, help="seconds for all engines together")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.models / f"{options.shape}-{options.format}-{options.layers or 'all'}"
    shape = make(model, options.shape, options.format, options.layers)
    results: Results = {}
    for arm in arms(shape, options.format, options.shares):
        seconds = min(_EACH_SECONDS, deadline - time.monotonic())
        done = (options.out / f"{arm.name}-{arm.share}.json").exists()
        if options.only and arm.name not in options.only.split(","):
            continue
        if seconds < _LEAST_SECONDS and not done:
            print(f"{arm.name}-{arm.share}: no time left", flush=True)
            continue
        arguments = engine_arguments(model, arm, options.batches, options.prefill, options.settings)
        found = measure(arm, arguments, options, seconds)
        if found is not None:
            results[arm.name, arm.share] = found
    report(results, shape, options)
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
