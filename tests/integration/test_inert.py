"""Promise 6: installed and not asked for, the plugin changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.compiler_cache import use_compiler_cache
from tests.models import Checkpoint, build

ENGINE = Path(__file__).with_name("inert_engine.py")


def run(model: Checkpoint, folder: Path, plugin: str) -> dict[str, Any]:
    """A compiled engine with caches of its own, but for what ``g++`` makes of the same input."""
    compiled = folder.parent / "compiled"
    compiled.mkdir(exist_ok=True)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "VLLM_MOE_OFFLOAD_STORE_ROOT": str(folder / "stores"),
    }
    result = subprocess.run(
        [sys.executable, str(ENGINE), str(model.path), json.dumps(model.engine_args), plugin],
        env={name: value for name, value in os.environ.items() if name != "VLLM_MOE_OFFLOAD"}
        | environment
        | use_compiler_cache(compiled),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert not (folder / "stores").exists()
    graphs = folder / "vllm" / "torch_compile_cache"
    answer = json.loads(result.stderr.strip().splitlines()[-1])
    return answer | {"graphs": sorted(str(path.relative_to(graphs)) for path in graphs.glob("*/*"))}


def test_installed_but_off_is_as_if_not_installed(tmp_path: Path) -> None:
    model = build("mixtral", tmp_path / "mixtral")
    hidden = run(model, tmp_path / "hidden", "hidden")
    installed = run(model, tmp_path / "installed", "installed")
    assert (hidden.pop("loaded"), installed.pop("loaded")) == (False, True)
    assert len(installed["graphs"]) > 0
    assert installed == hidden
