"""Which expert occupies which slot, and which leaves when another must come.

Pure decision code: arrays in, decisions out. It must never do I/O, read a clock, or know what a slot is made of.
"""

from .base import EvictionPolicy
from .cache import Acquisition, ExpertCache
from .policies import POLICY_NAMES, create_policy, policy_class

__all__ = ["POLICY_NAMES", "Acquisition", "EvictionPolicy", "ExpertCache", "create_policy", "policy_class"]
