"""`vllm-moe-offload history …`: see, copy in and out, and shorten what engines remember of earlier requests.

It works on files alone: an engine that runs keeps what it has in memory, and adds to the file only what is new.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.errors import ConfigError, TraceError
from vllm_moe_offload.learning.heads_file import LEARNED_FILES
from vllm_moe_offload.sizes import parse_size, shortened, size_text
from vllm_moe_offload.store import default_root
from vllm_moe_offload.store.files import named_path, remove_leftovers
from vllm_moe_offload.trace.archive import HISTORY_FILE, HISTORY_LOCK_FILE, HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace, write_trace

from .options import JsonOption
from .progress import progress_bar

history = typer.Typer(name="history", help="List, export, import and prune histories.", no_args_is_help=True)

HistoryOption = Annotated[
    Path | None,
    typer.Option(
        "--history", help="Folder of the histories (default: 'history' beside the stores).", show_default=False
    ),
]
Fingerprint = Annotated[str, typer.Argument(help="Fingerprint of the model, or the start of it; see `history ls`.")]
_FINGERPRINT = re.compile(r"\w[\w.-]*")


@history.command()
def ls(folder: HistoryOption = None, as_json: JsonOption = False) -> None:
    """Show each model's history: requests, tokens, size; and what cannot be used."""
    archive = _archive(folder)
    problems = [f"set aside as unusable: {path}" for path in sorted(archive.directory.glob(_set_aside("*")))]
    found = []
    for entry in archive.entries():
        held: dict[str, Any] = {"model": None, "requests": None, "tokens": None}
        try:
            trace = archive.read(entry.fingerprint)
            held = {"model": trace.model, "requests": trace.num_requests, "tokens": trace.num_tokens}
        except TraceError as error:
            problems.append(f"unusable: {error}")
        found.append({"fingerprint": entry.fingerprint, "size": entry.nbytes} | held)
    if as_json:
        typer.echo(json.dumps({"folder": str(archive.directory), "histories": found, "problems": problems}))
        return
    if found:
        Console().print(_table(found))
    else:
        typer.echo(
            f"no histories in {archive.directory}{'' if archive.directory.exists() else ', which does not exist'}"
        )
    for problem in problems:
        typer.echo(problem)


@history.command()
def export(
    fingerprint: Fingerprint,
    file: Annotated[Path, typer.Argument(help="Trace file (.npz) to write.")],
    folder: HistoryOption = None,
) -> None:
    """Write a history as a trace file, to replay it or to bring it to another machine."""
    archive = _archive(folder)
    trace = archive.read(_complete(archive, fingerprint))
    try:
        write_trace(file, trace)
    except OSError as error:
        raise TraceError(f"{file}: cannot be written ({error.strerror})") from error
    typer.echo(f"wrote {trace.num_requests} requests, {trace.num_tokens} tokens to {file}")


@history.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Trace file (.npz) to read.")],
    fingerprint: Annotated[
        str,
        typer.Option(
            help="Model it belongs to, where the file does not say: all of its fingerprint.", show_default=False
        ),
    ] = "",
    folder: HistoryOption = None,
) -> None:
    """Add a trace's requests to a model's history."""
    archive = _archive(folder)
    with progress_bar(f"reading {file.name}", 3) as bar:
        trace = read_trace(file)
        name = _owner(file, trace, fingerprint)
        bar.advance()
        with _locked(archive, name):
            store = _load(archive, name) if archive.path(name).exists() else HistoryStore(trace.shape)
            _check_alike(file, trace, name, store)
            before = len(store.requests)
            bar.describe("adding its requests")
            store.extend(trace.requests())
            bar.advance()
            bar.describe("writing the history")
            archive.write(name, store.to_trace())
    added = int((trace.offsets[1:] > trace.offsets[:-1]).sum())
    forgotten = before + added - len(store.requests)
    room = f"; {forgotten} forgotten to stay within {size_text(store.budget_bytes)}" if forgotten else ""
    typer.echo(f"{name}: {len(store.requests)} requests, {store.num_tokens} tokens{room}")


@history.command()
def prune(
    fingerprint: Fingerprint,
    keep: Annotated[
        str, typer.Option(metavar="SIZE", help="Forget requests until the history takes no more than SIZE (64MiB).")
    ],
    folder: HistoryOption = None,
) -> None:
    """Shorten a history, forgetting what newer requests repeat first; 0 removes it and what was learned from it."""
    archive = _archive(folder)
    name = _complete(archive, fingerprint)
    size = _size(keep)
    if size == 0:
        _remove(archive, name)
        typer.echo(f"{name}: removed")
        return
    with _locked(archive, name):
        store = _load(archive, name)
        before = len(store.requests)
        store.prune(size)
        archive.write(name, store.to_trace())
    typer.echo(f"{name}: {len(store.requests)} of {before} requests, {store.num_tokens} tokens kept")


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table("fingerprint", "model", "requests", "tokens", "size")
    for each in found:
        usable = each["requests"] is not None
        columns = (
            (each["model"] or "-", str(each["requests"]), str(each["tokens"])) if usable else ("unusable", "-", "-")
        )
        table.add_row(each["fingerprint"], *columns, size_text(each["size"]))
    return table


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--keep {shortened(text)}: {error}") from None


def _archive(folder: Path | None) -> HistoryArchive:
    """Where an engine keeps its histories when nothing else is configured, or in the folder named."""
    folder = named_path(folder) if folder else default_root().parent / "history"
    if folder.exists() and not folder.is_dir():
        raise TraceError(f"--history {folder}: is a file; name the folder of the histories")
    return HistoryArchive(folder)


def _owner(file: Path, trace: Trace, fingerprint: str) -> str:
    """Whose history the file belongs to."""
    if not trace.num_tokens:
        raise TraceError(f"{file}: holds no tokens to remember")
    if fingerprint and trace.fingerprint and fingerprint != trace.fingerprint:
        raise TraceError(f"{file}: is of model {trace.fingerprint!r}, not of {fingerprint!r}; leave out --fingerprint")
    name = fingerprint or trace.fingerprint
    if not name:
        raise TraceError(f"{file}: names no model; say whose history it is with --fingerprint, see `history ls`")
    if not _FINGERPRINT.fullmatch(name):
        raise TraceError(f"fingerprint: {name!r} is none; it has only letters, digits, '.', '_' and '-'")
    return name


def _check_alike(file: Path, trace: Trace, name: str, store: HistoryStore) -> None:
    """Requests of one history must be comparable with each other."""
    if store.shape != trace.shape:
        raise TraceError(f"{file}: holds {_words(trace.shape)}, the history of {name} {_words(store.shape)}")
    kept = store.requests[0].trace if store.requests else trace
    for what, here, there in (
        ("token numbers", trace.tokens is not None, kept.tokens is not None),
        ("phases", trace.phase is not None, kept.phase is not None),
        ("embeddings", trace.embeddings is not None, kept.embeddings is not None),
    ):
        if here != there:
            owner = "the file" if here else f"the history of {name}"
            raise TraceError(f"{file}: only {owner} has {what}; they cannot be kept together")
    if _width(trace) != _width(kept):
        raise TraceError(
            f"{file}: its embeddings have {_width(trace)} numbers, those of the history of {name} {_width(kept)}"
        )


def _words(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers of {shape[1]} experts, top-{shape[2]}"


def _width(trace: Trace) -> int:
    return 0 if trace.embeddings is None else trace.embeddings.shape[1]


def _load(archive: HistoryArchive, fingerprint: str) -> HistoryStore:
    trace = archive.read(fingerprint)
    store = HistoryStore(trace.shape)
    store.extend(trace.requests())
    return store


@contextmanager
def _locked(archive: HistoryArchive, fingerprint: str) -> Iterator[None]:
    try:
        with archive.locked(fingerprint):
            yield
    except OSError as error:
        raise TraceError(f"{archive.path(fingerprint)}: cannot be written ({error.strerror or error})") from error


def _remove(archive: HistoryArchive, fingerprint: str) -> None:
    folder = archive.path(fingerprint).parent
    ours = [folder / name for name in (HISTORY_FILE, *LEARNED_FILES, HISTORY_LOCK_FILE)]
    with _locked(archive, fingerprint):
        for path in ours:
            remove_leftovers(path)
        for path in (*ours, *archive.directory.glob(_set_aside(fingerprint))):
            path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _set_aside(fingerprint: str) -> str:
    return f"{fingerprint}/*.unusable-*"


def _complete(archive: HistoryArchive, start: str) -> str:
    names = [entry.fingerprint for entry in archive.entries() if entry.fingerprint.startswith(start)]
    if start in names:
        return start
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise TraceError(f"fingerprint: {start!r} names {len(names)} histories in {archive.directory} ({found})")
    return names[0]
