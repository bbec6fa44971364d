"""Random orders that are the same on every machine."""

import random


def permutation(count: int, generator: random.Random) -> list[int]:
    """A random order of `range(count)`.

    Sorts `count` draws of `generator.random()`, the only method for which Python promises the same
    results for a seed on every machine and in every version. `shuffle`, NumPy and torch promise
    less.
    """
    draws = [generator.random() for _ in range(count)]
    return sorted(range(count), key=draws.__getitem__)
