"""Names of predictors, for whoever must list them without importing them."""

ENGINE_PREDICTORS = ("history", "finemoe", "moe-infinity", "gate", "coactivation", "frequency", "none")
"""Predictors that a running engine can use."""
REPLAY_PREDICTORS = ("history", "neighbours", "finemoe", "moe-infinity", "coactivation", "frequency", "none")
"""Predictors that need nothing but traces. ``gate`` is not among them: it needs an engine's hidden states."""
