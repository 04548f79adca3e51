"""Every vLLM internal we lean on, in one table, each with a probe that says what moved and what that breaks.

Verified with vLLM 0.32. ``install`` wraps what this table names and nothing else does.
"""

from collections.abc import Iterable

from ..errors import UnsupportedError
from .seam import Seam

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LOADER = "vllm.model_executor.model_loader"

FLAGS = "the --moe-offload-* flags (additional_config and VLLM_MOE_OFFLOAD still work)"
LAST_LINE = "the reason as the last line of an engine that does not start (it is in the output above)"
GATE_PREDICTOR = "the predictor 'gate'"
PREPARE = "the command 'prepare'"
PAGE = "the live page"
SPANS = "how long requests have waited for experts, on their OpenTelemetry spans"
METRICS = "our metrics on vLLM's page of them (the daemon's page, `top` and the RPC still work)"
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
AUTHENTICATION = Seam(
    "vllm.entrypoints.serve.middleware.authenticate",
    "AuthenticationMiddleware",
    "ask for the API's key before the page's data is given away",
    ("app", "tokens"),
    feature=PAGE,
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

LEANED_ON = (
    Seam(f"{_FUSED_MOE}.fused_moe_method_base", "FusedMoEMethodBase", "be a quantization method of a MoE layer"),
    Seam(
        f"{_FUSED_MOE}.fused_moe_method_base",
        "FusedMoEMethodBase.get_fused_moe_quant_config",
        "rebuild scales",
        ("layer",),
    ),
    Seam(f"{_FUSED_MOE}.modular_kernel", "FusedMoEExperts", "hand the kernel the pool's scales"),
    Seam(f"{_FUSED_MOE}.modular_kernel", "FusedMoEExperts.is_monolithic", "know which kernels route inside"),
    Seam(
        f"{_FUSED_MOE}.modular_kernel",
        "FusedMoEExperts._supports_current_device",
        "name the kernels this CPU has",
    ),
    Seam(f"{_FUSED_MOE}.experts.cpu_moe", "CPUUnquantizedExperts", "compute over slots"),
    Seam(f"{_FUSED_MOE}.runner.moe_runner", "MoERunner", "find a layer in the forward context"),
    Seam(
        f"{_FUSED_MOE}.runner.moe_runner",
        "MoERunner.__init__",
        "find routers",
        ("router", "routed_experts", "gate", "routed_input_transform"),
        feature=GATE_PREDICTOR,
    ),
    Seam(f"{_FUSED_MOE}.router.gate_linear", "GateLinear", "ask routers", ("input_size",), feature=GATE_PREDICTOR),
    Seam(
        f"{_FUSED_MOE}.router.cpu_router",
        "CPURouter",
        "know how routers choose",
        ("use_grouped_topk", "num_expert_group", "topk_group", "scoring_func", "e_score_correction_bias"),
        feature=GATE_PREDICTOR,
    ),
    Seam(
        f"{_FUSED_MOE}.router.cpu_router",
        "CPURouter._compute_routing",
        "check how routers choose",
        ("hidden_states", "router_logits", "indices_type"),
        feature=GATE_PREDICTOR,
    ),
    Seam("vllm.config", "ModelConfig.is_moe", "refuse early what cannot be served, and only where it matters"),
    Seam(
        "vllm.config",
        "CompilationConfig",
        "end CUDA graphs at MoE layers",
        ("mode", "splitting_ops", "cudagraph_mode"),
    ),
    Seam(f"{_FUSED_MOE}.runner.moe_runner", "_moe_forward", "know the operation of a MoE layer"),
    Seam(f"{_FUSED_MOE}.runner.moe_runner", "_moe_forward_shared", "know the operation of a MoE layer"),
    Seam(
        "vllm.v1.kv_cache_interface",
        "KVCacheSpec.max_memory_usage_bytes",
        "know what KV cache a sequence takes",
        ("vllm_config",),
    ),
    Seam("vllm.v1.worker.gpu_worker", "Worker.get_kv_cache_spec", "know what KV cache a sequence takes", ("self",)),
    Seam(
        "vllm.v1.worker.gpu_worker",
        "Worker.init_device",
        "know what memory a GPU has for vLLM",
        names=("requested_memory", "init_snapshot"),
    ),
    Seam(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader._prepare_weights",
        "know which files weights are read from",
        ("model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides"),
    ),
    Seam(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader.Source",
        "know which files weights are read from",
        ("model_or_path", "revision", "subfolder", "fall_back_to_pt", "allow_patterns_overrides"),
    ),
    Seam("vllm.distributed", "get_world_group", "'auto': see what the other workers of a host take"),
    Seam("vllm.forward_context", "get_forward_context", "find a layer from inside the compiled graph"),
    Seam(
        "vllm.utils.torch_utils",
        "direct_register_custom_op",
        "keep torch.compile out of our Python",
        ("op_name", "op_func"),
    ),
    Seam("vllm.utils.torch_utils", "LayerName", "name a layer inside the compiled graph"),
    Seam("vllm.v1.core.kv_cache_manager", "KVCacheManager.evict_blocks", "forget void KV blocks", ("block_ids",)),
    Seam("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", "find void KV blocks", ("request_id",)),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.finish_requests",
        "fail a request",
        ("request_ids", "finished_status"),
    ),
    Seam(
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator.__init__",
        "know how many tokens a KV block holds",
        names=("single_type_managers",),
    ),
    Seam(
        "vllm.v1.request",
        "Request.__init__",
        "know which tokens of a request are in flight",
        names=("num_computed_tokens", "num_in_flight_tokens", "num_stale_output_tokens"),
    ),
    Seam("vllm.v1.request", "RequestStatus.FINISHED_ERROR", "fail a request"),
    Seam("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", "fail requests of asynchronous steps", ("self",)),
    Seam("vllm.outputs", "RequestError", "tell the caller of a pooling model", ("code", "message")),
    Seam("vllm.distributed.parallel_state", "get_world_group", "find the engine's other ranks"),
    Seam(
        "vllm.distributed.parallel_state",
        "GroupCoordinator.broadcast_object",
        "share memory with the engine's other ranks",
        ("self", "obj"),
    ),
    Seam("vllm.v1.engine", "EngineCoreOutput", "tell the client"),
    Seam(
        "vllm.config.parallel",
        "ParallelConfig",
        "tell API servers from the process that launches them",
        ("_api_process_rank",),
        feature=METRICS,
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.req_ids",
        "know which rows of a step belong to which request",
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch", "InputBatch", "read the batch: positions, prompts, tokens", ("max_num_reqs",)
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.__init__",
        "read the batch: positions, tokens",
        names=("input_ids", "positions", "use_async_scheduling", "num_spec_tokens"),
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.__init__",
        "read the batch of the V2 model runner",
        names=("req_states", "pcp_manager", "num_speculative_steps"),
    ),
    Seam(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        "read the batch of the V2 model runner: requests, positions, tokens",
        ("req_ids", "idx_mapping_np", "num_scheduled_tokens", "num_tokens", "num_computed_tokens_np", "input_ids"),
    ),
    Seam(
        "vllm.v1.worker.gpu.states",
        "RequestState.__init__",
        "read the prompts of the V2 model runner",
        names=("req_id_to_index", "prompt_len", "all_token_ids"),
    ),
    Seam("vllm.v1.worker.gpu_worker", "Worker.__init__", "know the model runner", names=("use_v2_model_runner",)),
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "know what was scheduled and what has ended",
        (
            "num_scheduled_tokens",
            "finished_req_ids",
            "scheduled_spec_decode_tokens",
            "total_num_scheduled_tokens",
            "scheduled_new_reqs",
        ),
    ),
    Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        "read the model's token embeddings",
        ("num_embeddings", "embedding_dim"),
    ),
    Seam(
        "vllm.v1.executor", "Executor.get_class", "start workers without an engine", ("vllm_config",), feature=PREPARE
    ),
    Seam("vllm.v1.executor", "Executor.collective_rpc", "ask workers for their stores", ("method",), feature=PREPARE),
    Seam("vllm.utils.argparse_utils", "FlexibleArgumentParser", "read engine arguments", feature=PREPARE),
    AUTHENTICATION,
    Seam(
        f"{AUTHENTICATION.module}",
        "AuthenticationMiddleware.verify_token",
        "ask for the API's key",
        ("headers",),
        feature=PAGE,
    ),
    Seam(
        "vllm.plugins.endpoint_plugins.interface",
        "attach_endpoint_plugins",
        "add the live page's routes",
        ("app", "supported_tasks"),
        names=("attach_router",),
        feature=PAGE,
    ),
    Seam(
        "vllm.plugins.endpoint_plugins.interface",
        "init_endpoint_plugins_state",
        "know which engine the live page shows",
        ("engine_client", "state", "args"),
        feature=PAGE,
    ),
    Seam(
        "vllm.config",
        "ParallelConfig",
        "name the live page in the log once",
        ("_api_process_count", "_api_process_rank"),
        feature=PAGE,
    ),
    Seam("vllm.distributed", "cleanup_dist_env_and_memory", "end workers", feature=PREPARE),
)

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
    *LEANED_ON,
)
