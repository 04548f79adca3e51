"""The runtime behind a socket and shared memory: one expert cache and one history for all engines of a host."""
