"""What engines and the daemon share: memory that both map, messages, how they travel, and where a daemon is found.

It must never trust what another process sent or may still write: sizes, seals and contents are checked first.
"""
