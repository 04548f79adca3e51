"""Loading a model whose experts go into a store instead of into memory.

The first time, vLLM's own loaders and processing run layer by layer and each finished layer becomes records; later
the store is found and the checkpoint's expert tensors are passed over unread.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..config import OffloadConfig
from ..errors import UnsupportedError
from ..store.reader import Store
from ..store.root import StoreRoot
from ..store.writer import StoreWriter
from . import seams
from .engine_config import offload_config
from .identity import store_identity
from .records import NOT_EXPERT_WEIGHTS, as_bytes, expert_tensors, record_layout
from .serving import ServedModel
from .streaming import DIRECT_WRITERS, StreamedLayer

if TYPE_CHECKING:
    from .method import OffloadedMoEMethod

logger = init_logger("vllm.moe_offload")

PREPARE_ONLY = "moe_offload_prepare_only"
"""Key of ``additional_config`` that ends loading when the store is complete (see prepare.py)."""

_loading: ContextVar["ModelOffload | None"] = ContextVar("moe_offload_loading", default=None)


def install() -> None:
    seams.LOAD_MODEL.wrap(_load_with_store)


def loading_offload() -> "ModelOffload | None":
    """The offload of the model that is being loaded right now, or None."""
    return _loading.get()


def _load_with_store(load_model: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        config = offload_config(vllm_config)
        if config is None or model_config is not vllm_config.model_config:
            return load_model(self, vllm_config, model_config, prefix)
        from .forward import register_op

        register_op()
        self.download_model(model_config)
        offload = ModelOffload(vllm_config, config)
        token = _loading.set(offload)
        try:
            model = load_model(self, vllm_config, model_config, prefix)
            if offload.engaged:
                _finish(model, offload, vllm_config)
        except BaseException:
            offload.abort()
            raise
        finally:
            _loading.reset(token)
        return model

    return load


def _finish(model: torch.nn.Module, offload: "ModelOffload", vllm_config: Any) -> None:
    if PREPARE_ONLY in vllm_config.additional_config:
        model.moe_offload_prepared = offload.prepared()
    else:
        model.moe_offload = offload.finish(model)


class PreparedStore(NamedTuple):
    """A complete store, as ``prepare`` reports it."""

    path: str
    size: int
    """Bytes."""
    built: bool
    """Just now, rather than found."""


class ModelOffload:
    """One model on its way from checkpoint to store to slots."""

    def __init__(self, vllm_config: Any, config: OffloadConfig):
        self._vllm_config = vllm_config
        self._config = config
        self._methods: dict[str, tuple[torch.nn.Module, OffloadedMoEMethod]] = {}
        self._store: Store | None = None
        self._writer: StoreWriter | None = None
        self._arriving: dict[str, StreamedLayer] = {}
        self._recorded: set[str] = set()
        self._progress: tqdm[Any] | None = None

    def adopt(self, layer: torch.nn.Module, method: "OffloadedMoEMethod") -> None:
        """Create the parameters of a layer in the way its weights are going to arrive."""
        if not self._methods:
            self._open(method)
        self._methods[layer.layer_name] = (layer, method)
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
        self._writer.add_layer(layer.layer_name, record_layout(tensors), as_bytes(layer.layer_name, tensors))
        del tensors
        self._show_progress()
        method.real.moe_kernel = method.real.moe_quant_config = None
        method.create_placeholders(layer)
        _pass_over_weights(layer)

    def _show_progress(self) -> None:
        if self._progress is None:
            silent = get_tensor_model_parallel_rank() > 0
            self._progress = tqdm(total=len(self._methods), desc="Building expert store", unit="layer", disable=silent)
        self._progress.update()
        if len(self._recorded) == len(self._methods):
            self._progress.close()

    def finish(self, model: torch.nn.Module) -> ServedModel:
        """All layers are loaded: complete the store and give every layer its slots.

        Raises:
            StoreError: the store cannot be completed, or is not this model's.
        """
        return ServedModel(self._vllm_config, self._config, model, self._complete(), self._methods)

    def prepared(self) -> PreparedStore:
        """All layers are loaded: complete the store, and leave it at that. Raises what ``finish`` raises."""
        built = self._writer is not None
        store = self._complete()
        store.close()
        return PreparedStore(str(store.path), store.data_bytes, built)

    def abort(self) -> None:
        """Leave nothing half-built behind."""
        if self._writer is not None:
            self._writer.abort()

    @property
    def engaged(self) -> bool:
        """Whether this worker has MoE layers: a pipeline stage may have none.

        Raises:
            UnsupportedError: the whole model has none.
        """
        if not self._methods and self._vllm_config.parallel_config.pipeline_parallel_size == 1:
            raise UnsupportedError(
                f"moe-offload is on, but {self._vllm_config.model_config.model} has no MoE layers it could offload; "
                "switch moe-offload off for this model"
            )
        return bool(self._methods)

    def _complete(self) -> Store:
        if self._writer is not None:
            self._store, self._writer = self._writer.finish(), None
        assert self._store is not None
        return self._store

    def _open(self, method: "OffloadedMoEMethod") -> None:
        identity = store_identity(self._vllm_config, method.real)
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
