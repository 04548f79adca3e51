"""`vllm-moe-offload plan`: what it prints, as a table and as JSON, and how it refuses what it cannot plan for."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.plan.planning import Plan

ROOT = Path(__file__).parents[2]
TINY_MOE = ROOT / "examples" / "models" / "tiny-moe"
TRACE = ROOT / "examples" / "traces" / "gpt-oss-20b-small.npz"
GPU = ("--hardware", "rtx4090-pcie4", "--host-memory", "1GiB")


def plan(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_table_and_the_answer() -> None:
    code, out, _ = plan(str(TINY_MOE), *GPU, "--memory", "900MiB", "--context", "1k", "--concurrency", "2")
    assert code == 0
    assert "Qwen3MoeForCausalLM, 8 MoE layers of 64 experts, top-4" in out
    assert "experts: 36.0 MiB in all, 72.0 KiB each" in out
    assert "decoding on rtx4090-pcie4 (as described)" in out
    assert "bundled statistics of tiny-moe" in out
    assert f"vllm serve {TINY_MOE} --max-model-len 1024 --max-num-seqs 2" in out
    assert "do not: the whole model fits into fast memory anyway" in out


def test_json_is_one_object_of_a_known_shape() -> None:
    code, out, _ = plan(str(TINY_MOE / "config.json"), *GPU, "--memory", "720MiB", "--context", "1024", "--json")
    assert code == 0
    made = msgspec.json.decode(out, type=Plan)
    assert not made.model.exact and made.context == 1024
    assert json.loads(out)["tiers"]["fast_name"] == "VRAM"


def test_it_needs_neither_vllm_nor_torch_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from vllm_moe_offload.cli import app\n"
        f"app(['plan', {str(TINY_MOE)!r}, '--store', {str(tmp_path)!r}, '--hardware', 'measure', '--memory', '1500MB'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "decoding on this machine (measured)" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/model"], "MODEL no/such/model: there is no such file or folder"),
        ([str(TINY_MOE), "--hardware", "abacus"], "hardware: 'abacus' is no profile and no file"),
        ([str(TINY_MOE), "--memory", "plenty"], "'plenty' is not a size like '4GiB'"),
        ([str(TINY_MOE), "--memory", "0"], "'0' is no memory at all"),
        ([str(TINY_MOE), "--context", "long"], "'long' is no number of tokens like 8192, 8k or 1m"),
        ([str(TINY_MOE), "--context", "0"], "'0' is no number of tokens"),
        ([str(TINY_MOE), "--concurrency", "0"], "--concurrency"),
        ([str(TINY_MOE), *GPU, "--trace", str(TRACE)], "give a trace of this model, or none"),
        ([str(TINY_MOE), *GPU, "--trace", "no.trace"], "no.trace: no such trace file"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_planned_for_is_said_in_a_sentence(arguments: list[str], said: str) -> None:
    code, _, error = plan(*arguments)
    assert code == 2
    assert said in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
