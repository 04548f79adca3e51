"""How an engine's process is talked to: commands as JSON lines on stdin, answers on a descriptor of their own.

Only what every interpreter has: what is compared with vLLM runs in environments of its own.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

ANSWERS_VARIABLE = "VLLM_MOE_OFFLOAD_BENCH_ANSWERS"
"""Environment variable with the number of the descriptor."""


class Runner(Protocol):
    """What an engine's process serves: its methods are the commands."""

    def loaded(self) -> dict[str, Any]:
        """The first answer: `load_seconds`, and what else is known after loading."""
        ...

    def close(self) -> None:
        """Called when there are no more commands."""
        ...


def serve(create: Callable[[dict[str, Any]], Runner]) -> None:
    """`PROGRAM ARGUMENTS_JSON [CGROUP_PROCS]`; every line of stdin is `{"do": method of the runner, ...}`."""
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(str(os.getpid()))
    with os.fdopen(int(os.environ.pop(ANSWERS_VARIABLE)), "w") as answers:

        def answer(value: Any) -> None:
            print(json.dumps(value), file=answers, flush=True)

        runner = create(json.loads(sys.argv[1]))
        answer(runner.loaded())
        for line in sys.stdin:
            command = json.loads(line)
            answer(getattr(runner, command.pop("do"))(**command))
        runner.close()
