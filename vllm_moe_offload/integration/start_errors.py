"""An engine that does not start ends with what stopped it: a worker's error is raised again in the first process.

vLLM's own last line there is "Engine core initialization failed. See root cause above", whatever a worker raised. A
worker therefore leaves its error in a file that is named by the engine's ``instance_id``, which both know.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .. import errors
from ..errors import OffloadError
from . import seams

_MOST_BYTES = 1 << 16


class _OwnEngine(NamedTuple):
    """An engine that was configured in this process."""

    pid: int
    """Of the process: a forked worker has a copy."""
    from_command_line: bool


_own_engines: dict[str, _OwnEngine] = {}
"""By ``instance_id``."""


class _LeftError(msgspec.Struct):
    kind: str
    """A class of errors.py."""
    message: str


def install() -> None:
    seams.WAIT_FOR_ENGINE.wrap(_raise_error_of_worker)


def expect_errors(vllm_config: Any, from_command_line: bool) -> None:
    """This process is about to start the engine."""
    _own_engines[vllm_config.instance_id] = _OwnEngine(os.getpid(), from_command_line)
    _path(vllm_config.instance_id).unlink(missing_ok=True)


@contextmanager
def leaving_errors(vllm_config: Any) -> Iterator[None]:
    """Around the start of a worker: an error of ours is left for the process that starts the engine, and raised."""
    try:
        yield
    except OffloadError as error:
        own = _own_engines.get(vllm_config.instance_id)
        if own is None or own.pid != os.getpid():
            with suppress(OSError):  # another worker was first, or there is no room: vLLM's message stays the last
                _leave(_path(vllm_config.instance_id), error)
        raise


@contextmanager
def raising_left_errors() -> Iterator[None]:
    """Around waiting for workers: an exception is replaced by the error that a worker has left, if one has.

    Raises:
        OffloadError: of the same class of errors.py, with the same message.
        SystemExit: the same, with exit code 1, where the engine comes from a command line.
    """
    try:
        yield
    except Exception:
        for instance_id, engine in _own_engines.items():
            if (left := _take(_path(instance_id))) is not None:
                raise SystemExit(in_one_line(left)) if engine.from_command_line else left from None
        raise


def in_one_line(error: OffloadError) -> str:
    """What a command line tool says instead of a traceback."""
    return f"error: {type(error).__name__}: {error}"


def _raise_error_of_worker(wait: Callable[..., Any]) -> Callable[..., Any]:
    def wait_for_engine_startup(*args: Any, **kwargs: Any) -> Any:
        with raising_left_errors():
            return wait(*args, **kwargs)

    return wait_for_engine_startup


def _path(instance_id: str) -> Path:
    return Path(tempfile.gettempdir()) / f"moe-offload-start-{os.geteuid()}-{instance_id}"


def _leave(path: Path, error: OffloadError) -> None:
    kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
        file.write(msgspec.json.encode(_LeftError(kind, str(error)))[:_MOST_BYTES])


def _take(path: Path) -> OffloadError | None:
    """The error that a worker of this user has left, which is then gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
            if os.fstat(descriptor).st_uid != os.geteuid():
                return None
            left = msgspec.json.decode(file.read(_MOST_BYTES), type=_LeftError)
        path.unlink()
    except (OSError, msgspec.MsgspecError):
        return None
    kind: type[OffloadError] = getattr(errors, left.kind, OffloadError)
    return kind(left.message)
