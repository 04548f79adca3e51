"""Every vLLM internal that is wrapped, in one table, each with a probe that says what moved and what that breaks.

Verified with vLLM 0.32. ``install`` wraps what this table names and nothing else does. What is only called or read is
in ``relied_on.py``; ``SEAMS`` has both.
"""

from collections.abc import Iterable

from ..errors import UnsupportedError
from .relied_on import METRICS, PAGE, RELIED_ON
from .seam import Seam

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LOADER = "vllm.model_executor.model_loader"

FLAGS = "the --moe-offload-* flags (additional_config and VLLM_MOE_OFFLOAD still work)"
LAST_LINE = "the reason as the last line of an engine that does not start (it is in the output above)"
SPANS = "how long requests have waited for experts, on their OpenTelemetry spans"
DEVICE_PREDICTION = "prediction with the V1 model runner where a GPU manages its experts by itself"

ENGINE_CONFIG = Seam(
    "vllm.engine.arg_utils",
    "EngineArgs.create_engine_config",
    "validate the settings before an engine starts",
    ("self",),
)
WAIT_FOR_ENGINE = Seam(
    "vllm.v1.engine.utils",
    "wait_for_engine_startup",
    "end the output of an engine that does not start with the reason",
    ("handshake_socket", "core_engines"),
    feature=LAST_LINE,
)
CLI_ARGUMENTS = Seam("vllm.engine.arg_utils", "EngineArgs.add_cli_args", "add our flags", ("parser",), feature=FLAGS)
CLI_VALUES = Seam("vllm.engine.arg_utils", "EngineArgs.from_cli_args", "read our flags", ("args",), feature=FLAGS)
QUANT_METHOD = Seam(
    f"{_FUSED_MOE}.routed_experts",
    "RoutedExperts._get_quant_method",
    "take over the MoE layers, subclasses included",
    ("self", "prefix", "quant_config", "moe_config"),
)
SUPPORTED_KERNEL = Seam(
    f"{_FUSED_MOE}.modular_kernel",
    "FusedMoEExperts.is_supported_config",
    "keep vLLM's choice among the GPU kernels that compute over slots",
    ("cls", "moe_config", "weight_key", "activation_key", "activation_format"),
)
RUN_EXPERTS = Seam(
    f"{_FUSED_MOE}.runner.moe_runner",
    "MoERunner._forward_impl",
    "give the graphs between MoE layers outputs that stay in their places",
    ("self", "hidden_states", "router_logits"),
)
LOAD_WORKER_MODEL = Seam(
    "vllm.v1.worker.gpu_worker", "Worker.load_model", "know when a worker has loaded all of its models", ("self",)
)
LOAD_MODEL = Seam(
    "vllm.model_executor.model_loader.base_loader",
    "BaseModelLoader.load_model",
    "know where loading a model begins and ends",
    ("self", "vllm_config", "model_config", "prefix"),
)
LOAD_WEIGHTS = Seam(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader.load_weights",
    "know a model's layers and files before its weights are loaded",
    ("self", "model", "model_config"),
)
EXECUTE_MODEL = Seam(
    "vllm.v1.worker.gpu_worker", "Worker.execute_model", "know where a step begins", ("self", "scheduler_output")
)
V2_INPUTS = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.prepare_inputs",
    "know which rows of a step belong to which request, with the V2 model runner",
    ("self", "scheduler_output"),
)
V1_FORWARD = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._model_forward",
    "know what a step reads before it is launched, with the V1 model runner",
    ("self", "input_ids"),
    feature=DEVICE_PREDICTION,
)
WARM_UP = Seam(
    "vllm.v1.worker.gpu_worker",
    "Worker.compile_or_warm_up_model",
    "tell steps that only warm a GPU up from those that serve requests",
    ("self",),
)
SAMPLE_TOKENS = Seam(
    "vllm.v1.worker.gpu_worker", "Worker.sample_tokens", "report requests whose experts could not be read", ("self",)
)
AVAILABLE_MEMORY = Seam(
    "vllm.v1.worker.cpu_worker",
    "CPUWorker.determine_available_memory",
    "keep slot memory out of the KV cache",
    ("self",),
)
GPU_MEMORY = Seam(
    "vllm.v1.worker.gpu_worker",
    "Worker.determine_available_memory",
    "say which cache leaves room for the KV cache of a GPU",
    ("self",),
)
SHUTDOWN = Seam(
    "vllm.v1.worker.gpu_worker", "Worker.shutdown", "write what is to be kept when an engine ends", ("self",)
)
UPDATE_FROM_OUTPUT = Seam(
    "vllm.v1.core.sched.scheduler",
    "Scheduler.update_from_output",
    "fail those requests and keep the engine",
    ("self", "scheduler_output", "model_runner_output"),
)
FREE_BLOCKS = Seam(
    "vllm.v1.core.kv_cache_manager",
    "KVCacheManager.free",
    "know which blocks an aborted or preempted request held while a step of it was in flight",
    ("self", "request"),
)
POP_BLOCKS = Seam(
    "vllm.v1.core.kv_cache_manager",
    "KVCacheManager.pop_blocks_for_free",
    "know the same of blocks that go back only when the step has ended",
    ("self", "request"),
)
REQUEST_OUTPUT = Seam(
    "vllm.v1.engine.output_processor",
    "RequestState.make_request_output",
    "tell the caller of a pooling model why a request failed",
    ("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason", "error"),
)
REQUEST_SPAN = Seam(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.do_tracing",
    "know whose span is made",
    ("self", "engine_core_output"),
    feature=SPANS,
)
SPAN = Seam(
    "vllm.v1.engine.output_processor",
    "instrument_manual",
    "say on a request's span how long it has waited for experts",
    ("span_name", "attributes"),
    feature=SPANS,
)
METRICS_LOGGER = Seam(
    "vllm.v1.metrics.loggers",
    "PrometheusStatLogger.__init__",
    "know which engines have metrics here",
    ("self", "vllm_config"),
    feature=METRICS,
)
METRICS_OF_PROCESSES = Seam(
    "prometheus_client.multiprocess",
    "MultiProcessCollector.collect",
    "show metrics where several API servers answer",
    ("self",),
    feature=METRICS,
)
ENDPOINT_PLUGINS = Seam(
    "vllm.plugins", "load_endpoint_plugins", "add the live page to vLLM's server", ("supported_tasks",), feature=PAGE
)


def refuse_where_moved(feature: str, seams: Iterable[Seam] | None = None) -> None:
    """Refuse ``feature`` where one of its seams has moved.

    Raises:
        UnsupportedError: naming the feature and what has moved.
    """
    for seam in SEAMS if seams is None else seams:
        if seam.feature == feature and (problem := seam.problem()):
            raise UnsupportedError(f"{feature} does not work with this vLLM: {problem}")


def _weight_call(path: str, module: str = "vllm.v1.worker.gpu_worker") -> Seam:
    """A function that reads or replaces weights, to be refused. A vLLM that lacks it leaves nothing to refuse."""
    feature = f"the refusal of {path}, should this vLLM have it elsewhere"
    return Seam(module, path, "refuse it where experts are offloaded", feature=feature)


WEIGHTS_READ = (
    _weight_call("Worker.save_sharded_state"),
    _weight_call("Worker.save_tensorized_model"),
    _weight_call("Worker.compute_weight_checksums"),
    _weight_call("TensorizerLoader.save_model", f"{_LOADER}.tensorizer_loader"),
)
"""Calls that would take slots for the model's weights."""

WEIGHTS_REPLACED = (
    _weight_call("Worker.reload_weights"),
    _weight_call("Worker.reset_weights"),
    _weight_call("Worker.init_weight_transfer_engine"),
    _weight_call("Worker.start_weight_update"),
    _weight_call("Worker.start_draft_weight_update"),
    _weight_call("Worker.update_weights"),
    _weight_call("Worker.finish_weight_update"),
    _weight_call("GPUModelRunner.reload_weights", "vllm.v1.worker.gpu_model_runner"),
    _weight_call("GPUModelRunner.reload_weights", "vllm.v1.worker.gpu.model_runner"),
    _weight_call("initialize_layerwise_reload", f"{_LOADER}.reload"),
    _weight_call("initialize_layerwise_reload", f"{_LOADER}.reload.layerwise"),
)
"""Calls that would replace weights and leave the store behind."""

SEAMS: tuple[Seam, ...] = (
    ENGINE_CONFIG,
    WAIT_FOR_ENGINE,
    CLI_ARGUMENTS,
    CLI_VALUES,
    QUANT_METHOD,
    SUPPORTED_KERNEL,
    RUN_EXPERTS,
    LOAD_WORKER_MODEL,
    LOAD_MODEL,
    LOAD_WEIGHTS,
    EXECUTE_MODEL,
    V2_INPUTS,
    V1_FORWARD,
    WARM_UP,
    SAMPLE_TOKENS,
    AVAILABLE_MEMORY,
    GPU_MEMORY,
    SHUTDOWN,
    UPDATE_FROM_OUTPUT,
    FREE_BLOCKS,
    POP_BLOCKS,
    REQUEST_OUTPUT,
    ENDPOINT_PLUGINS,
    REQUEST_SPAN,
    SPAN,
    METRICS_LOGGER,
    METRICS_OF_PROCESSES,
    *WEIGHTS_READ,
    *WEIGHTS_REPLACED,
    *RELIED_ON,
)
