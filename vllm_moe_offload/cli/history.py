"""`vllm-moe-offload history …`: see, copy in and out, and shorten what engines remember of earlier requests."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.history.archive import HistoryArchive, default_directory
from vllm_moe_offload.history.store import HistoryStore
from vllm_moe_offload.history.trace_file import read_trace, write_trace

history = typer.Typer(name="history", help="List, export, import and prune histories.", no_args_is_help=True)

DirectoryOption = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of the histories.", envvar="VLLM_MOE_OFFLOAD_HISTORY", show_default=False),
]
Fingerprint = Annotated[str, typer.Argument(help="Fingerprint of the model, or the start of it; see `history ls`.")]


@history.command()
def ls(directory: DirectoryOption = None) -> None:
    """Show each model's history: requests, tokens, size."""
    archive = HistoryArchive(directory or default_directory())
    entries = list(archive.entries())
    if not entries:
        typer.echo(f"no histories in {archive.directory}")
        return
    table = Table("fingerprint", "model", "requests", "tokens", "size")
    for entry in entries:
        try:
            trace = archive.read(entry.fingerprint)
            columns = (trace.model or "-", str(trace.num_requests), str(trace.num_tokens))
        except TraceError as error:
            columns = (f"unusable: {error}", "-", "-")
        table.add_row(entry.fingerprint, *columns, f"{entry.nbytes / 2**20:.1f} MiB")
    Console().print(table)


@history.command()
def export(
    fingerprint: Fingerprint,
    file: Annotated[Path, typer.Argument(help="Trace file (.npz) to write.")],
    directory: DirectoryOption = None,
) -> None:
    """Write a history as a trace file, to replay it or to bring it to another machine."""
    archive = HistoryArchive(directory or default_directory())
    trace = archive.read(_complete(archive, fingerprint))
    write_trace(file, trace)
    typer.echo(f"wrote {trace.num_requests} requests, {trace.num_tokens} tokens to {file}")


@history.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Trace file (.npz) to read.")],
    fingerprint: Annotated[
        str, typer.Option(help="Model it belongs to, where the file does not say.", show_default=False)
    ] = "",
    directory: DirectoryOption = None,
) -> None:
    """Add a trace's requests to a model's history."""
    trace = read_trace(file)
    name = fingerprint or trace.fingerprint
    if not name:
        raise TraceError(f"{file}: names no model; say whose history it is with --fingerprint")
    archive = HistoryArchive(directory or default_directory())
    store = _load(archive, name) if archive.path(name).exists() else HistoryStore(trace.shape)
    if store.shape != trace.shape:
        raise TraceError(f"{file}: has shape {trace.shape}, the history of {name} has {store.shape}")
    store.extend(trace.requests())
    archive.save(name, store)
    typer.echo(f"{name}: {len(store.requests)} requests, {store.num_tokens} tokens")


@history.command()
def prune(
    fingerprint: Fingerprint,
    megabytes: Annotated[int, typer.Option(min=0, help="Forget requests until no more than this is kept.")],
    directory: DirectoryOption = None,
) -> None:
    """Shorten a history, forgetting what newer requests repeat first; 0 removes it."""
    archive = HistoryArchive(directory or default_directory())
    name = _complete(archive, fingerprint)
    if megabytes == 0:
        archive.path(name).unlink()
        typer.echo(f"{name}: removed")
        return
    store = _load(archive, name)
    store.prune(megabytes << 20)
    archive.save(name, store)
    typer.echo(f"{name}: {len(store.requests)} requests, {store.num_tokens} tokens kept")


def _load(archive: HistoryArchive, fingerprint: str) -> HistoryStore:
    trace = archive.read(fingerprint)
    store = HistoryStore(trace.shape)
    store.extend(trace.requests())
    return store


def _complete(archive: HistoryArchive, start: str) -> str:
    names = [entry.fingerprint for entry in archive.entries() if entry.fingerprint.startswith(start)]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise TraceError(f"fingerprint: {start!r} names {len(names)} histories in {archive.directory} ({found})")
    return names[0]
