"""What cannot be offloaded correctly, refused at start-up by name and with the way out."""

from collections.abc import Iterator
from typing import Any

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ..errors import UnsupportedError
from .cuda.allow_list import COVERED, is_covered
from .machine import modular_cpu_experts

logger = init_logger(__name__)

Refusal = tuple[bool, str, str]
"""Whether to refuse, what, and the way out."""

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "mistral")


def refuse_unsupported(vllm_config: Any) -> None:
    """Refuse engine features that are known not to work with offloaded experts.

    Raises:
        UnsupportedError: naming the feature and what to do instead.
    """
    for unsupported, feature, way_out in (*_features(vllm_config), *_features_of_gpus(vllm_config), *_platforms()):
        if unsupported:
            raise UnsupportedError(f"moe-offload does not work with {feature}: {way_out}, or switch moe-offload off")


def _features(vllm_config: Any) -> Iterator[Refusal]:
    model, parallel, load = vllm_config.model_config, vllm_config.parallel_config, vllm_config.load_config
    offload = vllm_config.offload_config
    yield from (
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


def _features_of_gpus(vllm_config: Any) -> Iterator[Refusal]:
    """What vLLM has on GPUs only, or what works on a CPU and not there."""
    if not current_platform.is_cuda_alike():
        return
    parallel = vllm_config.parallel_config
    yield (
        parallel.use_ubatching,
        "microbatches that run at the same time (--enable-dbo, --ubatch-size)",
        "start without them",
    )
    yield (
        current_platform.is_rocm() and envs.VLLM_ROCM_USE_AITER and envs.VLLM_ROCM_USE_AITER_MOE,
        "AITER's expert kernels (VLLM_ROCM_USE_AITER_MOE)",
        "set VLLM_ROCM_USE_AITER_MOE=0",
    )


def _platforms() -> Iterator[Refusal]:
    yield (
        not (current_platform.is_cpu() or current_platform.is_cuda_alike()),
        f"the {current_platform.device_name} platform",
        "run it on vLLM's CPU, CUDA or ROCm platform",
    )


def refuse_layer(layer_name: str, kind: type) -> None:
    """Refuse kinds of MoE layers that compute some experts without weights of a checkpoint.

    Raises:
        UnsupportedError: naming the layer and its class.
    """
    if any(base.__name__ in CONSTANT_EXPERTS for base in kind.__mro__):
        raise UnsupportedError(
            f"moe-offload cannot serve {layer_name}: its checkpoint replaces experts by constants ({kind.__name__}); "
            "serve the unpruned checkpoint, or switch moe-offload off"
        )


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


CONSTANT_EXPERTS = frozenset({"SubstitutedRoutedExperts"})
"""Layers in which some experts are constants beside the routed ones."""

ROUND_BY_BATCH = frozenset({"CPUExpertsFp8"})
"""Kernels whose results depend, in the last bits, on how many tokens an expert gets in one call."""

WHOLE_LAYER_KERNELS = frozenset({"CPUExpertsInt4"})
"""Kernels whose weights are laid out differently, or not at all, when a layer has one expert instead of all."""


def refuse_method(layer_name: str, method: Any) -> None:
    """Refuse quantization methods that cannot compute over slots.

    Raises:
        UnsupportedError: naming the layer and the method.
    """
    chosen = _kernel(method)
    kernel = None if chosen is None else chosen.__name__
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
        (
            current_platform.is_cuda_alike() and chosen is not None and not is_covered(chosen),
            f"whose kernel {kernel} is none of {', '.join(COVERED)}, the GPU kernels that compute over slots: choose "
            "another quantization or --moe-backend",
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
    if kernel in COVERED and not COVERED[kernel].same_bits:
        logger.warning_once(
            "%s rounds by where among the others an expert lies: results may differ from plain vLLM's in the last bits",
            kernel,
        )
    if kernel in ROUND_BY_BATCH:
        logger.warning_once(
            "%s rounds by how many tokens an expert gets at once: a step that needs more experts than "
            "there are slots may differ from plain vLLM in the last bits, as it does there between batches",
            kernel,
        )


def _kernel(method: Any) -> type | None:
    """The class of the kernel that ``method`` has chosen; its own where it does not tell; None if there is none."""
    if method.moe_kernel is None and hasattr(method, "experts_cls"):
        kernel: type | None = method.experts_cls
        return kernel
    return type(method if method.moe_kernel is None else method.moe_kernel.fused_experts)


def _other_kernels() -> str:
    names = modular_cpu_experts()
    if not names:
        return "this vLLM has no other for this CPU: install a newer one ('vllm-moe-offload doctor' says which)"
    return f"choose a --moe-backend or a quantization that uses one of {', '.join(names)}"
