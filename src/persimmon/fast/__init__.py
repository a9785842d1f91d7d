"""Faster decoders than the reference, each behind the same interface: `cpu` (C++ kernels that use the MLP's zeros)."""
