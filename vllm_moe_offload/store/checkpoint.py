"""The content of a checkpoint's files as digests, computed once per file and remembered.

Must never call two files the same because they merely look alike, nor trust what another user has noted.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from vllm_moe_offload.sizes import size_text
from vllm_moe_offload.store.files import explained, write_atomically
from vllm_moe_offload.store.lock import BuildLock

logger = logging.getLogger(__name__)

SAMPLES = 32
SAMPLE_BYTES = 4096
READERS = 8
WORTH_SAYING_BYTES = 1 << 30
_CONTENT_ADDRESS = re.compile(r"[0-9a-f]{64}")


class FileDigests:
    """sha256 of checkpoint files. Remembered in `folder`, so that a file is read whole only once.

    A file is known again by its path, size, modification time and the hash of `SAMPLES` blocks spread over it; if any
    of these has changed, it is read again, and may well turn out to be what it was. A link to a blob that is named by
    its own sha256 (the Hugging Face cache) is not read at all.
    """

    def __init__(self, folder: Path):
        """`folder` need not exist. Why it takes long, or will the next time, is logged."""
        self._folder = folder
        self._path = folder / f"file-digests-{os.geteuid()}.json"

    def of(self, files: Sequence[Path]) -> list[str]:
        """64 hex digits for each of `files`. Raises StoreError if one cannot be read."""
        with explained("read the checkpoint", files[0].parent):
            named = [_content_address(path) for path in files]
            unnamed = [path for path, name in zip(files, named, strict=True) if name is None]
            read = iter(self._look_up(unnamed))
            return [name or next(read) for name in named]

    def _look_up(self, files: Sequence[Path]) -> list[str]:
        keys = [_look(path) for path in files]
        known = self._load()
        if any(key not in known for key in keys):
            lock = self._lock()
            try:
                known = self._load()
                new = {key: path for key, path in zip(keys, files, strict=True) if key not in known}
                if new:
                    known |= self._read(new)
                    self._save(known)
            finally:
                if lock is not None:
                    lock.release()
        return [known[key] for key in keys]

    def _read(self, files: dict[str, Path]) -> dict[str, str]:
        size = sum(path.stat().st_size for path in files.values())
        if size >= WORTH_SAYING_BYTES:
            logger.info("reading %s of checkpoint once, to know it again by its content", size_text(size))
        with ThreadPoolExecutor(READERS) as threads:
            return dict(zip(files, threads.map(_sha256_of, files.values()), strict=True))

    def _lock(self) -> BuildLock | None:
        """So that the ranks of one engine do not all read the same; None where none can be had."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            return BuildLock.acquire(
                self._path.with_suffix(".lock"),
                lambda holder: logger.info("waiting for %s, reading checkpoints", holder),
            )
        return None

    def _load(self) -> dict[str, str]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return {}
        with os.fdopen(fd, "rb") as file, suppress(msgspec.DecodeError, OSError):
            if os.fstat(fd).st_uid == os.geteuid():
                return msgspec.json.decode(file.read(), type=dict[str, str])
        return {}

    def _save(self, known: dict[str, str]) -> None:
        try:
            write_atomically(self._path, lambda file: file.write(msgspec.json.encode(known)))
        except OSError as error:
            logger.warning(
                "the next start reads the checkpoint again: %s cannot be written (%s)", self._path, error.strerror
            )


def _content_address(path: Path) -> str | None:
    target = path.resolve(strict=True).name
    return target if _CONTENT_ADDRESS.fullmatch(target) else None


def _look(path: Path) -> str:
    """What a file is known again by, without being read whole."""
    real = path.resolve()
    status = real.stat()
    look = hashlib.sha256(f"{real}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    with real.open("rb") as file:
        for step in range(SAMPLES):
            file.seek(max(status.st_size - SAMPLE_BYTES, 0) * step // (SAMPLES - 1))
            look.update(file.read(SAMPLE_BYTES))
    return look.hexdigest()


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
