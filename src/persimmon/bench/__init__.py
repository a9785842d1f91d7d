"""Benchmarks: the machine's ceiling first, then what was achieved, beside a peer in the same run.

limits.py        what the machine can do: read bandwidth, rate of matrix products
timing.py        summaries and the alternation with a peer
traffic.py       bytes that a decoded token reads, from formats and the engine's counts
row.py           the JSON row that every benchmark ends with
peers.py         peers as processes of their own
filling.py       sequences that already hold tokens
decode.py, prefill.py, kernels.py, train.py, serve.py     the benchmarks
load.py          a load generator for OpenAI-compatible servers
report.py        rows as a table and a figure
"""
