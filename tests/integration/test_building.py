"""Which weights a store is built of, and for which checkpoint it is found again: real checkpoints, vLLM's own loaders.

vLLM reads some files of a folder and not others, lets the later of two tensors of one name win, and says nothing where
one is missing. A store must hold what vLLM would have computed with, or not come to be.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import build, unmet
from vllm_moe_offload.store import Store, StoreRoot

EXPERT = 3
GATE = f"model.layers.1.block_sparse_moe.experts.{EXPERT}.w1.weight"
Build = Callable[..., dict[str, Any]]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, str(Path(__file__).parent / "build_server.py")]
    with (tmp_path_factory.mktemp("server") / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    yield process
    assert process.stdin
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("mixtral", tmp_path_factory.mktemp("original") / "model").path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own; modification times differ from those of every other copy."""
    shutil.copytree(original, tmp_path / "model", copy_function=shutil.copy)
    return tmp_path / "model"


@pytest.fixture
def store(server: "subprocess.Popen[str]", tmp_path: Path) -> Build:
    """Build or find the store of a model folder in the root of this test; returns what the server answers."""

    def run(model: Path, *arguments: str, **environment: str) -> dict[str, Any]:
        job = {
            "model": str(model),
            "arguments": ["--dtype", "bfloat16", "--skip-tokenizer-init", "--enforce-eager", *arguments],
            "store": str(tmp_path / "stores"),
            "environment": environment,
        }
        assert server.stdin and server.stdout
        print(json.dumps(job), file=server.stdin, flush=True)
        line = server.stdout.readline()
        assert line, f"the server ended with {server.wait()}"
        return json.loads(line)

    return run


def tensors_of(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


def as_pt(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path)


def checksums(answer: dict[str, Any]) -> list[list[int]]:
    assert "error" not in answer, answer
    opened = Store.open(Path(answer["path"]))
    opened.close()
    return [layer.checksums for layer in opened.layers]


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[int, int]]:
    """(layer, expert) of every record that is not the same in both stores."""
    return [
        (layer, expert)
        for layer, (mine, other) in enumerate(zip(checksums(ours), checksums(theirs), strict=True))
        for expert, (one, two) in enumerate(zip(mine, other, strict=True))
        if one != two
    ]


def other_weights(tensors: Tensors) -> Tensors:
    return {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}


def test_a_load_format_that_reads_other_files_gets_a_store_of_its_own(store: Build, model: Path) -> None:
    as_pt(other_weights(tensors_of(model)), model / "other.pt")
    first = store(model)
    second = store(model, "--load-format", "pt")
    assert first["built"] and second["built"]
    assert len(differing(first, second)) == sum(map(len, checksums(first)))
    assert store(model)["path"] == first["path"] and not store(model, "--load-format", "pt")["built"]


def test_one_file_read_in_two_ways_has_one_store(store: Build, model: Path) -> None:
    assert store(model)["path"] == store(model, "--load-format", "safetensors")["path"]


def test_files_that_are_not_read_do_not_count_and_an_index_that_chooses_does(store: Build, model: Path) -> None:
    first = store(model)
    as_pt(other_weights(tensors_of(model)), model / "other.bin")
    assert store(model) == first | {"built": False}
    save_file(other_weights(tensors_of(model)), model / "model-v2.safetensors")
    index = {"weight_map": dict.fromkeys(tensors_of(model), "model-v2.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert store(model)["path"] != first["path"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hf-overrides", '{"num_experts_per_tok": 1}'],
        ["--dtype", "float32"],
        ["--hf-config-path", "{elsewhere}"],
    ],
    ids=lambda words: words[0],
)
def test_settings_that_change_records_or_routing_get_stores_of_their_own(
    store: Build, model: Path, tmp_path: Path, arguments: list[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = json.loads((model / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    first = store(model)
    assert store(model, *[word.replace("{elsewhere}", str(elsewhere)) for word in arguments])["path"] != first["path"]


def test_a_second_download_and_an_upgrade_of_transformers_find_the_store(store: Build, model: Path) -> None:
    first = store(model)
    again = model.with_name("again")
    shutil.copytree(model, again, copy_function=shutil.copy)
    os.utime(again / "model.safetensors", (1, 1))
    config = json.loads((model / "config.json").read_text())
    (again / "config.json").write_text(json.dumps(config | {"transformers_version": "99.0"}, indent=7))
    assert store(again) == first | {"built": False}


def test_of_a_tensor_that_comes_twice_the_later_counts_as_in_vllm(store: Build, model: Path) -> None:
    first = store(model)
    save_file({GATE: torch.ones_like(tensors_of(model)[GATE])}, model / "z.safetensors")
    second = store(model)
    assert differing(first, second) == [(1, EXPERT)]
    (model / "z.safetensors").rename(model / "a.safetensors")
    assert differing(first, store(model)) == []


def test_of_a_tensor_that_comes_twice_while_its_layer_is_incomplete_too(store: Build, model: Path) -> None:
    tensors = tensors_of(model)
    changed = tensors | {GATE: torch.ones_like(tensors[GATE])}
    save_file(changed, model / "model.safetensors")
    expected = store(model)
    (model / "model.safetensors").unlink()
    late = [name for name in tensors if ".experts.0." in name]
    as_pt({name: tensors[name] for name in tensors if name not in late}, model / "a.bin")
    as_pt({GATE: changed[GATE]} | {name: tensors[name] for name in late}, model / "b.bin")
    assert differing(expected, store(model)) == []


def test_a_tensor_that_comes_again_when_nothing_can_wait_for_it_is_refused(store: Build, model: Path) -> None:
    tensors = tensors_of(model)
    (model / "model.safetensors").unlink()
    as_pt(tensors, model / "a.bin")
    as_pt({GATE: tensors[GATE]}, model / "b.bin")
    answer = store(model)
    assert answer["error"].startswith("StoreError: cannot build a store: model.layers.1.")
    assert f"names w1 of expert {EXPERT} (w13_weight) more than once" in answer["error"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_a_missing_tensor_of_one_expert_is_named_and_nothing_is_kept(
    store: Build, model: Path, suffix: str, part: str, tmp_path: Path
) -> None:
    tensors = tensors_of(model)
    del tensors[GATE.replace("w1", part)]
    (model / "model.safetensors").unlink()
    (save_file if suffix == "safetensors" else as_pt)(tensors, model / f"model.{suffix}")
    answer = store(model)
    name = "w2_weight" if part == "w2" else "w13_weight"
    assert answer["error"].startswith("StoreError: cannot build a store: model.layers.1.")
    assert f"the checkpoint never brought {part} of expert {EXPERT} ({name}); vLLM itself" in answer["error"]
    assert StoreRoot(tmp_path / "stores").ls() == []


@pytest.mark.parametrize(("part", "named"), [("w3", "w3 of every expert"), ("w2", "nothing came for w2_weight")])
def test_a_missing_tensor_of_every_expert_is_named(store: Build, model: Path, part: str, named: str) -> None:
    tensors = {
        name: value
        for name, value in tensors_of(model).items()
        if "layers.1.block_sparse_moe.experts" not in name or part not in name
    }
    save_file(tensors, model / "model.safetensors")
    assert named in store(model)["error"]


def test_a_missing_scale_is_named(store: Build, tmp_path: Path) -> None:
    quantized = build("int8-w8a8", tmp_path / "quantized")
    if reason := unmet(quantized):
        pytest.skip(reason)
    tensors = tensors_of(quantized.path)
    name = next(
        name for name in tensors if "layers.1." in name and "experts.2." in name and "up_proj.weight_scale" in name
    )
    del tensors[name]
    save_file(tensors, quantized.path / "model.safetensors")
    assert "w3 of expert 2 (w13_weight_scale)" in store(quantized.path)["error"]


def test_a_missing_tensor_of_a_model_that_writes_by_itself_is_named(store: Build, tmp_path: Path) -> None:
    gpt_oss = build("gpt-oss", tmp_path / "gpt-oss")
    tensors = tensors_of(gpt_oss.path)
    del tensors[next(name for name in tensors if "layers.1." in name and "down_proj_bias" in name)]
    save_file(tensors, gpt_oss.path / "model.safetensors")
    assert "the checkpoint never brought w2_bias of every expert" in store(gpt_oss.path)["error"]


def test_a_disk_too_small_for_the_whole_store_is_refused_before_the_first_record(
    store: Build, model: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "stores"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        said = store(model)["error"]
        assert re.match(r"StoreError: cannot build the store at .*: it needs 2\.2 MiB, 1\.\d MiB are free", said)
        assert StoreRoot(disk).ls() == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
