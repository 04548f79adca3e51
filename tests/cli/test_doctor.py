"""`vllm-moe-offload doctor` on this machine, and on ones where something is wrong."""

import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.cli.check import OK, PROBLEM, WARNING, Check
from vllm_moe_offload.cli.checks import (
    check_kernels,
    check_plugin,
    check_seams,
    check_tcmalloc,
    check_vllm,
)
from vllm_moe_offload.cli.doctor import findings_table
from vllm_moe_offload.cli.memory_check import check_slot_memory
from vllm_moe_offload.cli.process_check import (
    BINDING,
    check_locks,
    check_openmp_binding,
    check_preloads,
    check_shared_memory,
)
from vllm_moe_offload.cli.storage_check import check_history, check_rates, check_store_root, check_stores
from vllm_moe_offload.errors import UnsupportedError
from vllm_moe_offload.integration.seam import Seam
from vllm_moe_offload.integration.seams import SEAMS, refuse_where_moved

DOCTOR = "from vllm_moe_offload.cli import app; app(['doctor'])"


def doctor(code: str = DOCTOR, **environment: str):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_everything_is_in_place_here(tmp_path: Path) -> None:
    code = "from vllm_moe_offload.cli import app; app(['doctor', '--json'])"
    result = doctor(code, VLLM_MOE_OFFLOAD_STORE_ROOT=str(tmp_path / "stores"))
    found = json.loads(result.stdout)
    assert (result.returncode, found["problems"]) == (0, 0), result.stdout + result.stderr
    checks = found["checks"]
    assert {seam.path for seam in SEAMS} <= {check["subject"] for check in checks}
    by_subject = {check["subject"]: check for check in checks}
    assert by_subject["versions"]["detail"].startswith(f"vllm-moe-offload {version('vllm-moe-offload')}, Python 3.")
    assert str(tmp_path / "stores") in by_subject["store root"]["detail"]
    assert "GB/s" in by_subject["disk bandwidth"]["detail"] and "GB/s" in by_subject["memory bandwidth"]["detail"]
    assert [check["subject"] for check in checks if check["state"] != OK and not check["remedy"]] == []
    assert found["warnings"] == sum(check["state"] == WARNING for check in checks)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


MOVED = {
    "vllm.v1.core.kv_cache_manager": "del module.KVCacheManager.evict_blocks",
    "vllm.model_executor.model_loader.base_loader": (
        "module.BaseModelLoader.load_model = lambda self, vllm_config, prefix: None"
    ),
    "vllm.model_executor.layers.fused_moe.router.cpu_router": "module.CPURouter._compute_routing = lambda self: None",
}


def test_seams_that_moved_are_named() -> None:
    changes = [f"module = importlib.import_module({name!r}); {change}" for name, change in MOVED.items()]
    result = doctor("\n".join(["import importlib", *changes, DOCTOR]))
    assert result.returncode == 1
    loading, evicting = sorted(line for line in result.stderr.splitlines() if line.startswith("problem: "))
    assert "BaseModelLoader.load_model no longer takes model_config" in loading
    assert "kv_cache_manager.KVCacheManager.evict_blocks is gone" in evicting
    assert "lost without it: the predictor 'gate'" in result.stderr


@pytest.mark.parametrize(("states", "code"), [((OK,), 0), ((OK, WARNING), 0), ((WARNING, PROBLEM), 1)])
def test_only_a_problem_ends_with_1(states: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check(f"part {number}", state, "as it is", "mend it") for number, state in enumerate(states)]
    monkeypatch.setattr(sys.modules[findings_table.__module__], "all_checks", lambda: iter(checks))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert result.stderr == "".join(
        f"{check.state}: {check.subject}: as it is: mend it\n" for check in checks if check.state != OK
    )
    assert all(check.subject in result.stdout for check in checks)


SERVING = Seam("no_such_module", "function", "serve")
FEATURE = Seam("no_such_module", "other", "juggle", feature="the juggling")
THERE = Seam("pathlib", "Path", "name files")


def test_a_seam_is_graded_by_what_is_lost_without_it() -> None:
    serving, feature, there = check_seams([SERVING, FEATURE, THERE])
    assert (serving.state, feature.state, there.state) == (PROBLEM, WARNING, OK)
    assert "no_such_module.other is gone" in feature.detail and "lost without it: the juggling" in feature.detail


def test_a_feature_whose_seam_moved_is_refused_by_name_and_left_unwrapped() -> None:
    FEATURE.wrap(lambda function: function)
    with pytest.raises(UnsupportedError, match=r"the juggling does not work with this vLLM: .*no_such_module\.other"):
        refuse_where_moved("the juggling", [THERE, SERVING, FEATURE])
    refuse_where_moved("the singing", [THERE, SERVING, FEATURE])


def test_a_vllm_whose_kernels_all_route_inside_is_broken_and_says_which_to_install() -> None:
    assert check_kernels(["CPUUnquantizedExperts"]).state == OK
    check = check_kernels([])
    assert check.state == PROBLEM and check.remedy == "install vLLM >= 0.30, < 0.33"


@pytest.mark.parametrize(
    ("number", "state"), [("0.32.0+cpu", OK), ("0.30.1", OK), ("0.29.0", WARNING), ("0.33.0", WARNING), (None, PROBLEM)]
)
def test_a_version_nobody_has_tried_is_a_warning(
    number: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_moe_offload.cli.checks.installed_version", lambda: number)
    assert check_vllm().state == state


@pytest.mark.parametrize(
    ("names", "state"),
    [(None, OK), ("moe-offload", OK), ("resolver,moe-offload", OK), ("resolver", PROBLEM), ("", PROBLEM)],
)
def test_a_vllm_told_to_load_other_plugins_is_found(names: str | None, state: str) -> None:
    check = check_plugin(names)
    assert check.state == state
    if state == PROBLEM:
        assert f"VLLM_PLUGINS={names!r} does not name 'moe-offload'" in check.detail
        assert check_plugin(check.remedy.rpartition("VLLM_PLUGINS='")[2].removesuffix("'")).state == OK


def test_doctor_looks_at_the_environment_it_runs_in(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    result = doctor(PYTHONPATH=str(tmp_path), VLLM_PLUGINS="lora_filesystem_resolver")
    assert result.returncode == 1
    assert "operator torchvision::nms does not exist" in result.stderr
    assert "pip uninstall torchvision" in result.stderr
    assert "problem: plugin: VLLM_PLUGINS='lora_filesystem_resolver' does not name 'moe-offload'" in result.stderr


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
    assert check.state == PROBLEM
    assert "/proc/1/stores cannot be written" in check.detail and "VLLM_MOE_OFFLOAD_STORE_ROOT" in check.remedy


def test_a_store_root_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    place, direct = check_store_root(tmp_path / "not" / "yet")
    assert place.state == OK and direct.state in (OK, WARNING)
    assert list(tmp_path.iterdir()) == []


def test_tcmalloc_is_a_hint_only_where_nobody_preloads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert check_tcmalloc(bundled=False).state == WARNING
    assert check_tcmalloc(bundled=True).state == OK
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    assert check_tcmalloc(bundled=False).state == OK


def test_the_memory_of_slots_is_tried_and_a_hint_names_the_command() -> None:
    for check in check_slot_memory():
        assert check.state == OK or (check.state == WARNING and "as root, echo " in check.remedy)


def test_huge_pages_that_a_process_may_have_and_does_not_get_are_a_hint() -> None:
    without = """
        import ctypes
        assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
        from vllm_moe_offload.cli.memory_check import check_slot_memory
        print(*(check.state for check in check_slot_memory()))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(without)], capture_output=True, text=True, timeout=60)
    assert ran.stdout == f"{WARNING} {WARNING}\n", ran.stderr


@pytest.mark.parametrize(
    ("asked", "state", "words"),
    [
        (None, OK, "by itself"),
        ("nobind", WARNING, "unset"),
        ("0-1|2", OK, "3 of"),
        ("0-9", WARNING, "[3, 4, 5, 6, 7, 8, 9]"),
        ("all", PROBLEM, "'0-3|4-7'"),
    ],
)
def test_the_binding_of_compute_threads_is_judged(asked: str | None, state: str, words: str) -> None:
    check = check_openmp_binding({} if asked is None else {BINDING: asked}, {0, 1, 2})
    assert check.state == state and words in check.sentence


def test_preloaded_libraries_must_be_there_and_of_one_openmp(tmp_path: Path) -> None:
    libraries = [tmp_path / name for name in ("libgomp.so.1", "libiomp5.so")]
    for library in libraries:
        library.touch()
    assert [check.state for check in check_preloads("")] == [OK]
    assert [check.state for check in check_preloads(str(libraries[0]))] == [OK]
    (missing,) = check_preloads(f"{libraries[0]}:{tmp_path / 'gone.so'}")
    assert missing.state == WARNING and "gone.so" in missing.detail
    (both,) = check_preloads(":".join(map(str, libraries)))
    assert both.state == PROBLEM and "GNU and Intel" in both.detail


def test_shared_memory_that_is_missing_is_a_problem_and_locks_are_told(tmp_path: Path) -> None:
    assert check_shared_memory(tmp_path / "absent").state == PROBLEM
    assert "free" in check_shared_memory().detail
    assert "ulimit -l" in check_locks().detail


def test_rates_are_measured_in_a_folder_that_is_left_as_it_was(tmp_path: Path) -> None:
    disk, memory = check_rates(tmp_path / "stores")
    assert "GB/s" in disk.detail and memory.state == OK
    assert list(tmp_path.iterdir()) == []


def test_a_store_folder_that_everyone_can_write_and_a_damaged_store_are_warnings(tmp_path: Path) -> None:
    (none,) = check_stores(tmp_path / "stores")
    assert none.state == OK and "none in" in none.detail
    damaged = tmp_path / "stores" / ("0" * 32)
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    (tmp_path / "stores").chmod(0o777)
    folder, stores = check_stores(tmp_path / "stores")
    assert folder.state == WARNING and "mode 777" in folder.detail and folder.remedy.startswith("chmod o-w ")
    assert stores.state == WARNING and "1 damaged" in stores.detail and "store prune" in stores.remedy
    (tmp_path / "stores").chmod(0o755)
    assert [check.state for check in check_stores(tmp_path / "stores")] == [OK, WARNING]


def test_a_history_that_others_can_read_or_that_was_set_aside_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "history"
    assert [check.state for check in check_history(folder)] == [OK]
    own = folder / "abc"
    own.mkdir(parents=True, mode=0o700)
    (own / "history.npz").write_bytes(b"12345")
    (sound,) = check_history(folder)
    assert sound.state == OK and sound.detail.startswith("1 in ")
    own.chmod(0o755)
    (own / "history.npz.unusable-1").touch()
    aside, others = check_history(folder)
    assert aside.state == WARNING and "1 set aside" in aside.detail and "--keep 0" in aside.remedy
    assert others.state == WARNING and "mode 755" in others.detail and others.remedy == f"chmod 700 {own}"
