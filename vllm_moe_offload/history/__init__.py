"""What earlier requests routed to: traces on disk, and the bounded history that predictors learn from.

Plain arrays in, plain arrays out. Nothing here knows vLLM, torch, or how the maps will be used.
"""
