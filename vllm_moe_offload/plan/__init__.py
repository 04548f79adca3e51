"""Planning before a model is downloaded or served: what it needs, what fits where, how fast it would decode.

It must never read weights, import vLLM or torch, nor compute times by other arithmetic than ``replay`` does.
"""
