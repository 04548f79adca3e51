"""Options that several commands have, under one name each."""

from pathlib import Path
from typing import Annotated

import typer

from ..store.files import ROOT_SETTING

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of the stores.", envvar=ROOT_SETTING, show_default=False)
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        help="Where engines find the daemon (default: $XDG_RUNTIME_DIR/vllm-moe-offload.sock if that folder is this "
        "user's, else /tmp/vllm-moe-offload-UID/daemon.sock).",
        show_default=False,
    ),
]

IntervalOption = Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")]
