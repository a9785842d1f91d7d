"""Which engine, device and precision a model runs with, and why.

The one place that knows the engines: `ENGINES` lists them, best first, and a faster one joins by adding its row (see
docs/architecture.md for what admits it). Nothing here imports torch before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from persimmon.errors import InputError, UnavailableError
from persimmon.machine import memory_available, size_text

if TYPE_CHECKING:
    from persimmon.config import ModelConfig
    from persimmon.infer.decoder import Decoder

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")
QUANTIZED_FORMATS = ("q8", "q4", "p44")

# Share of the free memory that float32 weights may take before bfloat16 is chosen: the rest is for keys and
# values, activations and everything else on the machine.
_WEIGHTS_SHARE = 0.6

FLOAT16_REASON = (
    "float16 is not offered: relu(x)^2 leaves its range of 65504 once x passes 255.9; use bfloat16 or float32"
)


class Choice(NamedTuple):
    """What was chosen, and the reason in words."""

    value: str
    reason: str


@dataclass(frozen=True)
class Engine:
    """One way to run a model."""

    name: str
    summary: str
    devices: tuple[str, ...]
    """Device types it runs on."""
    load: Callable[..., Decoder]
    """(model directory: Path, ModelConfig, device, dtype, **options) -> decoder."""
    options: frozenset[str] = frozenset()
    """Names of the options of `load` that it understands."""
    packed: bool = False
    """Whether it runs quantized directories."""
    why_unavailable: Callable[[], str | None] = lambda: None
    """None when it can run here, else one line that says what is missing."""
    why_unfit: Callable[[ModelConfig], str | None] = lambda config: None
    """None when it can run models of that shape, else one line that says why not."""

    def why_not(self, config: ModelConfig | None = None) -> str | None:
        """The first reason against it, here and for a model of that shape, or None."""
        return self.why_unavailable() or (self.why_unfit(config) if config is not None else None)


def _load_reference(
    directory: Path, config: ModelConfig, device: str, dtype: str, adapter: Path | None = None
) -> Decoder:
    import torch

    from persimmon.checkpoints import hub
    from persimmon.infer.reference import ReferenceDecoder

    model = hub.load_model(directory, dtype=getattr(torch, dtype), device=device)
    model.config = config
    if adapter is not None:
        from persimmon.lora import load_adapter

        load_adapter(model, adapter)
    return ReferenceDecoder(model)


def _load_cpu(directory: Path, config: ModelConfig, device: str, dtype: str, **options: Any) -> Decoder:
    from persimmon.fast.cpu.load import load_decoder

    return load_decoder(directory, config, dtype=dtype, **options)


def _load_cuda(directory: Path, config: ModelConfig, device: str, dtype: str, **options: Any) -> Decoder:
    from persimmon.fast.cuda.load import load_decoder

    return load_decoder(directory, config, device=device, dtype=dtype, **options)


def _why_no_cuda() -> str | None:
    from persimmon.fast.cuda.available import why_unavailable

    return why_unavailable()


def _why_not_on_cuda(config: ModelConfig) -> str | None:
    from persimmon.fast.cuda.available import why_unfit

    return why_unfit(config)


def _why_no_cpu() -> str | None:
    from persimmon.fast.cpu.native_module import why_unavailable

    return why_unavailable()


def _why_not_on_cpu(config: ModelConfig) -> str | None:
    from persimmon.fast.cpu.formats import why_unfit

    return why_unfit(config)


ENGINES: dict[str, Engine] = {
    "cpu": Engine(
        "cpu",
        "C++ kernels that skip the MLP's zeros, plain or quantized weights",
        ("cpu",),
        _load_cpu,
        frozenset(
            {"threads", "kv_dtype", "sparsity_margin", "audit_every", "isa", "verify", "weights", "progress", "adapter"}
        ),
        packed=True,
        why_unavailable=_why_no_cpu,
        why_unfit=_why_not_on_cpu,
    ),
    "cuda": Engine(
        "cuda",
        "Triton kernels and CUDA graphs, plain or quantized weights",
        ("cuda",),
        _load_cuda,
        frozenset({"context", "kv_dtype", "sparsity_margin", "fp8", "kernel_table", "verify", "progress", "adapter"}),
        packed=True,
        why_unavailable=_why_no_cuda,
        why_unfit=_why_not_on_cuda,
    ),
    "reference": Engine(
        "reference", "plain PyTorch, dense, exact", ("cpu", "cuda", "mps"), _load_reference, frozenset({"adapter"})
    ),
}


def installed_engines() -> dict[str, str]:
    """The engines that can run here, best first: {name: what it is}."""
    return {name: engine.summary for name, engine in ENGINES.items() if engine.why_unavailable() is None}


def missing_engines() -> dict[str, str]:
    """The engines that cannot: {name: what is missing, in one line}."""
    reasons = {name: engine.why_unavailable() for name, engine in ENGINES.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def choose_device(requested: str) -> Choice:
    """`auto` takes cuda, then mps, then cpu; a device that is not there is refused."""
    import torch

    kind, colon, number = requested.partition(":")
    if kind not in DEVICES or (colon and not (kind == "cuda" and number.isdigit())):
        raise InputError(f"device must be one of {', '.join(DEVICES)} or cuda:N, got {requested!r}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if requested == "auto":
        found = next(name for name, there in present.items() if there)
        return Choice(found, "the fastest device here" if found != "cpu" else "no GPU that PyTorch can use")
    if not present[kind]:
        raise UnavailableError(f"device {requested!r} is not available: PyTorch {torch.__version__} finds no such GPU")
    if number and int(number) >= (count := torch.cuda.device_count()):
        raise UnavailableError(f"device {requested!r} is not available: there are {count} (cuda:0 ...)")
    return Choice(requested, "asked for")


def choose_engine(requested: str, device: str, packed: bool = False, config: ModelConfig | None = None) -> Choice:
    """`auto` takes the first engine of the list that runs the model on the device.

    packed: whether its weights are quantized. config: its shape, where it is known.
    """
    kind = device.partition(":")[0]
    if requested != "auto" and requested not in ENGINES:
        raise InputError(f"engine must be one of auto, {', '.join(ENGINES)}, got {requested!r}")
    if requested == "auto":
        fitting = [e for e in ENGINES.values() if kind in e.devices and (e.packed or not packed)]
        missing = [reason for e in fitting if (reason := e.why_not(config)) is not None]
        found = next((e for e in fitting if e.why_not(config) is None), None)
        if found is None:
            raise UnavailableError(
                "; ".join(missing) or f"no engine runs quantized weights on {kind}; use --device cpu"
            )
        return Choice(found.name, "; ".join([f"the fastest one for {kind} here", *missing]))
    engine = ENGINES[requested]
    if kind not in engine.devices:
        raise UnavailableError(f"engine {requested!r} runs on {', '.join(engine.devices)}, not on {kind}")
    if packed and not engine.packed:
        raise UnavailableError(f"engine {requested!r} does not run quantized weights")
    reason = engine.why_not(config)
    if reason is not None:
        raise UnavailableError(reason)
    return Choice(requested, "asked for")


def choose_dtype(requested: str, device: str, stored: str, num_parameters: int) -> Choice:
    """`auto` is the stored precision on cuda; elsewhere float32 as long as the weights fit in memory so.

    Many CPUs compute faster in float32, and it adds no rounding to the checkpoint's numbers. `stored` is float32,
    bfloat16 or anything else, which then runs as bfloat16.
    """
    if requested in ("float16", "fp16", "half"):
        raise InputError(FLOAT16_REASON)
    if stored in QUANTIZED_FORMATS:
        if requested != "auto":
            raise InputError(f"the weights are quantized ({stored}): dtype {requested!r} does not apply")
        return Choice(stored, "the format of the quantized weights")
    if requested not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {requested!r}")
    if requested != "auto":
        return Choice(requested, "asked for")
    if device.startswith("cuda"):
        if stored in DTYPES:
            return Choice(stored, "the precision of the checkpoint")
        return Choice("bfloat16", f"the checkpoint is {stored}")
    needed, free = 4 * num_parameters, memory_available()
    if free is not None and needed > _WEIGHTS_SHARE * free:
        return Choice("bfloat16", f"float32 weights of {size_text(needed)} would crowd {size_text(free)} of memory")
    return Choice("float32", f"float32 weights of {size_text(needed)} fit in memory")


def check_options(engine: str, options: dict[str, object]) -> None:
    """Refuse options that the engine does not understand."""
    unknown = sorted(set(options) - ENGINES[engine].options)
    if unknown:
        known = ", ".join(sorted(ENGINES[engine].options)) or "none"
        raise InputError(f"engine {engine!r} does not support {', '.join(unknown)}; its extra options: {known}")
