"""Random orders that are the same on every machine."""

import random


def permutation(count: int, generator: random.Random) -> list[int]:
    """A random order of `range(count)`.

    Sorts `count` draws of `generator.random()`: the one method whose results Python promises to
    keep for a seed, on every machine and in every version. `shuffle`, NumPy and torch promise less.
    """
    draws = [generator.random() for _ in range(count)]
    return sorted(range(count), key=draws.__getitem__)
