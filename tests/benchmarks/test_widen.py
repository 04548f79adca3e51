"""widen.py: every weight is kept, every added one is zero, and plain vLLM says the same as before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from widen import WideModel, make_wide

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    prompts = ["def add(a, b):", "Question: Tom has 3 apples and buys 4.", "Shall I compare thee", "impl Iterator for"]
    parameters = SamplingParams(temperature=0, max_tokens=32, logprobs=1, ignore_eos=True)
    results = []
    for model in sys.argv[1:]:
        llm = LLM(model, enforce_eager=True, max_model_len=256, max_num_seqs=4, gpu_memory_utilization=0.2)
        outputs = [request.outputs[0] for request in llm.generate(prompts, parameters)]
        logprobs = [[entry[token].logprob for token, entry in zip(o.token_ids, o.logprobs)] for o in outputs]
        results.append([[list(o.token_ids) for o in outputs], logprobs])
        llm.llm_engine.engine_core.shutdown()
    print("RESULT", json.dumps(results))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_moe: Path) -> WideModel:
    return make_wide(tmp_path_factory.mktemp("wide") / "model", 160, tiny_moe)


def test_weights_are_kept_and_padding_is_zero(wide: WideModel, tiny_moe: Path) -> None:
    index = json.loads((wide.path / "model.safetensors.index.json").read_text())
    padded = 0
    with safe_open(tiny_moe / "model.safetensors", "pt") as source:
        names = list(source.keys())
        assert set(index["weight_map"]) == set(names)
        for name in names:
            with safe_open(wide.path / index["weight_map"][name], "pt") as target:
                old, new = source.get_tensor(name), target.get_tensor(name)
            inside = new[tuple(slice(size) for size in old.shape)]
            assert inside.equal(old), name
            assert new.count_nonzero() == old.count_nonzero(), name
            padded += new.numel() - old.numel()
    assert padded == 512 * 3 * 192 * (160 - 64)
    assert wide.record_bytes == 3 * 192 * 160 * 2
    assert wide.expert_bytes == 512 * wide.record_bytes
    assert index["metadata"]["total_size"] == wide.total_bytes


def test_a_finished_model_is_kept_and_another_width_refused(wide: WideModel, tiny_moe: Path) -> None:
    shard = next(wide.path.glob("*.safetensors"))
    before = shard.stat().st_mtime_ns
    assert make_wide(wide.path, 160, tiny_moe) == wide
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="remove it or name another"):
        make_wide(wide.path, 192, tiny_moe)


@pytest.mark.parametrize("intermediate", [32, 100])
def test_impossible_widths_are_refused_and_leave_nothing(tmp_path: Path, tiny_moe: Path, intermediate: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32, at least 64"):
        make_wide(tmp_path / "model", intermediate, tiny_moe)
    assert list(tmp_path.iterdir()) == []


def test_plain_vllm_gives_the_same_tokens_and_logprobs(wide: WideModel, tiny_moe: Path, tmp_path: Path) -> None:
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_moe), str(wide.path)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tiny, widened = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    assert tiny == widened
