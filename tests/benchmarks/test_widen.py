"""widen.py: every weight is kept, every added one is zero, and plain vLLM says the same as before."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from widen import WideModel, make_wide

from tests.e2e.engines import PlainServer

TEXTS = ["def add(a, b):", "Question: Tom has 3 apples and buys 4.", "Shall I compare thee", "impl Iterator for"]


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
    tokenizer = Tokenizer.from_file(str(tiny_moe / "tokenizer.json"))
    rounds = [{"prompts": [tokenizer.encode(text).ids for text in TEXTS], "tokens": 32}]
    with closing(PlainServer(tmp_path / "log")) as server:
        tiny, widened = (
            server.run(model, {"enforce_eager": True}, rounds)["rounds"] for model in (tiny_moe, wide.path)
        )
    assert tiny == widened
