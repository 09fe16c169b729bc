"""Options that belong together, under a name: what ``--preset`` sets."""

from __future__ import annotations

from typing import Any

from cem.surrogates.build import ORIGINAL

PRESETS: dict[str, dict[str, Any]] = {
    # What is recommended, and the default of every option: the nats that variances around running centroids of the
    # classes let through the noise, at a weight in proportion to classification.
    "attention": {
        "surrogate": "attention",
        "measure": "slots",
        "num_slots": 1,
        "penalty": "entropy",
        "hinge": "relu",
        "threshold": "coupled",
        "var_threshold": 0.1,
        "eps_var": 1e-8,
        "gamma": 0.01,
        "anchor": 0.99,
        "memory_bank": 0,
        "surrogate_policy": "frozen",
        "surrogate_objective": "penalty",
        "tokens": "flat",
        "reduce": "linear",
        "reduce_dim": None,
        "lambd": 0.5,
        "lambd_schedule": "constant",
    },
    # The original surrogate: flat features, nothing reduced, random weights, coupled threshold, full weight.
    "seed": {
        "surrogate": "attention",
        **ORIGINAL,
        "hinge": "relu",
        "threshold": "coupled",
        "var_threshold": 0.1,
        "surrogate_policy": "frozen",
        "surrogate_objective": "penalty",
        "tokens": "flat",
        "reduce": "linear",
        "reduce_dim": 0,
        "memory_bank": 0,
        "lambd": 16.0,
        "lambd_schedule": "rising",
    },
    # The mixture of the CEM paper, at its weight and threshold.
    "gmm": {
        "surrogate": "gmm",
        "gmm_fit": "kmeans",
        "var_threshold": 0.125,
        "lambd": 16.0,
        "lambd_schedule": "rising",
    },
}
"""Option names to values, by the preset's name. Whatever one does not name keeps its default, or what a file says."""
