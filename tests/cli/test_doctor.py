"""`vllm-moe-offload doctor` on this machine, and on ones where something is wrong."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vllm_moe_offload.cli.check import BROKEN, HINT, OK, WARNING
from vllm_moe_offload.cli.checks import (
    check_kernels,
    check_plugin,
    check_seams,
    check_slot_memory,
    check_store_root,
    check_tcmalloc,
    check_vllm,
)
from vllm_moe_offload.errors import UnsupportedError
from vllm_moe_offload.integration.seam import Seam
from vllm_moe_offload.integration.seams import SEAMS, refuse_where_moved

MOVE = """
import importlib
module = importlib.import_module({module!r})
{change}
from vllm_moe_offload.cli import app
app(["doctor"])
"""


def doctor(code: str = "from vllm_moe_offload.cli import app; app(['doctor'])", **environment: str):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_everything_is_in_place_here(tmp_path: Path) -> None:
    result = doctor(VLLM_MOE_OFFLOAD_STORE_ROOT=str(tmp_path / "stores"))
    assert (result.returncode, BROKEN in result.stdout) == (0, False), result.stdout + result.stderr
    for seam in SEAMS:
        assert f"{seam.path} " in result.stdout
    assert str(tmp_path / "stores") in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "change", "reason"),
    [
        (
            "vllm.v1.core.kv_cache_manager",
            "del module.KVCacheManager.evict_blocks",
            "broken: KVCacheManager.evict_blocks: vllm.v1.core.kv_cache_manager.KVCacheManager.evict_blocks is gone",
        ),
        (
            "vllm.model_executor.model_loader.base_loader",
            "module.BaseModelLoader.load_model = lambda self, vllm_config, prefix: None",
            "broken: BaseModelLoader.load_model: "
            "vllm.model_executor.model_loader.base_loader.BaseModelLoader.load_model no longer takes model_config",
        ),
    ],
)
def test_a_seam_that_moved_is_named(module: str, change: str, reason: str) -> None:
    result = doctor(MOVE.format(module=module, change=change))
    assert result.returncode == 1
    complaints = [line for line in result.stderr.splitlines() if line.startswith("broken: ")]
    assert len(complaints) == 1 and complaints[0].startswith(reason)


SERVING = Seam("no_such_module", "function", "serve")
FEATURE = Seam("no_such_module", "other", "juggle", feature="the juggling")
THERE = Seam("pathlib", "Path", "name files")


def test_a_seam_is_graded_by_what_is_lost_without_it() -> None:
    serving, feature, there = check_seams([SERVING, FEATURE, THERE])
    assert (serving.state, feature.state, there.state) == (BROKEN, WARNING, OK)
    assert "no_such_module.other is gone" in feature.detail and "lost without it: the juggling" in feature.detail


def test_a_feature_whose_seam_moved_is_refused_by_name_and_left_unwrapped() -> None:
    FEATURE.wrap(lambda function: function)
    with pytest.raises(UnsupportedError, match=r"the juggling does not work with this vLLM: .*no_such_module\.other"):
        refuse_where_moved("the juggling", [THERE, SERVING, FEATURE])
    refuse_where_moved("the singing", [THERE, SERVING, FEATURE])


def test_only_what_breaks_serving_ends_with_1() -> None:
    moved = "module.CPURouter._compute_routing = lambda self: None"
    result = doctor(MOVE.format(module="vllm.model_executor.layers.fused_moe.router.cpu_router", change=moved))
    assert result.returncode == 0, result.stderr
    assert "lost without it: the predictor 'gate'" in result.stderr
    assert "broken: " not in result.stderr


def test_a_vllm_whose_kernels_all_route_inside_is_broken_and_says_which_to_install() -> None:
    assert check_kernels(["CPUUnquantizedExperts"]).state == OK
    check = check_kernels([])
    assert check.state == BROKEN and "install >= 0.30, < 0.33" in check.detail


@pytest.mark.parametrize(
    ("number", "state"), [("0.32.0+cpu", OK), ("0.30.1", OK), ("0.29.0", WARNING), ("0.33.0", WARNING), (None, BROKEN)]
)
def test_a_version_nobody_has_tried_is_a_warning(
    number: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_moe_offload.cli.checks.installed_version", lambda: number)
    assert check_vllm().state == state


@pytest.mark.parametrize(
    ("names", "state"),
    [(None, OK), ("moe-offload", OK), ("resolver,moe-offload", OK), ("resolver", BROKEN), ("", BROKEN)],
)
def test_a_vllm_told_to_load_other_plugins_is_found(names: str | None, state: str) -> None:
    check = check_plugin(names)
    assert check.state == state
    if state == BROKEN:
        assert f"VLLM_PLUGINS={names!r} does not name 'moe-offload'" in check.detail
        assert check_plugin(check.detail.rpartition("VLLM_PLUGINS='")[2].removesuffix("'")).state == OK


def test_doctor_looks_at_the_environment_it_runs_in() -> None:
    result = doctor(VLLM_PLUGINS="lora_filesystem_resolver")
    assert result.returncode == 1
    assert "broken: plugin: VLLM_PLUGINS='lora_filesystem_resolver' does not name 'moe-offload'" in result.stderr


def test_a_torchvision_of_another_build_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    result = doctor(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "operator torchvision::nms does not exist" in result.stderr
    assert "pip uninstall torchvision" in result.stderr


@pytest.mark.parametrize(
    ("seam", "problem"),
    [
        (Seam("pathlib", "Path.read_text", "", ("self", "encoding")), None),
        (Seam("pathlib", "Path.read_poem", ""), "pathlib.Path.read_poem is gone"),
        (Seam("no_such_module", "anything", ""), "no_such_module.anything is gone (No module named 'no_such_module')"),
        (Seam("pathlib", "Path.read_text", "", ("verse",)), "pathlib.Path.read_text no longer takes verse"),
    ],
)
def test_a_probe_says_what_moved(seam: Seam, problem: str | None) -> None:
    found = seam.problem()
    assert found == problem if problem is None else (found or "").startswith(problem)


def test_a_store_root_that_cannot_be_written_is_broken_and_says_what_to_set() -> None:
    (check,) = check_store_root(Path("/proc/1/stores"))
    assert check.state == BROKEN
    assert "/proc/1/stores cannot be written" in check.detail and "VLLM_MOE_OFFLOAD_STORE_ROOT" in check.detail


def test_a_store_root_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    place, direct = check_store_root(tmp_path / "not" / "yet")
    assert place.state == OK and direct.state in (OK, HINT)
    assert list(tmp_path.iterdir()) == []


def test_tcmalloc_is_a_hint_only_where_nobody_preloads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert check_tcmalloc(bundled=False).state == HINT
    assert check_tcmalloc(bundled=True).state == OK
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    assert check_tcmalloc(bundled=False).state == OK


def test_the_memory_of_slots_is_tried_and_a_hint_names_the_command() -> None:
    for check in check_slot_memory():
        assert check.state == OK or (check.state == HINT and "as root, echo " in check.detail)


def test_huge_pages_that_a_process_may_have_and_does_not_get_are_a_hint() -> None:
    without = """
        import ctypes
        assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
        from vllm_moe_offload.cli.checks import check_slot_memory
        print(*(check.state for check in check_slot_memory()))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(without)], capture_output=True, text=True, timeout=60)
    assert ran.stdout == f"{HINT} {HINT}\n", ran.stderr
