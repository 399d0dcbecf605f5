"""Freed memory stays with the process, on Linux with glibc and without a GPU.

By default glibc's malloc returns a large tensor's pages to the kernel when the tensor is freed, and the kernel clears
pages for the next one. A training step frees and takes the same sizes again and again, so most of that work is waste.
"""

import ctypes
import os
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names of mallopt's numbers (glibc's malloc.h)."""
PAD = 500_000_000
"""Bytes that the heap grows by beyond what is asked for; pages that nobody touches take no memory."""


def keep_freed_memory() -> bool:
    """Have malloc keep what this process frees until the process ends; say whether malloc does so now.

    Nothing changes on other platforms, beside a GPU, or where the environment already says how malloc is to behave.
    """
    if sys.platform != "linux" or told_otherwise() or torch.cuda.is_available():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # another C library
        return False
    chosen = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: PAD}  # -1: the heap never shrinks
    taken = [library.mallopt(name, value) for name, value in chosen.items()]
    return all(taken)


def told_otherwise() -> bool:
    """Say whether the environment sets numbers of malloc."""
    named = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    return named or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
