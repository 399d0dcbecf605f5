"""Random numbers that a model draws itself (dropout): a function of the run's seed, the step and the rank.

So ranks draw unlike numbers, and a run that goes on after a stop draws what it would have drawn. Everything else
that is random has a generator of its own.
"""

import random

import numpy as np
import torch

LARGEST = 2**32
"""Numpy takes seeds below this."""


def seed_build(seed: int) -> None:
    """Seed the global generators of torch (of every device), numpy and python, before a model is built."""
    torch.manual_seed(seed)
    _seed_others(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed them for one step of one rank, in some 10 microseconds."""
    number = mixed(seed, step, rank)
    torch.default_generator.manual_seed(number)  # torch.manual_seed looks for every kind of device: 0.1 ms
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    _seed_others(number)


def _seed_others(seed: int) -> None:
    np.random.seed(seed % LARGEST)  # noqa: NPY002  (what a user's model may draw from)
    random.seed(seed)


def mixed(*numbers: int) -> int:
    """Return a number below 2^63 that says nothing of these; neighbours have unlike ones (splitmix64's rounds)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
