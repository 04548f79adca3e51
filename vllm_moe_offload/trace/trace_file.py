"""Trace files, validated in full when read: an ``.npz`` of the arrays of ``Trace``, or a log of such files.

See docs/prediction.md. Required are ``experts``, ``weights``, ``offsets`` and ``num_experts``; optional are ``version``
(1 when absent), ``model``, ``fingerprint``, ``tokens``, ``phase``, ``embeddings``, ``group`` and ``repetitive``. Others
are left alone with a warning.
"""

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import TraceError, TraceReadError
from ..store.files import write_atomically
from .npz import NpzReader
from .trace import COLUMNS, MOST_EXPERTS, PREFILL, Trace, concat, names_each_once, sums_to_one
from .trace_log import is_log, read_frames

VERSION = 1
_REQUIRED = ("experts", "weights", "offsets", "num_experts")
_OPTIONAL = ("version", "model", "fingerprint", *(column.name for column in COLUMNS))


def read_trace(path: str | Path) -> Trace:
    """Read and validate a trace file.

    Raises:
        TraceError: the file is missing, no npz, damaged, of a newer version, or a field is absent, unknown or
            contradictory; the message names the file and the field.
        TraceReadError: it cannot be read at present.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if is_log(file):
                return _read_log(path, file)
            return checked_trace(path, _read_fields(path, file))
    except FileNotFoundError:
        raise TraceError(f"{path}: no such trace file") from None
    except OSError as error:
        raise TraceReadError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise TraceReadError(f"{path}: cannot be read (there is not enough memory for it)") from error


class LogHeader(msgspec.Struct, frozen=True):
    """The first payload of a log: whose requests the others hold, each an ``.npz``."""

    model: str
    fingerprint: str
    shape: tuple[int, int, int]


def encode_log_header(header: LogHeader) -> bytes:
    return msgspec.json.encode(header)


def decode_log_header(payload: bytes) -> LogHeader:
    """Raises ValueError if it is none."""
    try:
        return msgspec.json.decode(payload, type=LogHeader)
    except msgspec.MsgspecError as error:
        raise ValueError(f"it does not say whose trace it is ({error})") from error


def encode_trace(trace: Trace) -> bytes:
    """The payload of some requests in a log."""
    file = io.BytesIO()
    np.savez(file, **_fields_of(trace))  # type: ignore[arg-type]
    return file.getvalue()


def _read_log(path: Path, file: IO[bytes]) -> Trace:
    header, traces = None, []
    try:
        for payload, _ in read_frames(file):
            if header is None:
                header = decode_log_header(payload)
            else:
                traces.append(checked_trace(path, _read_fields(path, io.BytesIO(payload))))
    except ValueError as error:
        raise TraceError(f"{path}: not a readable trace file ({error})") from error
    if header is None:
        raise TraceError(f"{path}: not a readable trace file (cut short)")
    if any(trace.shape != header.shape for trace in traces):
        raise TraceError(f"{path}: not a readable trace file (requests of different shapes)")
    return replace(concat(traces, header.shape), model=header.model, fingerprint=header.fingerprint)


def _read_fields(path: Path, file: IO[bytes]) -> dict[str, NDArray]:
    """All fields that a trace may have; of others only the headers are read."""
    try:
        archive = NpzReader(file)
    except ValueError as error:
        raise TraceError(f"{path}: not a readable npz trace file ({error})") from error
    fields, unknown = {}, []
    for name in archive.names:
        try:
            if name in _REQUIRED or name in _OPTIONAL:
                fields[name] = archive.read(name)
            else:
                archive.outline(name)
                unknown.append(name)
        except ValueError as error:
            raise TraceError(f"{path}: field {name!r} cannot be read ({error})") from error
    if unknown:
        warnings.warn(f"{path}: ignoring unknown fields {', '.join(sorted(unknown))}", stacklevel=3)
    return fields


def write_trace(path: str | Path, trace: Trace, compress: bool = True) -> None:
    """Write ``trace`` so that a crash leaves either the old file or the whole new one. Compressing takes seconds."""
    save = np.savez_compressed if compress else np.savez
    write_atomically(Path(path), lambda file: save(file, **_fields_of(trace)))  # type: ignore[arg-type]


def _fields_of(trace: Trace) -> dict[str, NDArray]:
    return {
        "version": np.array(VERSION),
        "experts": trace.experts,
        "weights": trace.weights,
        "offsets": trace.offsets,
        "num_experts": np.array(trace.num_experts),
        "model": np.array(trace.model),
        "fingerprint": np.array(trace.fingerprint),
        **trace.columns(),
    }


def checked_trace(path: Path | str, fields: dict[str, NDArray]) -> Trace:
    """The trace these fields of a file are.

    Args:
        path: of the file, for the errors; or a name for what is no file but must hold the same.

    Raises:
        TraceError: a field is absent or contradictory.
    """
    _check_version(path, fields)
    for name in _REQUIRED:
        if name not in fields:
            raise TraceError(f"{path}: field {name!r} is missing; a trace has {', '.join(_REQUIRED)}")
    num_experts = _integer(path, fields, "num_experts")
    if not 0 < num_experts <= MOST_EXPERTS:
        raise TraceError(f"{path}: field 'num_experts' is {num_experts}, a layer has 1 to {MOST_EXPERTS}")
    experts = _check_maps(path, fields["experts"], fields["weights"], num_experts)
    offsets = _check_offsets(path, fields["offsets"], len(experts))
    rows, requests = len(experts), len(offsets) - 1
    return Trace(
        experts=experts,
        weights=fields["weights"].astype(np.float16, copy=False),
        offsets=offsets,
        num_experts=num_experts,
        model=str(fields.get("model", "")),
        fingerprint=str(fields.get("fingerprint", "")),
        tokens=_column(path, fields, "tokens", rows, "iu", np.int32),
        phase=_check_phase(path, _column(path, fields, "phase", rows, "iu", np.uint8)),
        embeddings=_check_embeddings(path, fields.get("embeddings"), requests),
        group=_column(path, fields, "group", requests, "U", None),
        repetitive=_column(path, fields, "repetitive", requests, "b", np.bool_),
    )


def _check_version(path: Path | str, fields: dict[str, NDArray]) -> None:
    """Before anything else: a newer version may have other fields."""
    version = _integer(path, fields, "version") if "version" in fields else VERSION
    if version > VERSION:
        raise TraceError(f"{path}: newer version {version}, this release reads up to {VERSION}; update it")
    if version < 1:
        raise TraceError(f"{path}: version is {version}, versions begin with 1")


def _integer(path: Path | str, fields: dict[str, NDArray], name: str) -> int:
    value = fields[name]
    if value.shape != () or value.dtype.kind not in "iu":
        raise TraceError(f"{path}: field {name!r} must be one integer, not {value.dtype} of shape {value.shape}")
    return int(value)


def _check_maps(path: Path | str, experts: NDArray, weights: NDArray, num_experts: int) -> NDArray[np.unsignedinteger]:
    if experts.ndim != 3 or experts.dtype not in (np.uint8, np.uint16) or 0 in experts.shape[1:]:
        raise TraceError(
            f"{path}: field 'experts' must be uint8 or uint16 [tokens, layers, top_k], not {experts.dtype} of shape "
            f"{experts.shape}"
        )
    if weights.shape != experts.shape or weights.dtype.kind != "f":
        raise TraceError(
            f"{path}: field 'weights' must be floats of the shape of 'experts' {experts.shape}, not {weights.dtype} of "
            f"shape {weights.shape}"
        )
    if experts.size == 0:
        return experts
    if int(experts.max()) >= num_experts:
        raise TraceError(f"{path}: field 'experts' names expert {experts.max()}, but 'num_experts' is {num_experts}")
    if not names_each_once(experts).all():
        raise TraceError(f"{path}: field 'experts' names an expert twice for one token and layer")
    if not np.isfinite(weights).all():
        raise TraceError(f"{path}: field 'weights' holds NaN or infinite values")
    if not sums_to_one(weights).all():
        raise TraceError(f"{path}: field 'weights' must be >= 0 and sum to 1 per token and layer")
    return experts


def _check_offsets(path: Path | str, offsets: NDArray, rows: int) -> NDArray[np.int64]:
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) == 0:
        raise TraceError(f"{path}: field 'offsets' must be integers [requests + 1], not {offsets.dtype}")
    offsets = offsets.astype(np.int64, copy=False)
    if offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any():
        raise TraceError(f"{path}: field 'offsets' must rise from 0 to the number of tokens, {rows}")
    return offsets


def _column(
    path: Path | str, fields: dict[str, NDArray], name: str, length: int, kinds: str, dtype: type | None
) -> NDArray | None:
    if name not in fields:
        return None
    value = fields[name]
    if value.shape != (length,) or value.dtype.kind not in kinds:
        raise TraceError(
            f"{path}: field {name!r} must have shape ({length},) and kind {kinds!r}, not {value.dtype} of shape "
            f"{value.shape}"
        )
    if kinds == "iu" and length and not _fits(value, np.dtype(dtype)):
        raise TraceError(f"{path}: field {name!r} holds numbers that are no {np.dtype(dtype)}")
    return value if dtype is None else value.astype(dtype, copy=False)


def _fits(value: NDArray, dtype: np.dtype) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= int(value.min()) and int(value.max()) <= limits.max


def _check_phase(path: Path | str, phase: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    if phase is not None and (phase > PREFILL).any():
        raise TraceError(f"{path}: field 'phase' must hold 0 (decode) or 1 (prefill), not {phase.max()}")
    return phase


def _check_embeddings(path: Path | str, embeddings: NDArray | None, requests: int) -> NDArray[np.float16] | None:
    if embeddings is None:
        return None
    if embeddings.ndim != 2 or len(embeddings) != requests or embeddings.dtype.kind != "f":
        raise TraceError(
            f"{path}: field 'embeddings' must be floats [{requests} requests, D], not {embeddings.dtype} of shape "
            f"{embeddings.shape}"
        )
    if not np.isfinite(embeddings).all():
        raise TraceError(f"{path}: field 'embeddings' holds values that are not finite")
    return embeddings.astype(np.float16, copy=False)
