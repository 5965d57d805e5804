"""Exhausted memory: telling it from other errors, and giving back what a failed pass has left."""

from __future__ import annotations

import gc

import torch

from medfl_ray.training.gradients.malloc_trim import release_freed_memory

# What PyTorch says of the CPU's memory in an error that has no type of its own.
CPU_WORDS = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether a pass failed for want of GPU or CPU memory, so that a smaller one may fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_WORDS)


def give_back_memory() -> None:
    """Free what a failed pass has left behind; to be called when its error is no longer held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_freed_memory()
