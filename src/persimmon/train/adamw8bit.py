"""AdamW whose two moments take one byte each: a quarter of the optimizer's memory.

The moments are kept in blocks of BLOCK numbers with one float32 scale, the block's largest magnitude. Codes are
companded, so that small numbers of a block keep their relative precision (after Dettmers et al. 2022, whose table is
another): the first moment is a signed square, the root of the second an unsigned one. Both are rounded
stochastically, else a moment that decays by less than half a step would stand still. A second moment above zero
never becomes zero.

Weights in bfloat16 are updated in float32 and rounded stochastically as well: a step far below their precision then
moves them by the right amount on average. All random numbers follow from (step, place of the parameter) alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale."""

SMALL = 4_096
"""Parameters with fewer numbers (norms, biases) keep float32 moments."""

_CHUNK = 1 << 22
"""Numbers updated at a time, a multiple of BLOCK: bounds the float32 copies (about 100 MB)."""

STATE_BYTES = 2 + 2 * 4 / BLOCK
"""Bytes of state per number of a large parameter."""


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay and bias correction as torch.optim.AdamW."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(fresh_state(parameter))
        state["step"] += 1
        step = int(state["step"])
        generator = torch.Generator(parameter.device).manual_seed((step << 20) + place)
        weights, gradient = parameter.data.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        for start in range(0, weights.numel(), _CHUNK):
            part = slice(start, min(start + _CHUNK, weights.numel()))
            first, second = _moments(state, part)
            grad = gradient[part].float()
            first.lerp_(grad, 1 - group["betas"][0])
            second.mul_(group["betas"][1]).addcmul_(grad, grad, value=1 - group["betas"][1])
            _store(state, part, first, second, generator)
            new = weights[part].float()
            new.mul_(1 - group["lr"] * group["weight_decay"])
            size = group["lr"] / (1 - group["betas"][0] ** step)
            spread = (second / (1 - group["betas"][1] ** step)).sqrt_().add_(group["eps"])
            new.addcdiv_(first, spread, value=-size)
            weights[part] = round_stochastically(new, generator) if weights.dtype is torch.bfloat16 else new


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    count = parameter.numel()
    state = {"step": torch.zeros((), dtype=torch.int64)}
    for name in ("first", "second"):
        if count < SMALL:
            state[name] = torch.zeros(count, dtype=torch.float32, device=parameter.device)
        else:
            state[name] = torch.zeros(count, dtype=torch.uint8, device=parameter.device)
            state[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=parameter.device)
    return state


def _moments(state: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
    """Both moments of a part in float32."""
    if "first_scale" not in state:
        return state["first"][part], state["second"][part]
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    first = decode_signed(state["first"][part], state["first_scale"][blocks])
    root = decode_unsigned(state["second"][part], state["second_scale"][blocks])
    return first, root.square_()


def _store(state: dict[str, Tensor], part: slice, first: Tensor, second: Tensor, generator: torch.Generator) -> None:
    if "first_scale" not in state:
        return  # updated in place
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    state["first"][part], state["first_scale"][blocks] = encode_signed(first, generator)
    state["second"][part], state["second_scale"][blocks] = encode_unsigned(second.sqrt(), generator)


# -- codes ---------------------------------------------------------------------------------------------------


def _blocks(values: Tensor) -> Tensor:
    """[n] -> [blocks, BLOCK], zeros at the end."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def _shares(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each value over its block's largest magnitude [blocks, BLOCK], and those [blocks]."""
    blocks = _blocks(values)
    scales = blocks.abs().amax(1)
    return blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None], scales


def _rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Up or down to a whole number, so that the mean is the value."""
    return (values + torch.rand(values.shape, generator=generator, device=values.device)).floor_()


def encode_signed(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(codes [n], scales): the code 128 + c stands for sign(c) * (c / 127)^2 of the scale."""
    shares, scales = _shares(values)
    # Rounded in the value's own space between neighbouring codes, so that the mean is right there.
    low = (shares.abs().sqrt() * 127).floor_().clamp_max_(126)
    below, above = (low / 127).square_(), ((low + 1) / 127).square_()
    codes = low + _rounded((shares.abs() - below) / (above - below), generator).clamp_(0, 1)
    return (codes * shares.sign() + 128).to(torch.uint8).view(-1)[: len(values)], scales


def decode_signed(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `encode_signed`, [n] float32."""
    steps = (_blocks(codes.float() - 128)) / 127
    return (steps * steps.abs() * scales[:, None]).view(-1)[: len(codes)]


def encode_unsigned(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(codes [n], scales) of values of at least 0: the code c stands for (c / 255)^2 of the scale; none becomes 0."""
    shares, scales = _shares(values)
    low = (shares.sqrt() * 255).floor_().clamp_max_(254)
    below, above = (low / 255).square_(), ((low + 1) / 255).square_()
    codes = low + _rounded((shares - below) / (above - below), generator).clamp_(0, 1)
    codes = torch.where(shares > 0, codes.clamp_min(1), codes)
    return codes.to(torch.uint8).view(-1)[: len(values)], scales


def decode_unsigned(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `encode_unsigned`, [n] float32."""
    return ((_blocks(codes.float()) / 255).square_() * scales[:, None]).view(-1)[: len(codes)]


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 to one of the two neighbouring bfloat16 numbers, so that the mean is the value."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = (values.contiguous().view(torch.int32) + noise) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)
