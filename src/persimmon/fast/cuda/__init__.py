"""The CUDA engine: Triton kernels and whole-step graphs. Nothing outside `kernels/` and what uses it imports triton.

plan.py      which format, cache type and context fit a card, and why; no torch
layouts.py   weights as the kernels read them        weights.py   a model's, from a directory
pool.py      keys and values in blocks               network.py   one pass over the layers
runner.py    pieces of sequences to logits           buffers.py   what a captured step reads and writes
graphs.py    captured steps, replayed                decoder.py   the Decoder; paged.py for continuous batching
"""
