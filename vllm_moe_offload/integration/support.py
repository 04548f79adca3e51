"""What cannot be offloaded correctly, refused at start-up by name and with the way out."""

from typing import Any

from vllm.logger import init_logger

from ..errors import UnsupportedError
from .machine import modular_cpu_experts

logger = init_logger(__name__)

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "mistral")


def refuse_unsupported(vllm_config: Any) -> None:
    """Refuse engine features that are known not to work with offloaded experts.

    Raises:
        UnsupportedError: naming the feature and what to do instead.
    """
    from vllm.platforms import current_platform

    model, parallel, load = vllm_config.model_config, vllm_config.parallel_config, vllm_config.load_config
    offload = vllm_config.offload_config
    refusals = (
        (
            not current_platform.is_cpu(),
            f"the {current_platform.device_name} platform",
            "run it on vLLM's CPU platform",
        ),
        (
            parallel.data_parallel_size > 1,
            "data parallelism (--data-parallel-size)",
            "start an engine for each replica; with --moe-offload-daemon they share one expert cache",
        ),
        (parallel.enable_eplb, "EPLB (--enable-eplb) and redundant experts", "start without --enable-eplb"),
        (vllm_config.lora_config is not None, "LoRA (--enable-lora)", "merge the adapter into the checkpoint"),
        (
            vllm_config.weight_transfer_config is not None,
            "weight transfer (--weight-transfer-config)",
            "start an engine with the new checkpoint instead of sending it weights",
        ),
        (model.enable_sleep_mode, "sleep mode (--enable-sleep-mode)", "start without it"),
        (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
            "vLLM's own weight offloading (--cpu-offload-gb, --offload-group-size)",
            "use one of the two",
        ),
        (
            str(load.load_format) not in LOAD_FORMATS,
            f"--load-format {load.load_format}",
            f"use one of {', '.join(LOAD_FORMATS)}",
        ),
    )
    for unsupported, feature, way_out in refusals:
        if unsupported:
            raise UnsupportedError(f"moe-offload does not work with {feature}: {way_out}, or switch moe-offload off")


def refuse_loading(model: str, load_format: object, by_worker: bool) -> None:
    """Refuse ways of loading a model of an engine that offloads, a drafter's included.

    Args:
        by_worker: whether a worker loads it while it starts.

    Raises:
        UnsupportedError: naming the model and the way.
    """
    if str(load_format) not in LOAD_FORMATS:
        raise UnsupportedError(
            f"moe-offload cannot load {model} with load format {load_format}: use one of {', '.join(LOAD_FORMATS)}"
        )
    if not by_worker:
        raise UnsupportedError(
            f"moe-offload is on, but {model} is being loaded by something else than a starting worker of the engine, "
            "which would keep all of its experts in memory; switch moe-offload off in this configuration"
        )


ROUND_BY_BATCH = frozenset({"CPUExpertsFp8"})
"""Kernels whose results depend, in the last bits, on how many tokens an expert gets in one call."""

WHOLE_LAYER_KERNELS = frozenset({"CPUExpertsInt4"})
"""Kernels whose weights are laid out differently, or not at all, when a layer has one expert instead of all."""


def refuse_method(layer_name: str, method: Any) -> None:
    """Refuse quantization methods that cannot compute over slots.

    Raises:
        UnsupportedError: naming the layer and the method.
    """
    kernel = _kernel_name(method)
    refusals = (
        (
            kernel is None,
            "for which vLLM has no kernel on this machine: choose another quantization",
        ),
        (
            getattr(method, "uses_meta_device", False),
            "which quantizes experts while it loads them: serve a checkpoint that is quantized already",
        ),
        (
            kernel in WHOLE_LAYER_KERNELS,
            f"whose kernel {kernel} cannot compute over slots: choose another quantization",
        ),
    )
    for unsupported, why in refusals:
        if unsupported:
            raise UnsupportedError(
                f"moe-offload cannot serve {layer_name} with {method.method_name}, {why}, or switch moe-offload off"
            )
    if method.is_monolithic:
        raise UnsupportedError(
            f"moe-offload cannot serve {layer_name}: {method.method_name} routes inside its kernel (monolithic), so "
            f"its experts are not known in time to be loaded; {_other_kernels()}, or switch moe-offload off"
        )
    if kernel in ROUND_BY_BATCH:
        logger.warning_once(
            "%s rounds by how many tokens an expert gets at once: a step that needs more experts than "
            "there are slots may differ from plain vLLM in the last bits, as it does there between batches",
            kernel,
        )


def _kernel_name(method: Any) -> str | None:
    """The class of the kernel that ``method`` has chosen; its own where it does not tell; None if there is none."""
    if method.moe_kernel is None and hasattr(method, "experts_cls"):
        return None if method.experts_cls is None else method.experts_cls.__name__
    return type(method if method.moe_kernel is None else method.moe_kernel.fused_experts).__name__


def _other_kernels() -> str:
    names = modular_cpu_experts()
    if not names:
        return "this vLLM has no other for this CPU: install a newer one ('vllm-moe-offload doctor' says which)"
    return f"choose a --moe-backend or a quantization that uses one of {', '.join(names)}"
