"""Silences warnings that libraries print when they are imported and that do not matter here."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def silence_torchao() -> None:
    """transformers imports torchao, which warns about GPU extensions that it cannot load here."""
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextmanager
def silent_bitsandbytes() -> Iterator[None]:
    """For the import, which warns that an optional package with more kernels is missing."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
