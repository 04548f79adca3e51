"""`vllm-moe-offload store …`: see, check and remove what is on disk. Must never remove without being told to."""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from vllm_moe_offload.errors import StoreError
from vllm_moe_offload.sizes import parse_size, shortened, size_text
from vllm_moe_offload.store import Store, StoreInfo, StoreRoot

from .errors import print_error
from .options import JsonOption, StoreOption
from .progress import progress_bar

DAY = 86400

store = typer.Typer(name="store", help="List, verify and prune the stores of expert records.", no_args_is_help=True)


@store.command()
def ls(folder: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show each store's model, size, age, time since an engine last opened it, and fingerprint."""
    stores = StoreRoot(folder)
    infos = stores.ls()
    if as_json:
        typer.echo(json.dumps({"root": str(stores.path), "stores": [_as_object(info) for info in infos]}))
        return
    if not infos:
        typer.echo(f"no stores in {stores.path}")
        return
    rows = [("MODEL", "SIZE", "AGE", "UNUSED", "FINGERPRINT", "STATE")] + [_row(info) for info in infos]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        typer.echo("  ".join([*map(str.ljust, row[:5], widths), row[5]]).rstrip())


@store.command()
def verify(
    fingerprint: Annotated[
        str, typer.Argument(help="Start of the fingerprint of one store; all without it.", show_default=False)
    ] = "",
    folder: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every record and compare it with its checksum; exit with 1 if any is damaged."""
    stores = StoreRoot(folder)
    chosen = [info for info in stores.ls() if _is_store(info) and info.fingerprint.startswith(fingerprint)]
    if not chosen:
        raise StoreError(f"no store in {stores.path} is named {fingerprint!r}…; see `store ls`")
    verified = []
    for info in chosen:
        verified.append(_verify_one(info))
        if not as_json:
            typer.echo("\n".join(verified[-1].lines))
    if as_json:
        typer.echo(json.dumps({"root": str(stores.path), "stores": [each._asdict() for each in verified]}))
    if not all(each.intact for each in verified):
        raise typer.Exit(1)


@store.command()
def prune(
    everything: Annotated[bool, typer.Option("--all", help="Remove every store, not only those of no use.")] = False,
    superseded: Annotated[
        bool,
        typer.Option("--superseded", help="Also those a newer store of the same model and settings has replaced."),
    ] = False,
    unused_for: Annotated[
        float | None,
        typer.Option("--unused-for", min=0, metavar="DAYS", help="Also those unused for so long.", show_default=False),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="SIZE", help="Also those longest unused, until the rest fits in SIZE (500GiB)."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    folder: StoreOption = None,
) -> None:
    """Remove what killed builds left, stores that are damaged or outdated, and stores whose checkpoint is gone."""
    stores = StoreRoot(folder)
    doomed = stores.prunable(
        everything,
        superseded,
        math.inf if unused_for is None else unused_for * DAY,
        math.inf if keep is None else _size_of(keep),
    )
    if not doomed:
        typer.echo(f"nothing to prune in {stores.path}")
        return
    for info in doomed:
        typer.echo("  ".join(_row(info)))
    if not yes:
        typer.confirm(f"remove {len(doomed)} from {stores.path}?", abort=True)
    freed, problems = stores.prune(doomed)
    typer.echo(f"freed {size_text(freed)}")
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(1)


def _is_store(info: StoreInfo) -> bool:
    return info.path.name == info.fingerprint


def _row(info: StoreInfo) -> tuple[str, str, str, str, str, str]:
    state = f"{info.state}, checkpoint gone" if info.orphaned else info.state
    if info.superseded:
        state += ", superseded"
    return (
        _model_name(info.model),
        size_text(info.size),
        _age_text(time.time() - info.built),
        _age_text(time.time() - info.used),
        info.fingerprint,
        f"{state}: {info.detail}" if info.detail else state,
    )


def _size_of(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise StoreError(f"--keep {shortened(text)}: {error}") from None


def _model_name(model: str) -> str:
    """The last folder, or `org/name` for a snapshot in the Hugging Face cache."""
    for part in Path(model).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return Path(model).name or "?"


def _age_text(seconds: float) -> str:
    for unit, length in (("d", DAY), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


class _Verified(NamedTuple):
    fingerprint: str
    problem: str
    """Why the store cannot be opened; else empty."""
    records: int
    damaged: list[tuple[str, int]]
    """Layer and expert of each damaged record."""

    @property
    def intact(self) -> bool:
        return not self.problem and not self.damaged

    @property
    def lines(self) -> list[str]:
        """What is wrong, by record, and how many are not."""
        if self.problem:
            return [f"{self.fingerprint}: {self.problem}"]
        damaged = [f"{self.fingerprint}: damaged: {layer}, expert {expert}" for layer, expert in self.damaged]
        intact = self.records - len(self.damaged)
        return [*damaged, f"{self.fingerprint}: {intact} of {self.records} records are intact"]


def _verify_one(info: StoreInfo) -> _Verified:
    try:
        opened = Store.open(info.path)
    except StoreError as error:
        return _Verified(info.fingerprint, str(error), 0, [])
    with progress_bar(f"verifying {info.fingerprint[:12]}", opened.data_bytes, in_bytes=True) as bar:
        damaged = opened.verify(bar.at)
    opened.close()
    return _Verified(info.fingerprint, "", sum(layer.experts for layer in opened.layers), damaged)


def _as_object(info: StoreInfo) -> dict[str, Any]:
    """``info`` for JSON; times in seconds since 1970, the size in bytes."""
    return {
        "fingerprint": info.fingerprint,
        "path": str(info.path),
        "model": info.model,
        "size": info.size,
        "built": info.built,
        "used": info.used,
        "state": info.state,
        "detail": info.detail,
        "checkpoint_gone": info.orphaned,
        "superseded": info.superseded,
    }
