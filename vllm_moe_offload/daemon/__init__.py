"""The runtime behind a socket and shared memory: one expert cache and one history for all engines of a host.

It must never believe what an engine has sent or written without checking it, nor let one engine's fault reach another.
"""
