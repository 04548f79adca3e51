"""A process that builds or opens a store: `builder.py ROOT LAYERS RECORD_BYTES [hold]`.

Prints one line per event (`say …`, `building`, `written BYTES`, `built DIGEST`, `opened DIGEST`, `error …`); with
`hold` it waits for a line on stdin before its first layer. With $DIE_BEFORE naming a step of `finish` it kills itself
there with SIGKILL; with $FILE_LIMIT no file may grow beyond that many bytes; with $UNPRIVILEGED it gives up root; with
$ACT_AS=UID:GID it becomes that user, with that one group.
"""

import hashlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.store import Component, RecordLayout, Store, StoreIdentity, StoreRoot, writer

EXPERTS = 8


def emit(*words: object) -> None:
    print(*words, flush=True)


class Say(logging.Handler):
    """Prints what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        emit("say", record.getMessage())


def main(root: str, layers: str, record_bytes: str, *options: str) -> None:
    layout = RecordLayout((Component("w", "uint8", (int(record_bytes),), int(record_bytes)),))
    opened = StoreRoot(Path(root)).open_or_build(StoreIdentity({"test": "processes"}))
    how = "opened"
    if not isinstance(opened, Store):
        how = "built"
        opened.progress = lambda written: emit("written", written)
        emit("building")
        if "hold" in options:
            sys.stdin.readline()
        rng = np.random.default_rng(7)
        opened.expect(int(layers) * EXPERTS * layout.record_bytes)
        for layer in range(int(layers)):
            opened.add_layer(f"layer {layer}", layout, [rng.integers(0, 256, (EXPERTS, int(record_bytes)), np.uint8)])
        opened = opened.finish()
    emit(how, hashlib.sha256((opened.path / "records.bin").read_bytes()).hexdigest())


def die_before(step: str) -> None:
    """Only the moment of death is arranged; everything up to it is the real writer."""
    calls = {"sync_folder": 0}

    def die_or(real: Callable[..., Any], when: Callable[[], bool]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if when():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    def nth_sync() -> bool:
        calls["sync_folder"] += 1
        return calls["sync_folder"] == (2 if step == "last_sync" else 1)

    if step == "fsync":
        os.fsync = die_or(os.fsync, lambda: True)
    elif step == "rename":
        Path.rename = die_or(Path.rename, lambda: True)  # type: ignore[method-assign]
    elif step == "write_synced":
        writer.write_synced = die_or(writer.write_synced, lambda: True)
    else:
        writer.sync_folder = die_or(writer.sync_folder, nth_sync)


if step := os.environ.get("DIE_BEFORE"):
    die_before(step)
if limit := os.environ.get("FILE_LIMIT"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
if os.environ.get("UNPRIVILEGED") and os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
if user := os.environ.get("ACT_AS"):
    uid, gid = map(int, user.split(":"))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
logging.getLogger("vllm_moe_offload").addHandler(Say())
try:
    main(*sys.argv[1:])
except StoreError as error:
    emit("error", error)
    sys.exit(3)
