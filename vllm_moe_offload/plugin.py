"""What vLLM calls in every one of its processes, through the entry point group ``vllm.general_plugins``."""


def register() -> None:
    """Put our wrappers around vLLM's seams. They do nothing until offloading is asked for. Idempotent."""
    from .integration.hooks import install

    install()
