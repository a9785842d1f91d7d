"""Compile every kernel in the shapes of the 8B, for GPUs that are not here: `python compile_kernels.py ARCH [NAME...]`.

Run in a process without TRITON_INTERPRET. Prints one JSON object: {case: {"ptx": bytes, "cubin": bytes, "mma": whether
matrix instructions are used, "wide_loads": whether several words are loaded at once, "shared": bytes of shared memory,
"registers": per thread, "stack" and "local": bytes per thread that did not fit into registers}}. A case that does not
compile ends the program with its error. NAME chooses cases that begin with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from persimmon.fast.cuda.kernels import attention, cache_write, matmul, norm, sampling, sparse_mlp
from persimmon.fast.cuda.layouts import FP8, INT4, INT8, PLAIN, PLANES

HIDDEN, NEURONS, HEADS, DIM = 4096, 16_384, 64, 64
CODES = {PLAIN: "*bf16", INT8: "*i8", INT4: "*i32", FP8: "*fp8e4nv", PLANES: "*i32"}
NAMES = {PLAIN: "bfloat16", INT8: "int8", INT4: "int4", FP8: "fp8", PLANES: "planes"}
CACHES = {"bfloat16": ("*bf16", 0), "float32": ("*fp32", 0), "int8": ("*i8", 1), "fp8": ("*fp8e4nv", 2)}

WIDE_LOADS = re.compile(r"ld\.global[\w.:]*\.v[24]\.b32|cp\.async\.c[ag]\.shared\.global[^;]*, 0x(?:8|10)\b")
"""Of several words, into registers or past them."""

LAUNCH_OPTIONS = ("num_warps", "num_stages")
"""Among a kernel's tile sizes: how it is compiled, no arguments of its own."""


class Case(NamedTuple):
    name: str
    kernel: Any
    types: dict[str, str]
    """Of the arguments that are no constants; pointers default to float32, names that say so are integers."""
    constants: dict[str, Any]
    num_warps: int = 4


def cases() -> Iterator[Case]:
    yield from norm_cases()
    yield from attention_cases()
    yield from matmul_cases()
    yield from sparse_cases()
    yield from sampling_cases()


def norm_cases() -> Iterator[Case]:
    for partials in (0, 1, 8):
        types = {"num_rows": "i32", "hidden": "i32", "eps": "fp32", "out": "*bf16"}
        constants = {"PARTIALS": partials, **norm.norm_tiles(HIDDEN)}
        yield Case(f"residual_layer_norm-{partials}", norm.residual_layer_norm_kernel, types, constants, 8)
        one = constants | {"num_rows": 1}  # a launch turns an integer that is 1 into a constant
        yield Case(f"residual_layer_norm-{partials}-one", norm.residual_layer_norm_kernel, types, one, 8)
    for x in ("*bf16", "*fp32"):
        types = {"x": x, "out": "*bf16", "count": "i32", "width": "i32"}
        yield Case(f"bias_squared_relu-{x[1:]}", norm.bias_squared_relu_kernel, types, norm.activation_tiles())


def attention_cases() -> Iterator[Case]:
    ints = {name: "*i32" for name in ("positions", "rows", "tables", "table", "arrivals")} | {"table_stride": "i32"}
    for name, (stored, number) in CACHES.items():
        plain = "*fp32" if name == "float32" else "*bf16"
        cache = {"k_cache": stored, "v_cache": stored, "cache": stored}
        for paged in (True, False):
            shape = {"HEADS": HEADS, "DIM": DIM, "BLOCK_SIZE": 16, "PAGED": paged, "FORMAT": number}
            types = ints | cache | {"fused": plain, "q_out": plain, "num_pairs": "i32", "eps": "fp32"}
            constants = {**shape, "ROTARY": 32, "NORM": True, **cache_write.cache_write_tiles(DIM)}
            yield Case(f"cache_write-{name}-{paged}", cache_write.cache_write_kernel, types, constants)
            for splits in (1, 8):
                types = ints | cache | {"q": plain, "out": plain, "scale": "fp32"}
                constants = {**shape, "SPLITS": splits, **attention.attention_tiles(DIM)}
                label = f"decode_attention-{name}-{paged}-{splits}"
                yield Case(label, attention.decode_attention_kernel, types, constants)
        types = ints | cache | {"out": plain, "length": "i32", "first_head": "i32", "num_heads": "i32"}
        shape = {"HEADS": HEADS, "DIM": DIM, "BLOCK_SIZE": 16, "FORMAT": number}
        yield Case(f"gather-{name}", attention.gather_kernel, types, shape | attention.gather_tiles(DIM))


def matrix_types(number: int) -> dict[str, str]:
    scales = "*fp32" if number == FP8 else "*fp16"
    sizes = dict.fromkeys(("outputs", "inputs", "columns", "tokens", "rows", "width", "neurons", "share"), "i32")
    codes = {"codes": CODES[number], "low": "*i32", "high": "*i32", "scales": scales, "outlier_weights": "*fp16"}
    lists = {"outlier_columns": "*i32", "ids": "*i32", "read": "*i32", "arrivals": "*i32"}
    return codes | lists | sizes | {"x": "*bf16", "out": "*bf16", "hidden": "*bf16"}


def matmul_cases() -> Iterator[Case]:
    for number, name in NAMES.items():
        types = matrix_types(number)
        for epilogue in (matmul.BIAS, matmul.SQUARED_RELU):
            constants = {"FORMAT": number, "EPILOGUE": epilogue}
            yield Case(
                f"gemv-{name}-{epilogue}", matmul.gemv_kernel, types, constants | matmul.gemv_tiles(number, HIDDEN)
            )
        for tokens, even in ((8, True), (8, False), (32, True), (64, True)) if number != PLAIN else ():
            constants = {"FORMAT": number, "EPILOGUE": matmul.BIAS, "UPCAST": False, "EVEN": even}
            constants |= matmul.gemm_tiles(number, tokens, HIDDEN)
            yield Case(f"gemm-{name}-{tokens}{'' if even else '-odd'}", matmul.gemm_kernel, types, constants)
        constants = {"FORMAT": number, **matmul.dequantize_tiles(number)}
        yield Case(f"dequantize-{name}", matmul.dequantize_kernel, types, constants)
    types = matrix_types(PLAIN) | {"codes": "*fp32", "x": "*fp32", "out": "*fp32"}
    constants = {"FORMAT": PLAIN, "EPILOGUE": matmul.BIAS, **matmul.gemv_tiles(PLAIN, HIDDEN)}
    yield Case("gemv-float32", matmul.gemv_kernel, types, constants)


def sparse_cases() -> Iterator[Case]:
    for number in (PLAIN, INT8, FP8):
        types = matrix_types(number) | {"hidden": "*bf16", "out": "*fp32"}
        for width, skip in ((1, True), (16, True), (1, False), (64, False)):
            constants = {"FORMAT": number, "SKIP": skip, "ROOM": 512, "WIDTH": width, "SPLITS": 8, "UPCAST": False}
            constants |= sparse_mlp.down_tiles(width, HIDDEN) | ({"tokens": 1} if width == 1 else {})
            label = f"down-{NAMES[number]}-{width}-{'active' if skip else 'all'}"
            yield Case(label, sparse_mlp.down_kernel, types, constants)
    types = matrix_types(PLANES) | {"is_outlier": "*u8", "margin": "fp32"}
    yield Case("progressive_up", sparse_mlp.progressive_up_kernel, types, matmul.gemv_tiles(PLANES, HIDDEN))


def sampling_cases() -> Iterator[Case]:
    names = ("top_k", "truncated", "count", "best_id", "ids", "positions", "outputs")
    ints = {name: "*i32" for name in names} | {"seed": "*i64"}
    sizes = dict.fromkeys(("num_candidates", "vocabulary", "num_blocks", "output_stride"), "i32")
    yield Case("advance-one", sampling.advance_kernel, ints | sizes, {"BLOCK": 1, "num_blocks": 1, "output_stride": 1})
    yield Case("threshold", sampling.threshold_kernel, ints | sizes, {"BLOCK": sampling.CANDIDATES})
    yield Case("pick", sampling.pick_kernel, ints | sizes, sampling.pick_tiles())
    yield Case("advance", sampling.advance_kernel, ints | sizes, {"BLOCK": 64})


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    names = case.kernel.arg_names
    early = {"EARLY": arch >= 90} if "EARLY" in names else {}
    options = {"num_warps": case.num_warps} | {n: v for n, v in case.constants.items() if n in LAUNCH_OPTIONS}
    constants = {n: v for n, v in case.constants.items() if n not in LAUNCH_OPTIONS} | early
    assert set(constants) <= set(names), f"{case.name}: unknown constants {set(constants) - set(names)}"
    signature = {n: "constexpr" if n in constants else case.types.get(n, "*fp32") for n in names}
    # Pointers are 16-byte aligned and the sizes of the 8B are multiples of 16, as they are at launch.
    sizes = ("hidden", "inputs", "outputs", "columns", "width", "vocabulary", "neurons", "share")
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in sizes]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(case.kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    cubin = compiled.asm["cubin"]
    return {
        "ptx": len(ptx), "cubin": len(cubin), "mma": bool(re.search(r"\bw?g?mma\.", ptx)),
        "wide_loads": bool(WIDE_LOADS.search(ptx)), "shared": compiled.metadata.shared,
        **resources(cubin),
    }  # fmt: skip


def resources(cubin: bytes) -> dict[str, int]:
    """What the machine code takes per thread, by the tool that triton brings: PTX does not show what was spilled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        program = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def main(arch: int, wanted: list[str]) -> None:
    chosen = [case for case in cases() if not wanted or any(case.name.startswith(name) for name in wanted)]
    results = {}
    for case in chosen:
        if arch < 89 and "fp8" in case.name:
            continue  # no such conversions before compute capability 8.9
        try:
            results[case.name] = compile_case(case, arch)
            print(case.name, file=sys.stderr, flush=True)
        except Exception as error:
            raise SystemExit(f"{case.name}: {error}") from error
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
