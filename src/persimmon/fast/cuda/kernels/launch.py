"""What every kernel launch asks: does the interpreter run it, and how large are the tiles then."""

from __future__ import annotations

from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run on the CPU, one program after the other, for tests."""


def tile(on_gpu: int, interpreted: int) -> int:
    """A tile size: programs cost milliseconds each in the interpreter, so it gets few and large ones."""
    return interpreted if INTERPRETED else on_gpu


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number: lengths of ranges in a kernel are such."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """Rounded up."""
    return -(-number // divisor)
