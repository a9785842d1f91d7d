"""Triton kernels and what launches them; one file per step of a decoder layer. Importing any of them imports triton."""
