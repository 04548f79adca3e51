"""The process that keeps experts and histories for all engines of a host.

It must never import the engine's side, trust what a peer sends or writes, or let one peer hold up another.
"""
