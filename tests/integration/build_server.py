"""A process that builds the stores of one model after another: one JSON job per line in, one JSON answer per line out.

A job is {"model": path, "arguments": [engine arguments], "store": path, "environment": {name: value}}; the answer
names the store, or the error as a user sees it.
"""

import json
import os
import sys
from pathlib import Path


def run(job: dict) -> dict:
    from vllm_moe_offload.integration.prepare import prepare_stores

    os.environ.update(job["environment"])
    try:
        (found,) = prepare_stores(job["model"], job["arguments"], Path(job["store"]))
    finally:
        for name in job["environment"]:
            del os.environ[name]
    return {"path": found.path, "built": found.built}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints must not get between the answers
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
