"""Replay: the engine's policies over a recorded trace, bounds beside them, and a timeline of what it would have cost.

Deterministic; knows neither vLLM nor torch nor real time.
"""
