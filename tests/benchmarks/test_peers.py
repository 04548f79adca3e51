"""peers.py: who takes part and on what terms, and that who cannot is named; ours and plain vLLM run for real."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from footprint import GIB, Allowance
from memory import V1, V2
from peer_engines import Peer, Weights
from peers import earlier_rounds, leading_equal, parse_options, table
from rich.console import Console

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers.py"


def test_a_peer_is_a_kind_and_perhaps_a_read_ahead() -> None:
    assert Peer.parse("llama-bf16@128") == Peer("llama-bf16", 128)
    assert [Peer.parse(text).name for text in ("ours", "accelerate@512")] == ["ours", "accelerate@512"]
    assert [Peer(kind).gguf_type for kind in ("llama-f16", "accelerate")] == ["f16", None]


@pytest.mark.parametrize("text", ["", "llama", "llama-q4", "ours@", "ours@fast", "ours@-1"])
def test_what_is_no_peer_is_refused_with_those_there_are(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse_options([str(tmp_path), "--share", "25%", "--peers", text])
    assert f"--peers {text}: no such peer; there are plain, ours, llama-bf16" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0.25", "0%", "101%", "a%"])
def test_what_is_no_share_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_options([str(tmp_path), "--share", text])
    assert f"--share {text}: must be above 0%" in capsys.readouterr().err


def test_memory_is_limited_in_one_way(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert parse_options([str(tmp_path), "--share", "12.5%"]).share == 0.125
    for both_or_none in ([], ["--share", "25%", "--memory-limit", "4GiB"]):
        with pytest.raises(SystemExit):
            parse_options([str(tmp_path), *both_or_none])
        assert "--memory-limit" in capsys.readouterr().err


def test_weights_are_counted_by_what_they_belong_to(tiny_moe: Path) -> None:
    weights = Weights.of(tiny_moe)
    assert weights.experts == 8 * 64 * 3 * 192 * 64 * 2
    stored = sum(file.stat().st_size for file in tiny_moe.glob("*.safetensors"))
    assert 0.99 * stored < weights.experts + weights.others < stored


def test_tokens_agree_up_to_the_first_that_differs() -> None:
    assert leading_equal([1, 2, 3], [1, 2, 3]) == 3
    assert leading_equal([1, 9, 3], [1, 2, 3]) == 1
    assert leading_equal([9], [1, 2]) == 0


def _run(seconds: float, tokens: list[int]) -> dict[str, Any]:
    return {"tpot": [seconds], "ttft": 10 * seconds, "peak_bytes": GIB, "tokens": [tokens]}


def test_the_table_pairs_rounds_and_shows_limits_and_who_failed() -> None:
    rounds = [
        {"plain": _run(0.01, [1, 2]), "ours": _run(0.1, [1, 2]), "llama-bf16": _run(0.2, [1, 3])},
        {"plain": _run(0.01, [1, 2]), "ours": _run(0.5, [1, 2]), "llama-bf16": _run(1.5, [1, 3])},
    ]
    allowances = {
        "plain": Allowance(None, 4 * GIB),
        "ours": Allowance(3 * GIB, GIB),
        "llama-bf16": Allowance(2 * GIB, GIB),
    }
    out = StringIO()
    Console(file=out, width=250).print(table("t", rounds, allowances, {"accelerate": "no module"}, 4 * GIB))
    lines = {line.split("│")[1].strip(): line for line in out.getvalue().splitlines() if line.startswith("│")}
    assert "2.50 (2.00-3.00)" in lines["llama-bf16"] and "1 of 2" in lines["llama-bf16"]
    assert " 2.00 " in lines["llama-bf16"] and "25%" in lines["llama-bf16"]
    assert "none" in lines["plain"] and "100%" in lines["plain"]
    assert "6.00 (2.00-10.00)" in lines["ours"] and "2 of 2" in lines["ours"]
    assert "FAILED: no module" in lines["accelerate"]


def test_rounds_of_an_earlier_call_are_kept_only_where_it_measured_the_same(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    settings = {"tokens": 32, "limits": {"ours": 5}}
    assert earlier_rounds(file, settings) == []
    rounds = [{"ours": _run(0.1, [1])}]
    file.write_text(json.dumps({"settings": settings, "comparison": {"batches": {"1": {"rounds": rounds}}}}))
    assert earlier_rounds(file, settings) == rounds
    with pytest.raises(ValueError, match="another limits; name another file"):
        earlier_rounds(file, {"tokens": 32, "limits": {"ours": 6}})


def test_ours_runs_in_its_limit_and_peers_that_cannot_start_are_named(tmp_path: Path) -> None:
    cgroups = V1 if V1.is_dir() else V2
    if not os.access(cgroups, os.W_OK) or not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        pytest.skip("needs root: memory cgroups and drop_caches")
    out = tmp_path / "out.json"
    missing = str(tmp_path / "nowhere" / "python")
    options = ["--memory-limit", "6GiB", "--eager", "--tokens", "3", "--json", str(out), "--llama-python", missing]
    command = [sys.executable, str(PEERS), str(tmp_path / "peers"), *options, "--peers", "ours,llama-bf16,plain"]
    # importing vLLM takes longer than what these engines do: one process each
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run([*command, "--rounds", "1"], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert list(result["comparison"]["failures"]) == ["llama-bf16"]
    assert missing in result["comparison"]["failures"]["llama-bf16"]
    assert result["settings"]["limits"] == {"ours": 6 * GIB, "plain": None}
    (results,) = result["comparison"]["batches"]["1"]["rounds"]
    assert results["ours"]["tokens"] == results["plain"]["tokens"]
    assert len(results["ours"]["tokens"][0]) == 3

    again = subprocess.run([*command, "--rounds", "0"], env=os.environ, capture_output=True, text=True, timeout=900)
    assert "3 tokens, 1 rounds" in again.stdout, again.stdout + again.stderr
    assert len(json.loads(out.read_text())["comparison"]["batches"]["1"]["rounds"]) == 1
