"""How much memory is enough? Replays a recorded trace with several budgets.

vllm serve MODEL --plugin moe-offload --moe-offload-trace /tmp/mine.trace    # serve what you usually serve
python examples/choose_a_budget.py /tmp/mine.trace [--budgets 10%,25%,50%] [--predictor history]
"""

import argparse
import json
import subprocess
from typing import Any

BUDGETS = "10%,25%,50%,75%"


def replay(trace: str, slots: str, predictor: str) -> dict[str, Any]:
    command = ["vllm-moe-offload", "replay", trace, "--slots", slots, "--predictor", predictor, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main(trace: str, budgets: str, predictor: str) -> None:
    print("cache  uses that wait  with perfect eviction")
    for budget in budgets.split(","):
        report = replay(trace, budget, predictor)
        print(f"{budget:>5}  {report['demand_miss_rate']:14.1%}  {report['belady_miss_rate']:21.1%}")
    print("Each of these is a read that a token waits for. Take the budget behind which a larger one brings little.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--predictor", default="none", help="as the engine's --moe-offload-predictor")
    main(**vars(parser.parse_args()))
