"""Networks, and the cut between client and server."""

from cem.models.adapter import build_adapter
from cem.models.bottleneck import Bottleneck, parse_bottleneck
from cem.models.budget import CLIENT_COSTS, client_budget
from cem.models.split import ARCHITECTURES, Normalize, SplitModel, build_split_model, split_sequential

__all__ = [
    "ARCHITECTURES",
    "CLIENT_COSTS",
    "Bottleneck",
    "Normalize",
    "SplitModel",
    "build_adapter",
    "build_split_model",
    "client_budget",
    "parse_bottleneck",
    "split_sequential",
]
