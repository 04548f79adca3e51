"""Serve Mixture-of-Experts models that do not fit in fast memory with stock vLLM.

Importing this package imports neither vLLM nor torch, and changes nothing.
"""

__version__ = "0.1.0"
