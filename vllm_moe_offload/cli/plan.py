"""`vllm-moe-offload plan MODEL`: what it needs, what fits where, how fast it would be. Must never read weights."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from ..errors import ConfigError
from ..plan.planning import MEASURE, Question, make_plan
from ..replay.hardware import PROFILE_NAMES
from ..sizes import parse_size
from ..store.root import default_root
from .gpu_check import Driver, DriverError
from .options import StoreOption
from .plan_output import print_plan

_FACTORS = {"k": 1 << 10, "m": 1 << 20}


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no memory at all")
    return size


def _tokens(text: str) -> int:
    number, factor = text.strip().lower(), 1
    if number[-1:] in _FACTORS:
        number, factor = number[:-1], _FACTORS[number[-1]]
    if not number.isascii() or not number.isdigit() or not 0 < int(number) * factor < 1 << 40:
        raise typer.BadParameter(f"{text!r} is no number of tokens like 8192, 8k or 1m")
    return int(number) * factor


MemoryOption = Annotated[
    int | None,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        help="Fast memory, like 24GiB: a GPU's, or host memory where there is none (default: what the named GPU has, "
        "or what is free here).",
        show_default=False,
    ),
]
HostMemoryOption = Annotated[
    int | None,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        help="Host memory behind a GPU (default: what is free here).",
        show_default=False,
    ),
]
ContextOption = Annotated[int, typer.Option(parser=_tokens, metavar="TOKENS", help="Longest request, like 8192 or 8k.")]
HardwareOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|measure|FILE",
        help="'measure' this machine's processor, memory and disk, or a machine by name "
        f"({', '.join(PROFILE_NAMES)}) or JSON file. Default: measure, where there is no GPU.",
        show_default=False,
    ),
]
EagerOption = Annotated[
    bool, typer.Option("--enforce-eager", help="Plan for an engine without torch.compile, as this flag of vLLM.")
]


def plan(
    model: Annotated[
        str, typer.Argument(help="Folder of a checkpoint, a config.json, or a name on the Hugging Face hub.")
    ],
    memory: MemoryOption = None,
    host_memory: HostMemoryOption = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1 << 16, help="Requests at a time.")] = 8,
    context: ContextOption = "8k",  # type: ignore[assignment]
    hardware: HardwareOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace of your own requests (.trace, .npz) to replay.", show_default=False)
    ] = None,
    enforce_eager: EagerOption = False,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say before MODEL is downloaded what it needs, what fits where, how fast it would be, and how to serve it."""
    question = Question(
        model,
        memory,
        host_memory,
        concurrency,
        context,
        hardware or _hardware_here(),
        trace,
        store or default_root(),
        enforce_eager=enforce_eager,
    )
    console = Console(stderr=True)
    with console.status("planning") as status:
        made = make_plan(question, lambda what: status.update(what))
    if as_json:
        typer.echo(msgspec.json.encode(made))
    else:
        print_plan(made)


def _hardware_here() -> str:
    """What to plan for where nothing was named.

    Raises:
        ConfigError: there is a GPU, of which only the user knows enough.
    """
    driver = Driver.load()
    if driver is None:
        return MEASURE
    try:
        name = driver.gpu(0).name
    except DriverError:
        name = "a GPU"
    raise ConfigError(
        f"--hardware: this machine has {name}; name the profile nearest to it ({', '.join(PROFILE_NAMES)}), or say "
        "'measure' to plan for its processor"
    )
