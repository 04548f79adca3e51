"""Trained heads on disk, beside the history they were trained on."""

import zipfile
from pathlib import Path

import numpy as np

from ..errors import TraceError
from ..history.files import write_atomically
from .base import ModelShape
from .heads import HeadsPredictor
from .network import NetworkSize, Parameters
from .token_vectors import LearnedVectors, TokenVectors

HEADS_FILE = "heads.npz"
_VERSION = 1


def save_heads(path: Path, heads: HeadsPredictor, trained_tokens: int, fingerprint: str) -> None:
    """Write heads so that a crash leaves the old file or the new one. Weights are rounded to float16."""
    fields = {
        "version": np.array(_VERSION),
        "fingerprint": np.array(fingerprint),
        "trained_tokens": np.array(trained_tokens),
        "size": np.array(heads.parameters.size),
        "parameters": heads.parameters.flat.astype(np.float16),
    }
    if isinstance(heads.vectors, LearnedVectors):
        fields["tokens"] = np.fromiter(heads.vectors.known, np.int64, len(heads.vectors.known))
        fields["vectors"] = heads.vectors.rows.astype(np.float16)
    write_atomically(path, lambda file: np.savez(file, **fields))  # type: ignore[arg-type]


def load_heads(
    path: Path, shape: ModelShape, fingerprint: str, vectors: TokenVectors | None = None
) -> tuple[HeadsPredictor, int]:
    """Heads and the number of tokens they were trained on. ``vectors``: the model's own, if they were trained on those.

    Raises:
        TraceError: the file is missing, damaged, of another version, model or kind of vectors. Train anew then.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files}
        version, owner, tokens = int(fields["version"]), str(fields["fingerprint"]), int(fields["trained_tokens"])
        size = NetworkSize(*fields["size"].tolist())
        parameters = Parameters(size, fields["parameters"].astype(np.float32))
        learned = (fields["tokens"], fields["vectors"].astype(np.float32)) if "tokens" in fields else None
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: not a readable file of heads ({error})") from error
    if version != _VERSION or owner != fingerprint:
        raise TraceError(
            f"{path}: version {version} of model {owner!r}; expected version {_VERSION} of {fingerprint!r}"
        )
    if (size.layers, size.experts) != (shape.layers, shape.experts):
        raise TraceError(
            f"{path}: for {size.layers} layers of {size.experts} experts, not {shape.layers} of {shape.experts}"
        )
    if vectors is None and learned is not None:
        vectors = LearnedVectors.from_rows(*learned)
    if vectors is None or vectors.width != size.vector:
        raise TraceError(f"{path}: trained on token vectors of length {size.vector}, which are not at hand")
    return HeadsPredictor(shape, parameters, vectors), tokens
