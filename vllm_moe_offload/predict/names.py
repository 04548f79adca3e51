"""Names of predictors, for whoever must list them without importing them."""

ENGINE_PREDICTORS = ("history", "finemoe", "moe-infinity", "gate", "coactivation", "frequency", "none")
"""Predictors that a running engine can use."""
