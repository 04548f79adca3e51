"""Replay: the engine's policies over a recorded trace, bounds beside them, and a timeline of what it would have cost.

Deterministic. It must never read a clock or decide anything by other code than the engine does.
"""
