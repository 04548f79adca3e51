"""How an engine's process talks to engines.py: commands as JSON lines on stdin, answers on the descriptor it is given.

Only what every interpreter has: peers run it in environments of their own.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Runner(Protocol):
    """What a worker serves: its methods are the commands."""

    def loaded(self) -> dict[str, Any]:
        """The first answer: `load_seconds`, `model_seconds` and `totals`."""
        ...

    def close(self) -> None:
        """Called when there are no more commands."""
        ...


def serve(create: Callable[[dict[str, Any]], Runner]) -> None:
    """`WORKER ANSWER_FD ARGUMENTS_JSON [CGROUP_PROCS]`; every line of stdin is `{"do": method of the runner, ...}`."""
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(str(os.getpid()))
    with os.fdopen(int(sys.argv[1]), "w") as answers:

        def answer(value: Any) -> None:
            print(json.dumps(value), file=answers, flush=True)

        runner = create(json.loads(sys.argv[2]))
        answer(runner.loaded())
        for line in sys.stdin:
            command = json.loads(line)
            answer(getattr(runner, command.pop("do"))(**command))
        runner.close()
