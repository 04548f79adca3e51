"""Writes docs/metrics.md from the tables that metrics are exported from.

python docs/tools/metrics.py
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from vllm_moe_offload.daemon.metrics import described_daemon_metrics
from vllm_moe_offload.report.metrics import Described, described_worker_metrics

PAGE = Path(__file__).parents[1] / "metrics.md"
HEADER = """# Metrics

Written by `docs/tools/metrics.py` from the tables that metrics are exported from.

| where | what |
| --- | --- |
| `/metrics` of vLLM's server | [what workers count](#engines), beside vLLM's own metrics |
| `/metrics` of the daemon, at 127.0.0.1 and the port of `--metrics-port` | [what the daemon counts](#daemon) |
| `llm.get_metrics()`, with `LLM(disable_log_stats=False)` | what workers count |
| `llm.collective_rpc("moe_offload_stats")` | the same numbers by name, of this moment |

Nothing has to be switched on. An engine that does not offload has none of these metrics, nor, as of vLLM's own, has one
with `--disable-log-stats`. Workers report once a second, so a number may be a second old; a counter never goes back
while its worker lives.

Each rank has series of its own. Where ranks split every expert, all of them count the same hits: look at one of them.
Where they share out the experts, add them up. With `--api-server-count` above 1 every server shows all workers. Workers
on another host are not seen: scrape a server there.

Workers report in files in memory, in a folder of their user: `/dev/shm/vllm-moe-offload-reports-UID`, or the one that
`VLLM_MOE_OFFLOAD_REPORTS` names. They hold how often experts are used and how long requests have waited, and neither
text nor tokens. Reporting takes 11 µs of a step of 48 layers, and once a second about a millisecond of the interpreter
(`python benchmarks/report_cost.py`, on one core of the 2-core virtual machine that the tests run on).

[`examples/grafana`](../examples/grafana) has a dashboard and alert rules over these metrics. What to look at first:

- The share of time spent waiting for experts: `rate(vllm:moe_offload_stall_seconds_total[5m])`.
- The share of experts that were not in fast memory: `rate(vllm:moe_offload_misses_total[5m])` over that and
  `rate(vllm:moe_offload_hits_total[5m])` together.
- Whether speculative loads pay: `rate(vllm:moe_offload_prefetch_useful_total[5m])` against
  `rate(vllm:moe_offload_prefetch_wasted_total[5m])`.
- Whether probabilities are right: the useful and late ones together against
  `rate(vllm:moe_offload_prefetch_expected_total[5m])`.

With `--otlp-traces-endpoint`, vLLM's span `llm_request` has an attribute `moe_offload.stall_seconds`: how long the
forward passes of that request waited for experts. vLLM's own metrics of a request (`RequestOutput.metrics`) have no
place for it; over all requests it is the histogram `vllm:moe_offload_request_stall_seconds`.

vLLM's log has one line a minute while experts are used, and none from an idle engine.

In the tables, labels that only one metric has stand behind its name.
"""


def page() -> str:
    """The whole of docs/metrics.md."""
    return "\n".join(
        [
            HEADER,
            "## Engines\n",
            "Names begin with `vllm:`, as vLLM's own on the same page; `LLM.get_metrics` shows no others.\n",
            *tables(described_worker_metrics()),
            "## Daemon\n",
            *tables(described_daemon_metrics()),
        ]
    )


def tables(metrics: list[Described]) -> Iterator[str]:
    """One for all metrics with the same first labels."""
    for labels, together in groupby(metrics, key=lambda metric: metric.labels):
        yield f"Labels: {', '.join(f'`{label}`' for label in labels)}.\n" if labels else "Without labels:\n"
        yield "| metric | kind | meaning |\n| --- | --- | --- |"
        for metric in together:
            own = "".join(f", `{label}`" for label in metric.own_labels)
            yield f"| `{metric.name}`{own} | {metric.kind} | {metric.help} |"
        yield ""


if __name__ == "__main__":
    PAGE.write_text(page())
