"""Trained heads on disk, beside the history they were learned from. A file that is not entirely right is not used."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import TraceError, TraceReadError
from ..predict.network import NetworkSize, Parameters
from ..predict.token_vectors import LearnedVectors, TokenVectors
from ..store.files import write_atomically
from ..trace.npz import read_arrays
from ..trace.trace import Trace

VERSION = 1
HEADS_FILE = "heads.npz"
LEARNED_VECTORS_HEADS_FILE = "heads-and-vectors.npz"
"""Of engines that cannot read the model's own embeddings: others of the same model cannot use these heads."""
LOCK_FILE = "learning.lock"
"""Held by the one engine that trains."""
LEARNED_FILES = (HEADS_FILE, LEARNED_VECTORS_HEADS_FILE, LOCK_FILE)
"""All that learning leaves beside a history."""


class SavedHeads(NamedTuple):
    """What a training made."""

    parameters: Parameters
    vectors: LearnedVectors | None
    """Learned along with the heads; None where the model's own embeddings stand in for them."""
    trained_tokens: int
    """Tokens of the history they were learned from."""
    learned_from: NDArray[np.uint64]
    """Digests of its requests; none in files of versions that did not note them."""

    def unseen_tokens(self, requests: Iterable[Trace]) -> int:
        """Tokens of those ``requests`` that these heads were not learned from."""
        seen = set(self.learned_from.tolist())
        return sum(trace.num_tokens for trace in requests if request_digest(trace) not in seen)


def request_digest(trace: Trace) -> int:
    """64 bits that identify a request by what its tokens were routed to."""
    routed = np.ascontiguousarray(trace.experts, "<u2")
    return int.from_bytes(blake2b(routed.tobytes(), digest_size=8).digest(), "little")


def write_heads(
    path: Path, fingerprint: str, parameters: Parameters, vectors: TokenVectors, trained_on: Iterable[Trace]
) -> None:
    """Write heads learned from the requests ``trained_on``. A crash leaves the old file or the whole new one."""
    requests = list(trained_on)
    learned = vectors if isinstance(vectors, LearnedVectors) else LearnedVectors(vectors.width)
    fields = {
        "version": np.array(VERSION),
        "fingerprint": np.array(fingerprint),
        "size": np.array(parameters.size),
        "parameters": parameters.flat,
        "trained_tokens": np.array(sum(trace.num_tokens for trace in requests)),
        "learned_from": np.array([request_digest(trace) for trace in requests], np.uint64),
        "learned": np.array(isinstance(vectors, LearnedVectors)),
        "known": np.array(sorted(learned.known, key=learned.known.__getitem__), np.int64),
        "rows": learned.rows,
    }
    write_atomically(path, lambda file: np.savez(file, **fields))  # type: ignore[arg-type]


def read_heads(path: Path, fingerprint: str, size: NetworkSize, learned: bool) -> SavedHeads:
    """The heads in a file, if they fit this model.

    Args:
        size: what they must have; its ``vector`` counts only where vectors are not learned.
        learned: whether vectors must have been learned along.

    Raises:
        TraceError: the file is missing, damaged, of another version, model or size; says which.
        TraceReadError: it cannot be read at present.
    """
    try:
        with path.open("rb") as file:
            fields = read_arrays(file)
        version, found = int(fields["version"]), NetworkSize(*fields["size"].tolist())
        wanted = size._replace(vector=found.vector) if learned else size
        if version != VERSION or str(fields["fingerprint"]) != fingerprint or found != wanted:
            raise ValueError(f"version {version}, {found}, of model {fields['fingerprint']}")
        if bool(fields["learned"]) != learned or not np.isfinite(fields["parameters"]).all():
            raise ValueError("other token vectors, or numbers that are not finite")
        parameters = Parameters(found, fields["parameters"].astype(np.float32, copy=False))
        vectors = _learned_vectors(fields, found.vector) if learned else None
        trained_tokens = int(fields["trained_tokens"])
        learned_from = fields.get("learned_from", np.empty(0)).astype(np.uint64)
    except FileNotFoundError:
        raise TraceError(f"{path}: there is no such file") from None
    except (OSError, MemoryError) as error:
        raise TraceReadError(f"{path}: cannot be read at present ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path}: not heads of this model ({error})") from error
    return SavedHeads(parameters, vectors, trained_tokens, learned_from)


def _learned_vectors(fields: dict[str, np.ndarray], width: int) -> LearnedVectors:
    known, rows = fields["known"], fields["rows"]
    if rows.shape != (len(known) + 1, width):
        raise ValueError(f"{len(known)} tokens but vectors of shape {rows.shape}")
    return LearnedVectors.from_rows(known, rows.astype(np.float32))
