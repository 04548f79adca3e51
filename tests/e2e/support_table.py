"""Writes docs/support.md from the outcome of the identity tests.

python -m pytest tests/e2e/test_identity.py tests/e2e/test_identity_compiled.py --exhaustive --junitxml=identity.xml
python -m tests.e2e.support_table identity.xml > docs/support.md
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
import vllm

from tests.models import NAMES, RECIPES

MODES = ("test_eager", "test_compiled")
HEADER = """# What has been shown to work

Written by `tests/e2e/support_table.py` from a run of `tests/e2e/test_identity*.py`: greedy tokens and their logprobs
equal those of unmodified vLLM, at batch 1 and 16, with chunked prefill and prefix caching; eager with room for one
token's experts, 25 %, 50 % and all of them; compiled with the smallest room and with all. Anything not listed is
untried; what is known not to work is refused at start-up by name.

On x86, vLLM has kernels for quantized experts only with AMX. Tried there, eager: int8-w8a8 and gpt-oss-mxfp4 are
identical; fp8-block is identical as long as no step is cut into waves (its kernel, CPUExpertsFp8, gives a token
other last bits when an expert gets few tokens at once, in plain vLLM too, and the log warns of it); int4-w4a16,
awq-int4 and gptq-int4 (CPUExpertsInt4) and quantization while loading are refused.

This run: vLLM {vllm}, torch {torch}, CPU instructions {cpu}{amx}.

| model | experts' class and format | eager | compiled |
| --- | --- | --- | --- |"""


def outcomes(report: Path) -> dict[tuple[str, str], str]:
    """(test, checkpoint) -> what happened, from a JUnit report."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameter = case.attrib["name"].partition("[")
        skipped = case.find("skipped")
        if skipped is not None:
            outcome = skipped.attrib["message"].partition(": ")[2]
        else:
            outcome = "identical" if case.find("failure") is None and case.find("error") is None else "**differs**"
        found[test, parameter.rstrip("]")] = outcome
    return found


def table(report: Path) -> str:
    """The whole page."""
    results = outcomes(report)
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ", no AMX"
    cpu = torch.backends.cpu.get_cpu_capability()
    lines = [HEADER.format(vllm=vllm.__version__, torch=torch.__version__, cpu=cpu, amx=amx)]
    for name in NAMES:
        cells = [results.get((mode, name), "not run") for mode in MODES]
        lines.append(f"| {name} | {RECIPES[name]().notes} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
