"""The only room that imports vLLM: puts the runtime into its engine. It must never change vLLM when switched off."""

from .install import install

__all__ = ["install"]
