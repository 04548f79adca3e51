"""`vllm-moe-offload top`: what the engines of this user and the daemon are doing, as the live page has it."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live

from ..client.connection import Connection
from ..errors import OffloadError
from ..ipc.address import default_socket_path
from ..ipc.protocol import GetStatus, StatusReport
from ..page.model import models_of_reports
from ..page.series import Series
from ..page.view import ModelView, Query, view
from ..report import read_reports
from .daemon_view import status_view
from .options import IntervalOption, JsonOption, SocketOption
from .top_view import model_view

ANSWER_SECONDS = 10.0
_SECOND_SAMPLE_SECONDS = 2.5
"""In which every running worker has reported again."""


class Seen(msgspec.Struct):
    """What `top` shows at a time."""

    time: float
    """Seconds since 1970."""
    models: list[ModelView]
    """Of the engines of this user, as the live page has them."""
    daemon: StatusReport | None
    """None where none can be reached."""


class Watch:
    """Looks at reports and daemon, and remembers samples of the last minutes."""

    def __init__(self, socket: Path | None) -> None:
        self._socket, self._series = socket, Series()

    def look(self) -> Seen:
        """What is to be seen now."""
        self._series.observe(models_of_reports(read_reports()))
        models, now = self._series.models(), time.time()
        views = (view(models, Query(model=model.name, requests=True), now).model for model, _ in models)
        return Seen(now, [each for each in views if each is not None], self._daemon())

    def look_twice(self) -> Seen:
        """The same once every worker has reported for a second time, so that there are rates."""
        deadline = time.monotonic() + _SECOND_SAMPLE_SECONDS
        seen = self.look()
        while time.monotonic() < deadline and any(model.recent is None for model in seen.models):
            time.sleep(0.1)
            seen = self.look()
        return seen

    def _daemon(self) -> StatusReport | None:
        try:
            with contextlib.closing(connect(self._socket)) as connection:
                return connection.request(GetStatus())
        except OffloadError:
            if self._socket is not None:
                raise
            return None


def top(
    socket: SocketOption = None,
    interval: IntervalOption = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what is to be seen now, and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what engines and daemon do: hits, stalls, loads, prediction, requests, and what would help.

    It goes on until Ctrl-C. Engines are those of the user who asks; they need no daemon.
    """
    watch = Watch(socket)
    if as_json:
        typer.echo(msgspec.json.encode(watch.look_twice()).decode())
    elif once:
        Console().print(_shown(watch.look_twice()))
    else:
        follow(lambda: _shown(watch.look()), interval)


def follow(show: Callable[[], RenderableType], interval: float) -> None:
    """Show what ``show`` gives, every ``interval`` seconds until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
        while True:
            live.update(show(), refresh=True)
            time.sleep(interval)


def connect(path: Path | None) -> Connection:
    """To the daemon at ``path``, or at the usual place."""
    return Connection.connect(path or default_socket_path(), "control", ANSWER_SECONDS)


def _shown(seen: Seen) -> RenderableType:
    parts: list[RenderableType] = [model_view(model) for model in seen.models]
    if not parts:
        parts.append("no engine that offloads runs for this user")
    if seen.daemon is not None:
        parts += ["", "daemon: ", status_view(seen.daemon)]
    return Group(*parts)
