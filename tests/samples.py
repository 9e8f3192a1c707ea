"""Sample arrays."""

import numpy as np


def ramp(*shape):
    """Return whole numbers without a pattern that a mistake could hide in."""
    return ((np.arange(int(np.prod(shape))) * 7 + 3) % 11 - 5).reshape(shape).astype(float)


def normal(*shape, seed=0):
    """Return normal numbers, others for each shape and seed."""
    return np.random.default_rng([seed, *shape]).normal(size=shape)
