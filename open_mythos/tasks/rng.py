"""Random streams that depend on (seed, step, purpose) and on nothing that happened before.

A run can therefore be cut, resumed or spread over processes without changing what any step sees.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; two purposes never share numbers."""

    DATA = 0
    DEPTH = 1
    VALIDATION = 2
    MODEL = 3


def stream(seed: int, step: int, purpose: Purpose, row: int = 0) -> np.random.Generator:
    """A fresh generator for one purpose at one step of a run, and from one row of its batch on."""
    return np.random.default_rng((seed, step, int(purpose), row))
