"""What every kernel launch asks: does the interpreter run it, how large are the tiles then, may it begin early."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run on the CPU, one program after the other, for tests."""

_EARLY_CAPABILITY = (9, 0)
"""Programmatic dependent launch (CUDA C++ Programming Guide): Hopper and later."""


def tile(on_gpu: int, interpreted: int) -> int:
    """A tile size: programs cost milliseconds each in the interpreter, so it gets few and large ones."""
    return interpreted if INTERPRETED else on_gpu


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number: lengths of ranges in a kernel are such."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Rounded up."""
    return -(-number // divisor)


@triton.jit
def begin(EARLY: tl.constexpr):
    """Opens every kernel of the layers in a decoding step. EARLY: waits for the last one, lets the next one be set up.

    A kernel of a step takes some microseconds, of which one or two are its start: with this they pass while the kernel
    before it runs. Whoever waits here waits for all that came before, as each of them did.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def is_last(arrivals, programs):
    """Whether this program is the last of `programs` that come here, so that it sees what all of them wrote.

    The counter [1] begins at 0 and is left at 0. Loads of what others wrote go past the first cache (".cg").
    """
    tl.debug_barrier()  # all threads of the program have written
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


def early(device: torch.device) -> dict[str, Any]:
    """Launch arguments of a kernel that opens with `begin`."""
    possible = device.type == "cuda" and _begins_early(device.index or 0)
    return {"EARLY": True, "launch_pdl": True} if possible else {"EARLY": False}


@cache
def _begins_early(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= _EARLY_CAPABILITY
