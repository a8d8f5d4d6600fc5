"""Random numbers that are a function of (seed, epoch, index), or of (seed, step, process)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restores the random states of Python, numpy and torch when the block ends."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002 - timm's
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seeds Python's, numpy's and torch's random numbers for one sample, alike in any process."""
    _seed(b"%d %d %d" % (seed, epoch, index))


def seed_step(seed: int, step: int, process: int, device: torch.device) -> None:
    """Seeds them, and the device's, for what one process draws in one training step: dropout, Mixup, erasing."""
    entropy = _seed(b"step %d %d %d" % (seed, step, process))
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(entropy)


def _seed(key: bytes) -> int:
    entropy = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
    random.seed(entropy)
    np.random.seed(entropy % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(entropy)  # torch.manual_seed would also look for GPUs, 100 times slower
    return entropy


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Random numbers drawn inside depend on (seed, epoch, index) alone; outside, nothing changes.

    Example:
        >>> with seeded(0, 0, 1):
        ...     first = random.random()
        >>> with seeded(0, 0, 1):
        ...     random.random() == first
        True
    """
    with preserve_rng():
        seed_sample(seed, epoch, index)
        yield
