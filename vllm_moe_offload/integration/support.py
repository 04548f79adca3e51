"""What cannot be offloaded correctly, refused at start-up by name and with the way out."""

from typing import Any

from ..errors import UnsupportedError

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


def refuse_method(layer_name: str, method: Any) -> None:
    """Refuse quantization methods whose kernels do not take routing decisions from outside.

    Raises:
        UnsupportedError: naming the layer and the method.
    """
    if method.is_monolithic:
        raise UnsupportedError(
            f"moe-offload cannot serve {layer_name}: {method.method_name} routes inside its kernel (monolithic), so "
            "nobody learns in time which experts it needs; choose another --moe-backend, or switch moe-offload off"
        )
