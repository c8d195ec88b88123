"""Expert and gate networks, chosen by name."""

from fedcoe.models.experts import EXPERTS, Expert, build_expert
from fedcoe.models.gate import GateNetwork

__all__ = ["EXPERTS", "Expert", "GateNetwork", "build_expert"]
