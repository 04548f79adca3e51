"""``cache = auto`` on workers that share a host, and what the budget does not change: other engines' graphs."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.integration.engine_config import offload_config
from vllm_moe_offload.integration.placement import auto_budget, worker_budget
from vllm_moe_offload.integration.serving import mark_graph
from vllm_moe_offload.pool.memory_limits import equal_share

GIB = 2**30
_FORKS = multiprocessing.get_context("fork")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_of_one_host_together_take_no_more_than_is_free(workers: int) -> None:
    seen = [{"a machine": 100 * GIB}] * workers
    budgets = [auto_budget(equal_share(seen, worker), kv_cache=8 * GIB) for worker in range(workers)]
    assert len({budget.nbytes for budget in budgets}) == 1
    assert sum(budget.nbytes + 8 * GIB for budget in budgets) == pytest.approx(90 * GIB, abs=workers)
    without = [auto_budget(equal_share(seen, worker), kv_cache=None).nbytes for worker in range(workers)]
    assert sum(without) == pytest.approx(45 * GIB, abs=workers)


def test_a_kv_cache_that_leaves_nothing_gives_nothing() -> None:
    budget = auto_budget(8 * GIB, kv_cache=8 * GIB)
    assert budget.nbytes == 0
    assert budget.reason == " (auto: 7.2 GiB to spare, 8.0 GiB for the KV cache)"


def _ask(rank: int, folder: Path, answers: Any) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment

    from vllm_moe_offload.integration import placement

    limits = {"a machine": (100 - rank) * GIB}
    placement.memory_limits = lambda: limits  # what a worker sees that looks later
    vllm_config = VllmConfig()
    vllm_config.cache_config.kv_cache_memory_bytes = None
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(2, rank, f"file://{folder}/meet", rank, "gloo")
        answers.put(worker_budget(vllm_config, OffloadConfig(cache="auto"), 400 * GIB).nbytes)


def test_real_workers_agree_on_what_they_saw(tmp_path: Path) -> None:
    answers = _FORKS.Queue()
    workers = [_FORKS.Process(target=_ask, args=(rank, tmp_path, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [int(99 * GIB / 2 * 0.9) // 2] * 2


def test_graphs_of_resident_and_pooled_layers_are_kept_apart_and_settings_stay_what_they_are(tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
    settings = {"cache": "auto"}

    def marked(*mark: Any) -> Any:
        vllm_config = EngineArgs(str(model), additional_config={"moe_offload": settings}).create_engine_config()
        if mark:
            mark_graph(vllm_config, *mark)
        return vllm_config

    configs = [marked(), marked(True, [64]), marked(False, [64]), marked(False, [32]), marked(False, [16, 16])]
    assert len({config.compute_hash() for config in configs}) == len(configs)
    assert marked(False, [64]).compute_hash() == marked(False, [64]).compute_hash()
    assert {offload_config(config) for config in configs} == {OffloadConfig(cache="auto")}
