"""llama.cpp in a process of its own, its model mapped from a GGUF file (see gguf_model.py); serves by protocol.py.

Needs an environment with `pip install llama-cpp-python tokenizers`. Built from source it is compiled for this machine.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from by_path import module_at
from peer_worker import PeerRunner


class LlamaRunner(PeerRunner):
    """llama.cpp's own loop of decode calls, with its defaults but for threads and context."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: `checkpoint`, `gguf` (paths), `threads` and `context` (tokens)."""
        super().__init__(Path(arguments["checkpoint"]))
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        self._model = llama_cpp.llama_model_load_from_file(arguments["gguf"].encode(), model_parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {arguments['gguf']}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = arguments["context"]
        parameters.n_threads = parameters.n_threads_batch = arguments["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context of {arguments['context']} tokens")
        self.load_seconds = time.perf_counter() - started
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_n_batch(self._context)

    def begin(self, ids: list[int]) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for start in range(0, len(ids), self._batch):
            self._decode(ids[start : start + self._batch])
        return self._most_probable()

    def step(self, token: int) -> int:
        self._decode([token])
        return self._most_probable()

    def _decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode of {len(ids)} tokens returned {code}")

    def _most_probable(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        row = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocabulary)).contents
        return int(np.frombuffer(row, np.float32).argmax())


if __name__ == "__main__":
    module_at("bench/protocol.py").serve(LlamaRunner)
