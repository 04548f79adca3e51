"""What of vLLM is called or read and not wrapped, each with a probe like the seams.

Verified with vLLM 0.32.
"""

from .seam import Seam

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"

GATE_PREDICTOR = "the predictor 'gate'"
PREPARE = "the command 'prepare'"
PAGE = "the live page"
METRICS = "our metrics on vLLM's page of them (the daemon's page, `top` and the RPC still work)"

AUTHENTICATION = Seam(
    "vllm.entrypoints.serve.middleware.authenticate",
    "AuthenticationMiddleware",
    "ask for the API's key before the page's data is given away",
    ("app", "tokens"),
    feature=PAGE,
)

RELIED_ON = (
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
