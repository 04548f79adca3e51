"""Graphs that end at MoE layers: where vLLM splits, and that a captured piece reads the outputs of each step."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.forward_context import BatchDescriptor, ForwardContext, override_forward_context

from vllm_moe_offload.integration.cuda.graphs import (
    EXPERT_OPS,
    KeptOutputs,
    _into_kept_buffers,
    kept_bytes,
    leave_experts_out_of_graphs,
    split_at_experts,
)
from vllm_moe_offload.integration.method import OffloadedMoEMethod

WIDTH = 4


def engine(splitting_ops: list[str] | None, mode: CompilationMode = CompilationMode.VLLM_COMPILE) -> Any:
    compilation = CompilationConfig(
        mode=mode, splitting_ops=splitting_ops, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
    )
    compilation.set_splitting_ops_for_v1("naive")
    return SimpleNamespace(compilation_config=compilation)


def test_the_operations_are_those_of_vllm() -> None:
    import vllm.model_executor.layers.fused_moe.runner.moe_runner  # noqa: F401

    for name in EXPERT_OPS:
        library, _, operation = name.partition("::")
        assert hasattr(getattr(torch.ops, library), operation)


def test_models_are_split_at_attention_and_at_experts(gpu: Any) -> None:
    config = engine(None)
    attention = list(config.compilation_config.splitting_ops)
    split_at_experts(config)
    split_at_experts(config)
    assert config.compilation_config.splitting_ops == [*attention, *EXPERT_OPS]
    assert config.compilation_config.is_attention_compiled_piecewise()
    leave_experts_out_of_graphs(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE


def test_a_cpu_compiles_as_before() -> None:
    config = engine(None)
    attention = list(config.compilation_config.splitting_ops)
    split_at_experts(config)
    assert config.compilation_config.splitting_ops == attention


@pytest.mark.parametrize(
    "config", [engine([]), engine(None, CompilationMode.NONE), engine(None, CompilationMode.STOCK_TORCH_COMPILE)]
)
def test_where_a_model_cannot_be_split_there_are_no_graphs_and_one_line_says_so(
    gpu: Any, config: Any, warnings_of_vllm: pytest.LogCaptureFixture
) -> None:
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    split_at_experts(config)
    assert not config.compilation_config.splitting_ops
    leave_experts_out_of_graphs(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    (said,) = {record.message for record in warnings_of_vllm.records}
    assert "no CUDA graphs" in said and "splitting_ops" in said
    warnings_of_vllm.clear()
    leave_experts_out_of_graphs(config)
    assert not warnings_of_vllm.records


def test_graphs_that_break_by_themselves_are_not_used(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    config = engine(None)
    leave_experts_out_of_graphs(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@contextmanager
def step(rows: int, mode: CUDAGraphMode = CUDAGraphMode.PIECEWISE) -> Iterator[None]:
    context = ForwardContext(
        no_compile_layers={},
        attn_metadata={},
        slot_mapping={},
        cudagraph_runtime_mode=mode,
        batch_descriptor=BatchDescriptor(num_tokens=rows),
    )
    with override_forward_context(context):
        yield


class Layer:
    """A MoE layer whose output is its number of calls, in fresh memory each time as vLLM's operations return it."""

    def __init__(self, shared: bool, kept: KeptOutputs | None, name: str = "layer", calls: int = 0):
        self._shared, self._calls = shared, calls
        method = object.__new__(OffloadedMoEMethod)
        method.kept_outputs = kept
        self.routed_experts = SimpleNamespace(quant_method=method, layer_name=name)
        self._seen: list[Any] = []
        """All outputs, so that memory of one is not given to the next."""

    def _forward_impl(self, rows: int) -> Any:
        self._calls += 1
        output = torch.full((rows, WIDTH), float(self._calls))
        self._seen.append((output, -output) if self._shared else output)
        return self._seen[-1]

    run = _into_kept_buffers(_forward_impl)


def captured(output: Any) -> Callable[[], Any]:
    """The piece behind a MoE layer, captured: it reads where its inputs lay then, and holds none of them."""
    addresses = [part.data_ptr() for part in (output if isinstance(output, tuple) else (output,))]
    return lambda: [ctypes.c_float.from_address(address).value for address in addresses]


@pytest.mark.parametrize("shared", [False, True])
def test_a_captured_piece_reads_the_output_of_each_step(shared: bool) -> None:
    layer = Layer(shared, KeptOutputs())
    pieces = {}
    for rows in (8, 4, 1):  # as vLLM captures: the largest first
        with step(rows):
            pieces[rows] = captured(layer.run(rows))
    for rows in (1, 8, 4, 8):
        with step(rows):
            layer.run(rows)
        assert pieces[rows]() == ([layer._calls, -layer._calls] if shared else [layer._calls])


ROWS = (8, 4, 1)


def run_model(layers: list["Layer"], rows: int, held: list[int], pieces: dict[Any, Any] | None) -> None:
    """As vLLM runs a model in pieces: an output is held until the last piece that reads it, ``held`` layers on.

    Args:
        pieces: filled while captured; None where graphs are replayed, which read what has not been given up.
    """
    outputs: dict[int, Any] = {}
    with step(rows):
        for number, layer in enumerate(layers):
            outputs[number] = layer.run(rows)
            for earlier in list(outputs):
                if pieces is not None:
                    pieces[rows, earlier, number] = captured(outputs[earlier])
                else:
                    calls = layers[earlier]._calls
                    expected = [calls, -calls] if layers[earlier]._shared else [calls]
                    assert CAPTURED[rows, earlier, number]() == expected, (rows, earlier, number)
                if held[earlier] <= number - earlier:
                    del outputs[earlier]


CAPTURED: dict[Any, Any] = {}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=9))
def test_every_piece_reads_the_output_that_it_was_captured_with_however_long_that_is_held(
    layers: list[tuple[bool, int]],
) -> None:
    kept = KeptOutputs()
    made = [Layer(shared, kept, f"layer {number}", 1000 * number) for number, (shared, _) in enumerate(layers)]
    held = [count for _, count in layers]
    CAPTURED.clear()
    for rows in ROWS:
        run_model(made, rows, held, CAPTURED)
    for rows in (*ROWS, *reversed(ROWS)):
        for layer in made:
            layer._seen.clear()
        run_model(made, rows, held, None)


@pytest.mark.parametrize("shared", [False, True])
def test_layers_whose_outputs_only_the_next_piece_reads_share_two_sets_of_buffers(shared: bool) -> None:
    kept = KeptOutputs()
    layers = [Layer(shared, kept, f"layer {number}") for number in range(7)]
    for rows in ROWS:
        run_model(layers, rows, [0] * len(layers), {})
    assert sum(buffer.nbytes for buffer in kept._buffers) == kept_bytes(max(ROWS), WIDTH * 4) // (1 if shared else 2)


def test_without_kept_buffers_it_reads_what_it_saw_when_it_was_captured() -> None:
    """What the buffers are for: nothing raises where they are forgotten."""
    layer = Layer(False, None)
    with step(4):
        piece = captured(layer.run(4))
        layer.run(4)
    assert layer._calls == 2 and piece() == [1]


def test_outside_of_graphs_outputs_are_passed_on_uncopied() -> None:
    layer = Layer(True, KeptOutputs())
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.FULL):
        with step(4, mode):
            assert layer.run(4) is layer._seen[-1]


def test_a_layer_that_is_not_offloaded_is_left_alone() -> None:
    layer = Layer(False, None)
    layer.routed_experts.quant_method = object()
    with step(4):
        assert layer.run(4) is layer._seen[-1]
