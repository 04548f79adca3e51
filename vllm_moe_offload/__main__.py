"""`python -m vllm_moe_offload …` is the command `vllm-moe-offload …`."""

from .cli import app

app(prog_name="vllm-moe-offload")
