"""`vllm-moe-offload prepare MODEL`: build the stores a later `vllm serve MODEL` finds. Must never serve."""

import time
from typing import Annotated

import typer

from ..sizes import size_text
from .installed import require_vllm
from .model_argument import checkpoint_folder
from .options import StoreOption


def prepare(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or its name on the Hugging Face hub.")],
    engine_arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- [VLLM ENGINE ARGUMENTS]...",
            help="What `vllm serve` will be given and changes the records: "
            "`-- --tensor-parallel-size 2 --quantization fp8 --dtype bfloat16`.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Build the store of MODEL for this machine, one per worker, without serving."""
    require_vllm("prepare")
    checkpoint_folder(model)
    from ..integration.prepare import prepare_stores

    started = time.perf_counter()
    stores = prepare_stores(model, engine_arguments or [], store)
    seconds = time.perf_counter() - started
    for found in stores:
        verb = "built" if found.built else "found"
        typer.echo(f"{verb} {size_text(found.size)} in {found.path}")
    typer.echo(f"ready after {seconds:.1f} s")
