"""`vllm-moe-offload daemon …`: run the one expert cache of a host, look at it, end it."""

import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from vllm_moe_offload.cache import POLICY_NAMES, policy_class
from vllm_moe_offload.daemon.histories import DaemonHistories
from vllm_moe_offload.daemon.notify import notify
from vllm_moe_offload.daemon.server import DaemonServer
from vllm_moe_offload.daemon.socket_file import SocketFile, find_group
from vllm_moe_offload.daemon.web import serve_metrics
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.ipc import membarrier
from vllm_moe_offload.ipc.address import default_socket_path
from vllm_moe_offload.ipc.death import Death
from vllm_moe_offload.ipc.protocol import GetStatus, Stop
from vllm_moe_offload.store import default_root
from vllm_moe_offload.store.files import named_path

from ..sizes import EXAMPLES, parse_size, shortened, size_text
from .daemon_view import status_view
from .log import LogLevel, log_to_stderr
from .options import IntervalOption, JsonOption, SocketOption, StoreOption
from .top import connect, follow

logger = logging.getLogger(__name__)

END_SECONDS = 120.0
"""For writing the histories, too."""

daemon = typer.Typer(name="daemon", help="Run one expert cache for all engines of this host, show its status, stop it.")

HistoryOption = Annotated[
    str,
    typer.Option(
        help="Folder of the histories, or 'off' to keep them in memory only (default: 'history' beside the stores).",
        show_default=False,
    ),
]


@daemon.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    cache: Annotated[str, typer.Option(help="Memory for experts of all models together, like 32GiB.")] = "",
    socket: SocketOption = None,
    store: StoreOption = None,
    history: HistoryOption = "",
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Serve the statistics to Prometheus, and a live page at /moe-offload, on this port of 127.0.0.1.",
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help=f"Eviction policy: {', '.join(POLICY_NAMES)}, or a class as package.module:Class.")
    ] = "lfu",
    share: Annotated[
        list[str] | None,
        typer.Option(help="STORE=SIZE: at most so much memory for one model, by the name of its store (repeatable)."),
    ] = None,
    group: Annotated[str, typer.Option(help="Members of this group may use the daemon too.")] = "",
    leave_after: Annotated[
        float | None, typer.Option(min=0, help="End after so many seconds without an attached engine.")
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(case_sensitive=False, help="Least level of what is logged on stderr.")
    ] = LogLevel.INFO,
) -> None:
    """Serve experts to the engines of this host until SIGTERM, or until they have left."""
    if context.invoked_subcommand is not None:
        return
    log_to_stderr(log_level)
    budget = _size("--cache", cache)
    shares = _shares(share or [])
    policy_class(policy)
    if group and socket is None:
        raise ConfigError(f"--group {group}: name a --socket in a folder its members can enter, too")
    gid = find_group(group) if group else None
    root = default_root() if store is None else store
    membarrier.barrier()
    with contextlib.ExitStack() as stack:
        place = SocketFile.claim(socket or default_socket_path(), gid)
        stack.callback(place.release)
        # Late, because a second daemon should learn at once that it is one.
        from vllm_moe_offload.daemon.models import DaemonModels

        models = DaemonModels(root, budget, shares, policy, None)
        stack.callback(models.close)
        histories = DaemonHistories(_history_folder(history, root))
        stack.callback(histories.close)
        server = DaemonServer(place, models, histories, budget, gid, leave_after)
        if metrics_port is not None:
            stack.enter_context(serve_metrics(metrics_port, server.status))
        _stop_on_signals(server)
        logger.info("pid %d serves %s of experts from %s at %s", os.getpid(), size_text(budget), root, place.path)
        notify("READY=1")
        reason = server.serve()
        logger.info("ending: %s", reason)
        notify("STOPPING=1")


def _stop_on_signals(server: DaemonServer) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda which, _: server.stop(signal.Signals(which).name))


@daemon.command()
def status(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show who is attached, and per model what is resident and how well that serves."""
    with contextlib.closing(connect(socket)) as connection:
        report = connection.request(GetStatus())
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        Console().print(status_view(report))


@daemon.command()
def top(socket: SocketOption = None, interval: IntervalOption = 1.0) -> None:
    """Show the same, again and again, until Ctrl-C. `vllm-moe-offload top` has the engines too."""
    with contextlib.closing(connect(socket)) as connection:
        follow(lambda: status_view(connection.request(GetStatus())), interval)


@daemon.command()
def stop(socket: SocketOption = None) -> None:
    """End the daemon once it has written its histories; attached engines go on with the experts that were loaded."""
    with contextlib.closing(connect(socket)) as connection:
        pid = connection.peer.pid
        if pid == 0:
            raise ConfigError("the daemon lives in another container, where its end cannot be seen; stop it there")
        death = Death(pid)
        connection.request(Stop())
    if not death.known(END_SECONDS):
        raise ConfigError(
            f"the daemon (pid {pid}) was told to end {END_SECONDS:g} s ago and has not; it may still be writing "
            "histories, see its log"
        )
    typer.echo(f"the daemon (pid {pid}) has ended")


def _size(option: str, text: str) -> int:
    """Bytes in ``text``; the daemon knows no model of which it could be a share."""
    if not text:
        raise ConfigError(f"{option} is missing: give {EXAMPLES}")
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{option} {shortened(text)}: {error}") from None
    if size < 1:
        raise ConfigError(f"{option} {text}: leaves no room at all; give {EXAMPLES}")
    return size


def _shares(texts: list[str]) -> dict[str, int]:
    shares = {}
    for text in texts:
        store, separator, size = text.partition("=")
        if not (store and separator):
            raise ConfigError(f"--share {text}: give STORE=SIZE; `vllm-moe-offload store ls` names the stores")
        shares[store] = _size(f"--share {store}=", size)
    return shares


def _history_folder(text: str, root: Path) -> Path | None:
    if text == "off":
        return None
    return named_path(Path(text)) if text else root.parent / "history"
