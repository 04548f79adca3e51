"""The errors users see. Each message names the setting or file, its value, and what would work."""


class OffloadError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(OffloadError):
    """A setting is unknown, malformed, contradictory, or impossible on this machine."""


class UnsupportedError(OffloadError):
    """The model, quantization or vLLM feature cannot be offloaded correctly."""


class StoreError(OffloadError):
    """A record store is missing, damaged, foreign, or cannot be written."""


class LoadError(OffloadError):
    """A record could not be brought into a slot."""


class TraceError(OffloadError):
    """A trace or history file is malformed, of another version, or of another model."""


class TraceReadError(TraceError):
    """A trace or history file cannot be read at present, which says nothing about what is in it."""
