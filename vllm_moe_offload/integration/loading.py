"""Loading a model whose experts go into a store instead of into memory.

The first time, vLLM's own loaders and processing run layer by layer and each finished layer becomes records; later
the store is found and the checkpoint's expert tensors are passed over unread. A worker may load several models, one
after the other; when all are there, worker.py gives their layers slots.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ..config import OffloadConfig
from ..errors import StoreError
from ..store.reader import Store
from ..store.root import StoreRoot
from ..store.writer import StoreWriter
from . import seams
from .cuda.allow_list import choosing_kernel
from .cuda.graphs import KeptOutputs
from .engine_config import offload_config, only_environment_asks
from .identity import checkpoint_read, store_identity
from .method import OffloadedMoEMethod, register_op
from .placement import LoadedModel
from .streaming import DIRECT_WRITERS, DirectlyWrittenLayers, StreamedLayer, refuse_late_loads
from .support import refuse_layer, refuse_loading, refuse_method, refuse_unsupported
from .tensors import NOT_EXPERT_WEIGHTS, as_bytes, expert_tensors, move, record_layout, stored, tensors_of

logger = init_logger(__name__)

_worker: ContextVar["WorkerLoading | None"] = ContextVar("moe_offload_worker", default=None)
_loading: ContextVar["ModelOffload | None"] = ContextVar("moe_offload_loading", default=None)


def install() -> None:
    seams.QUANT_METHOD.wrap(_take_over)
    seams.LOAD_MODEL.wrap(_load_with_store)
    seams.LOAD_WEIGHTS.wrap(_load_into_store)


def _take_over(get_quant_method: Callable[..., Any]) -> Callable[..., Any]:
    def _get_quant_method(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        offload = loading_offload()
        if offload is None:
            return get_quant_method(self, prefix, quant_config, moe_config)
        refuse_layer(prefix, type(self))
        with choosing_kernel(prefix):
            method = get_quant_method(self, prefix, quant_config, moe_config)
        refuse_method(prefix, method)
        offloaded = OffloadedMoEMethod(method, offload.take_layer, offload.record)
        offloaded.kept_outputs = offload.kept_outputs
        return offloaded

    return _get_quant_method


def loading_offload() -> "ModelOffload | None":
    """The offload of the model that is being loaded right now, or None."""
    return _loading.get()


class WorkerLoading:
    """What a worker loads while it is the context: the model it serves first, then those that draft for it."""

    def __init__(self) -> None:
        self.models: list[LoadedModel] = []
        """Those with MoE layers."""

    def __enter__(self) -> "WorkerLoading":
        self._token = _worker.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        _worker.reset(self._token)
        if kind is not None:
            for model in self.models:
                model.store.close()


def _load_with_store(load_model: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        config = offload_config(vllm_config)
        if config is None:
            return load_model(self, vllm_config, model_config, prefix)
        worker = _worker.get()
        if model_config.is_moe or not only_environment_asks(vllm_config):
            refuse_loading(model_config.model, self.load_config.load_format, worker is not None)
        register_op()
        offload = ModelOffload(vllm_config, model_config, self.load_config.load_format, prefix, config)
        token = _loading.set(offload)
        try:
            model = load_model(self, vllm_config, model_config, prefix)
            if offload.layers:
                assert worker is not None, "the first layer refuses others"
                worker.models.append(offload.finish(model))
        except BaseException:
            offload.abort()
            raise
        finally:
            _loading.reset(token)
        return model

    return load


def _load_into_store(load_weights: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        offload = loading_offload()
        if offload is None or not offload.layers:
            return load_weights(self, model, model_config)
        with offload.taking_in(self, model):
            return load_weights(self, model, model_config)

    return load


class ModelOffload:
    """One model on its way from checkpoint to store.

    Args:
        prefix: what vLLM puts before the names of the model's layers in this engine. The store does without, so that
            it is the same whether the model is served or drafts.
    """

    def __init__(self, vllm_config: Any, model_config: Any, load_format: Any, prefix: str, config: OffloadConfig):
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._load_format = load_format
        self._prefix = f"{prefix}." if prefix else ""
        self._config = config
        self._device = torch.device(current_platform.device_type)
        """Where vLLM's kernels are, and where it processes the weights of a layer: one layer at a time."""
        self.layers: dict[str, tuple[torch.nn.Module, OffloadedMoEMethod]] = {}
        """By their names in the store."""
        self.kept_outputs = KeptOutputs() if current_platform.is_cuda_alike() else None
        self._store: Store | None = None
        self._writer: StoreWriter | None = None
        self._arriving: dict[str, StreamedLayer] = {}
        self._recorded: dict[str, int] = {}
        """Bytes of each layer that is in the store."""
        self._loaded_bytes: dict[str, int] = {}
        """Bytes of each layer's expert tensors as vLLM loads them, before it processes them."""
        self._progress: tqdm[Any] | None = None

    def take_layer(self, layer: torch.nn.Module, method: OffloadedMoEMethod) -> None:
        """A layer is being made: it gets its parameters, without memory behind them.

        Raises:
            UnsupportedError: its model has MoE layers, as is certain only now, and cannot be offloaded.
        """
        if not self.layers:
            refuse_unsupported(self._vllm_config)
            refuse_loading(self._model_config.model, self._load_format, _worker.get() is not None)
        self.layers[self._name(layer)] = (layer, method)
        method.create_placeholders(layer)

    @contextmanager
    def taking_in(self, loader: Any, model: torch.nn.Module) -> Iterator[None]:
        """Around the loading of ``model``'s weights: layers hand them to the store, or pass them over if it is built.

        Raises:
            StoreError: the checkpoint cannot be identified or lacks an expert's tensor; the store cannot be written.
        """
        checkpoint = checkpoint_read(loader, model, self._model_config)
        self._loaded_bytes = {
            name: sum(tensor.nbytes for tensor in layer.parameters(recurse=False))
            for name, (layer, _) in self.layers.items()
        }
        root = StoreRoot(self._config.store) if self._config.store else StoreRoot()
        facts = checkpoint.facts(root)
        identity = store_identity(self._vllm_config, self._model_config, model, self.layers, facts, checkpoint.folder)
        found = root.open_or_build(identity)
        if isinstance(found, Store):
            logger.info("experts come from store %s", found.path)
            self._store = found
            for layer, _ in self.layers.values():
                _pass_over_weights(layer)
            yield
            return
        logger.info("building store %s", root.path / identity.fingerprint)
        self._writer = found
        by_model = self._receive(checkpoint.mapped)
        directly_written = DirectlyWrittenLayers([layer for layer, _ in by_model])
        with directly_written:
            yield
        directly_written.refuse_incomplete()
        # vLLM would move them to the device for its processing and expect them to be there afterwards
        for layer, method in by_model:
            self.record(layer, method)

    def _receive(self, mapped: bool) -> list[tuple[torch.nn.Module, OffloadedMoEMethod]]:
        """Make every layer ready to be loaded into the store; returns those whose model writes by itself, on the host.

        Args:
            mapped: the checkpoint's tensors are views of mapped files, so that keeping them back takes no memory. Then
                layers wait for the end of the checkpoint, as a tensor may come twice.
        """
        directly_written = []
        for name, (layer, method) in self.layers.items():
            if type(layer).__name__ in DIRECT_WRITERS:
                method.create_real_weights(layer)
                directly_written.append((layer, method))
                continue
            self._arriving[name] = StreamedLayer(
                layer,
                partial(method.create_real_weights, layer),
                None if mapped else partial(self.record, layer, method),
            )
        return directly_written

    def record(self, layer: torch.nn.Module, method: OffloadedMoEMethod) -> None:
        """Process a layer that is loaded and turn it into records, once."""
        name = self._name(layer)
        if self._writer is None or name in self._recorded:
            return
        with self._device:
            if arriving := self._arriving.pop(name, None):
                arriving.materialize()
            else:
                move(layer, self._device)
            method.real.process_weights_after_loading(layer)
        tensors = tensors_of(layer)
        layout = record_layout(tensors.of_experts)
        self._recorded[name] = layout.record_bytes * layer.local_num_experts
        self._announce_size(name)
        records = as_bytes(layer.layer_name, tensors.of_experts)
        self._writer.add_layer(name, layout, records, stored(layer.layer_name, tensors.of_layer))
        del tensors, records
        self._show_progress()
        method.real.moe_kernel = method.real.moe_quant_config = None
        method.create_placeholders(layer)
        refuse_late_loads(layer, expert_tensors(layer))

    def _announce_size(self, layer_name: str) -> None:
        """Have the disk looked at before the first layer of each size is written: layers loaded alike become alike.

        Raises:
            StoreError: the whole store would not fit.
        """
        assert self._writer is not None
        known = {self._loaded_bytes[name]: size for name, size in self._recorded.items()}
        if [self._loaded_bytes[name] for name in self._recorded].count(self._loaded_bytes[layer_name]) == 1:
            self._writer.expect(sum(known.get(size, size) for size in self._loaded_bytes.values()))

    def _show_progress(self) -> None:
        if self._progress is None:
            hidden = get_tensor_model_parallel_rank() > 0
            self._progress = tqdm(total=len(self.layers), desc="Building expert store", unit="layer", disable=hidden)
        self._progress.update()
        if len(self._recorded) == len(self.layers):
            self._progress.close()

    def finish(self, model: torch.nn.Module) -> LoadedModel:
        """All layers are loaded: complete the store.

        Raises:
            StoreError: the store cannot be completed, or is not this model's.
        """
        built = self._writer is not None
        if self._writer is not None:
            self._store, self._writer = self._writer.finish(), None
        assert self._store is not None
        stored = [entry.name for entry in self._store.layers]
        if set(stored) != set(self.layers):
            raise StoreError(f"store {self._store.path} has the layers {stored}, this model has {list(self.layers)}")
        return LoadedModel(self._vllm_config, self._model_config.model, model, self._store, self.layers, built)

    def abort(self) -> None:
        """Leave nothing half-built behind."""
        if self._writer is not None:
            self._writer.abort()
        if self._store is not None:
            self._store.close()

    def _name(self, layer: torch.nn.Module) -> str:
        return str(layer.layer_name).removeprefix(self._prefix)


def _pass_over_weights(layer: torch.nn.Module) -> None:
    """Leave what the checkpoint still has for this layer unread: its records are in the store."""
    for name, tensor in layer.named_parameters(recurse=False):
        if name not in NOT_EXPERT_WEIGHTS:
            tensor.weight_loader = _pass_over


def _pass_over(*args: Any, return_success: bool = False, **kwargs: Any) -> bool | None:
    """The weight loader of parameters whose records are already in the store."""
    return True if return_success else None


_pass_over.supports_moe_loading = True  # type: ignore[attr-defined]
