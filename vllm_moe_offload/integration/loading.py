"""Loading a model whose experts go into a store instead of into memory.

The first time, vLLM's own loaders and processing run layer by layer and each finished layer becomes records; later
the store is found and the checkpoint's expert tensors are passed over unread. A worker may load several models, one
after the other; when all are there, worker.py gives their layers slots.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..config import OffloadConfig
from ..errors import StoreError
from ..store.reader import Store
from ..store.root import StoreRoot
from ..store.writer import StoreWriter
from . import seams
from .budget import LoadedModel
from .engine_config import offload_config
from .identity import store_identity
from .records import NOT_EXPERT_WEIGHTS, as_bytes, expert_tensors, record_layout
from .streaming import DIRECT_WRITERS, StreamedLayer
from .support import refuse_loading

if TYPE_CHECKING:
    from .method import OffloadedMoEMethod

logger = init_logger("vllm.moe_offload")

_worker: ContextVar["WorkerLoading | None"] = ContextVar("moe_offload_worker", default=None)
_loading: ContextVar["ModelOffload | None"] = ContextVar("moe_offload_loading", default=None)


def install() -> None:
    seams.LOAD_MODEL.wrap(_load_with_store)


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
        refuse_loading(model_config.model, self.load_config.load_format, worker is not None)
        assert worker is not None
        from .forward import register_op

        register_op()
        self.download_model(model_config)
        offload = ModelOffload(vllm_config, model_config, self.load_config, prefix, config)
        token = _loading.set(offload)
        try:
            model = load_model(self, vllm_config, model_config, prefix)
            if offload.layers:
                worker.models.append(offload.finish(model))
        except BaseException:
            offload.abort()
            raise
        finally:
            _loading.reset(token)
        return model

    return load


class ModelOffload:
    """One model on its way from checkpoint to store.

    Args:
        prefix: what vLLM puts before the names of the model's layers in this engine. The store does without, so that
            it is the same whether the model is served or drafts.
    """

    def __init__(self, vllm_config: Any, model_config: Any, load_config: Any, prefix: str, config: OffloadConfig):
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._load_config = load_config
        self._prefix = f"{prefix}." if prefix else ""
        self._config = config
        self.layers: dict[str, tuple[torch.nn.Module, OffloadedMoEMethod]] = {}
        """By their names in the store."""
        self._store: Store | None = None
        self._writer: StoreWriter | None = None
        self._arriving: dict[str, StreamedLayer] = {}
        self._recorded: set[str] = set()
        self._progress: tqdm[Any] | None = None

    def adopt(self, layer: torch.nn.Module, method: "OffloadedMoEMethod") -> None:
        """Create the parameters of a layer in the way its weights are going to arrive."""
        if not self.layers:
            self._open(method)
        self.layers[self._name(layer)] = (layer, method)
        if self._writer is not None and type(layer).__name__ in DIRECT_WRITERS:
            method.create_real_weights(layer)
            return
        method.create_placeholders(layer)
        if self._store is not None:
            _pass_over_weights(layer)
            return
        self._arriving[layer.layer_name] = StreamedLayer(
            layer, lambda: method.create_real_weights(layer), lambda: self.record(layer, method)
        )

    def record(self, layer: torch.nn.Module, method: "OffloadedMoEMethod") -> None:
        """Process a layer that is loaded and turn it into records, once."""
        if self._writer is None or layer.layer_name in self._recorded:
            return
        self._recorded.add(layer.layer_name)
        if arriving := self._arriving.pop(layer.layer_name, None):
            arriving.materialize()
        method.real.process_weights_after_loading(layer)
        tensors = expert_tensors(layer)
        self._writer.add_layer(self._name(layer), record_layout(tensors), as_bytes(layer.layer_name, tensors))
        del tensors
        self._show_progress()
        method.real.moe_kernel = method.real.moe_quant_config = None
        method.create_placeholders(layer)
        _pass_over_weights(layer)

    def _show_progress(self) -> None:
        if self._progress is None:
            silent = get_tensor_model_parallel_rank() > 0
            self._progress = tqdm(total=len(self.layers), desc="Building expert store", unit="layer", disable=silent)
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

    def _open(self, method: "OffloadedMoEMethod") -> None:
        identity = store_identity(self._vllm_config, self._model_config, self._load_config, method.real)
        root = StoreRoot(self._config.store) if self._config.store else StoreRoot()
        found = root.open_or_build(identity, lambda sentence: logger.warning("moe-offload: %s", sentence))
        if isinstance(found, Store):
            logger.info("moe-offload: experts come from store %s", found.path)
            self._store = found
        else:
            logger.info("moe-offload: building store %s", root.path / identity.fingerprint)
            self._writer = found


def _pass_over_weights(layer: torch.nn.Module) -> None:
    """Leave what the checkpoint still has for this layer unread: its records are in the store."""
    for name, tensor in layer.named_parameters(recurse=False):
        if name not in NOT_EXPERT_WEIGHTS:
            tensor.weight_loader = _pass_over


def _pass_over(*args: Any, return_success: bool = False, **kwargs: Any) -> bool | None:
    """The weight loader of parameters whose records are already in the store."""
    return True if return_success else None


_pass_over.supports_moe_loading = True  # type: ignore[attr-defined]
