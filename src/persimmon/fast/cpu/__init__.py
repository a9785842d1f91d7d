"""The CPU engine: packed weights, C++ kernels, one native call per step.

native/      the C++ sources; start with layout.h, then kernels.h and model.h
formats.py   which tensors a packed model has
quantize.py  hub directory -> packed directory
packed.py    packed directories: opened, checked, memory-mapped
weights.py   the arrays that the native model runs on, from either kind of directory
memory.py    what a model will need, before it is loaded
decoder.py   the Decoder
"""
