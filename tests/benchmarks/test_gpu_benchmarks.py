"""benchmarks/gpu as far as it goes without a GPU: the models it makes, what it compares, and its script's parts."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import Arm, Wanted, arms, engine_arguments, forecasts, link_seconds, measure, same_tokens, wanted
from forecast import measured_profile
from random_model import SHAPES, make
from safetensors import safe_open

from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import write_trace

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TINY = SHAPES["tiny"]

CHECK_MANAGER = """
import sys
sys.path.insert(0, "benchmarks/gpu")
from manager import Case, Model, differences, measure
from tests.device.virtual import VirtualDevice
from vllm_moe_offload.windows import device_managed

device = VirtualDevice(0, main_is_host=True)
case = Case("tiny", 1, 8, 4, 2, 4096)
found = measure(device, case, steps=4)
assert found["differences"] == 0, found
assert found["hit_us_per_layer"] > 0 and found["bytes_per_second"] > 0
right = Model.step
Model.step = lambda self, ids: right(self, ids[:, ::-1] // 2)
assert differences(device, case, 4) == 1, "the layer was asked for others than the policy"
"""


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
def test_a_random_model_has_every_tensor_of_its_shape(tmp_path: Path, fmt: str) -> None:
    assert make(tmp_path, "tiny", fmt, layers=1) == TINY._replace(layers=1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert set(tensors) == set(index["weight_map"])
    assert sum(tensor.nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
    expert = {name: t for name, t in tensors.items() if name.startswith("model.layers.0.mlp.experts.3.")}
    assert sum(tensor.nbytes for tensor in expert.values()) == TINY.expert_bytes(fmt)
    down = expert["model.layers.0.mlp.experts.3.down_proj.weight"]
    assert down.shape == (TINY.hidden, TINY.expert_width)
    values = down.float()
    if fmt == "fp8":
        assert down.dtype == torch.float8_e4m3fn
        values = values * expert["model.layers.0.mlp.experts.3.down_proj.weight_scale_inv"][0, 0]
    assert values.std().item() == pytest.approx(TINY.expert_width**-0.5, rel=0.1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == (fmt == "fp8")


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    make(tmp_path, "tiny", "bf16", None)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_vllms_own_offloading_has_as_much_memory_as_ours() -> None:
    found = {(arm.name, arm.share): arm for arm in arms(TINY, "bf16", [25, 50])}
    everything = TINY.layers * TINY.experts * TINY.expert_bytes("bf16")
    assert found["vllm-uva", 25].engine["cpu_offload_gb"] * 2**30 == pytest.approx(0.75 * everything)
    assert found["vllm-prefetch", 25].engine["offload_num_in_group"] == 3
    assert found["vllm-prefetch", 50].engine["offload_num_in_group"] == 2
    assert found["device-managed", 25].offload == {"cache": "25%", "predictor": "none"}
    assert found["with-prediction", 25].offload == {"cache": "25%", "predictor": "history", "history": "off"}
    in_pieces = engine_arguments(Path("m"), found["host-managed-pieces", 25], [1, 8], 256, {})["compilation_config"]
    assert (in_pieces["mode"], in_pieces["cudagraph_mode"]) == (3, "PIECEWISE")
    for arm in found.values():
        arguments = engine_arguments(Path("m"), arm, [1, 8], 256, {"seed": 3})
        assert arguments["moe_backend"] == "triton" and arguments["seed"] == 3
        assert ("additional_config" in arguments) == (arm.offload is not None)


def result(tpot: float, prefill: float = 1.0, tokens: int = 1) -> dict:
    return {"tpot": {"1": tpot}, "prefill_seconds": prefill, "tokens": {"1": [[tokens]]}}


def test_ratios_are_judged_by_what_was_wanted() -> None:
    results = {
        ("plain", 100): result(1.0),
        ("ours-all", 100): result(1.01),
        ("device-managed", 25): result(2.0, prefill=0.5),
        ("with-prediction", 25): result(2.2, tokens=2),
        ("vllm-uva", 25): result(6.0),
    }
    states = {one.what: (one.ratio and round(one.ratio, 2), one.state) for one in wanted(results, [1], link=0.45)}
    assert states == {
        "batch 1: every expert in memory / plain": (1.01, "yes"),
        "batch 1, 25 %: vllm-uva / device-managed": (3.0, "yes"),
        "batch 1, 25 %: vllm-prefetch / device-managed": (None, "not measured"),
        "batch 1, 25 %: with prediction / without": (1.1, "NO"),
        "batch 1, 25 %: host-managed / device-managed": (None, "not measured"),
        "25 %: prefill, share of the link's speed": (0.9, "yes"),
    }
    assert Wanted("", 1.03, 1.02, False).state == Wanted("", 2.9, 3.0, True).state == "NO"
    lines = {line.partition(":")[0]: line for line in same_tokens(results)}
    assert "batch 1 of 1" in lines["vllm-uva-25"] and "batch none of 1" in lines["with-prediction-25"]


def test_the_link_is_what_was_measured(tmp_path: Path) -> None:
    assert link_seconds(None, TINY, "bf16") is link_seconds(tmp_path / "absent", TINY, "bf16") is None
    (tmp_path / "rates.json").write_text(json.dumps({"copies_together": {"1": 1e9, "2": 2e9}}))
    whole = TINY.layers * TINY.experts * TINY.expert_bytes("bf16")
    assert link_seconds(tmp_path / "rates.json", TINY, "bf16") == pytest.approx(whole / 2e9)


def test_device_managed_decoding_is_compared_with_its_forecast(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"gather": {"4": 1e9, "64": 2e9}}))
    (tmp_path / "manager.json").write_text(json.dumps([{"hit_us_per_layer": 5.0}, {"hit_us_per_layer": 7.0}]))
    profile = measured_profile(0.002, 2, tmp_path / "rates.json", tmp_path / "manager.json")
    assert profile is not None and profile.bytes_per_second == 2e9 and profile.layer_overhead_seconds == 0.001
    assert profile.manager is not None and profile.manager.device_seconds == pytest.approx(7e-6)
    rng = np.random.default_rng(0)
    chosen = rng.random((40, TINY.layers, TINY.experts)).argsort(axis=2)[:, :, : TINY.top_k].astype(np.uint8)
    weights = np.full(chosen.shape, 1 / TINY.top_k, np.float16)
    write_trace(tmp_path / "recording-50.trace", Trace(chosen, weights, np.array([0, 40]), TINY.experts))
    results = {("plain", 100): result(0.002), ("device-managed", 50): result(0.0025)}
    (one,) = forecasts(results, TINY, Namespace(out=tmp_path, rates=tmp_path / "rates.json", format="bf16"))
    load = TINY.expert_bytes("bf16") / 2e9
    assert one.ratio is not None and 0.0025 / (0.00202 + 4 * load) < one.ratio < 0.0025 / 0.002014
    (tmp_path / "recording-50.trace").unlink()
    (one,) = forecasts(results, TINY, Namespace(out=tmp_path, rates=tmp_path / "rates.json", format="bf16"))
    assert one.state == "not measured"


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    (tmp_path / "plain-100.json").write_text(json.dumps(result(5.0)))
    assert measure(Arm("plain", 100, {}), {}, Namespace(out=tmp_path), 1.0) == result(5.0)


def test_the_manager_is_measured_and_its_decisions_are_compared() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK_MANAGER],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def script(out: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), str(out), *parts]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_the_script_runs_parts_once_and_goes_on_after_one_that_fails(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\necho "ran $2"\n[[ "$*" != *manager* ]]\n')
    fake.chmod(0o755)
    first = script(tmp_path / "out", "rates", "manager", "selftest", PYTHON=str(fake))
    assert "manager: FAILED" in first.stdout and "selftest: 0 s" in first.stdout.replace("1 s", "0 s")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.done")) == ["rates.done", "selftest.done"]
    second = script(tmp_path / "out", "rates", "manager", PYTHON=str(fake))
    assert "rates: finished before" in second.stdout and "ran vllm_moe_offload" in second.stdout
    assert "manager: FAILED" in second.stdout
    assert "no time left" in script(tmp_path / "out", "manager", PYTHON=str(fake), BUDGET="5").stdout
    assert script(tmp_path / "out", "dance").returncode == 2


def test_the_script_compares_with_the_arguments_it_should(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    fake.chmod(0o755)
    said = script(tmp_path / "out", "bf16", PYTHON=str(fake), SETTINGS='{"dtype": "float16"}').stdout
    assert '|--settings|{"dtype": "float16"}|' in said and f"|--rates|{tmp_path}/out/rates.json|" in said
    assert "|--settings|{}|" in script(tmp_path / "out2", "fp8", PYTHON=str(fake)).stdout
