"""Options that several commands have, under one name each."""

from pathlib import Path
from typing import Annotated

import typer

from ..store.files import ROOT_SETTING

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of the stores.", envvar=ROOT_SETTING, show_default=False)
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
