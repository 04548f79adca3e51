"""The engine's side of the daemon: connecting to it, attaching, pools in its memory, its history; starting one.

It must never import the daemon, wait for it without a limit, or trust memory that the daemon may still write.
"""
