"""Pickles read as data: nothing that they name is imported, called or constructed.

A pickle is a program for a small stack machine, and Python's own machine will call whatever the program names. This
one knows the opcodes that checkpoints need and builds plain values; where the program says "call this name", it keeps
a `Call` that says so. Only names on a list may be mentioned at all, and every other one is refused with its name.

Not covered: text opcodes of protocol 0 (no `torch.save` writes them) and extension registries. Both are refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from persimmon.errors import CheckpointError

# An honest checkpoint of the 8B takes about 30,000 steps; each can make an object of some 200 bytes.
_MAX_STEPS = 250_000


@dataclass(eq=False)
class Call:
    """A name, the arguments that the pickle wanted to call it with, and the state it wanted to give the result."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


class _Mark:
    """The stack's bookmark."""


_MARK = _Mark()


@dataclass
class PickleReader:
    """Reads one pickle after another from a stream.

    `allowed(name)` says whether the pickle may mention `module.name`, `calls` turns the calls that mean data into it,
    and `persistent` the references to what lies outside the pickle.
    """

    source: str
    """What is being read, for error messages."""
    allowed: Callable[[str], bool]
    calls: Mapping[str, Callable[..., Any]]
    persistent: Callable[[Any], Any]

    def read(self, stream: IO[bytes]) -> Any:
        """The value of the pickle that begins here; the stream is left behind its end."""
        machine = _Machine(self)
        try:
            for operation, argument, _ in _operations(stream):
                if operation == "STOP":
                    return machine.pop()
                machine.step(operation, argument)
        except CheckpointError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{self.source}: damaged pickle: {error}") from None
        raise CheckpointError(f"{self.source}: the pickle has no end")


def _operations(stream: IO[bytes]) -> Iterator[tuple[str, Any, int | None]]:
    for steps, (operation, argument, position) in enumerate(pickletools.genops(stream)):
        if steps == _MAX_STEPS:
            raise ValueError(f"more than {_MAX_STEPS} operations")
        yield operation.name, argument, position


# Opcodes that push what stands behind them.
_PUSH_ARGUMENT = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
        "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING",
    }
)  # fmt: skip
_PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "MARK": lambda: _MARK,
}  # fmt: skip
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, reader: PickleReader) -> None:
        self._reader = reader
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def step(self, operation: str, argument: Any) -> None:
        """Carry out one operation."""
        if operation in _PUSH_ARGUMENT:
            self._stack.append(argument)
        elif operation in _PUSH_NEW:
            self._stack.append(_PUSH_NEW[operation]())
        elif operation in _TUPLE_SIZES:
            items = [self.pop() for _ in range(_TUPLE_SIZES[operation])]
            self._stack.append(tuple(reversed(items)))
        else:
            action = getattr(self, f"_do_{operation.lower()}", None)
            if action is None:
                raise CheckpointError(f"{self._reader.source}: pickle operation {operation} is not accepted")
            action(argument)

    def _to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _do_proto(self, argument: int) -> None:
        if argument > 5:
            raise ValueError(f"protocol {argument}")

    def _do_frame(self, argument: int) -> None:
        """Frames only help readers to buffer."""

    def _do_pop(self, argument: None) -> None:
        self.pop()

    def _do_tuple(self, argument: None) -> None:
        self._stack.append(tuple(self._to_mark()))

    # -- memo ------------------------------------------------------------------------------------------------

    def _do_binput(self, argument: int) -> None:
        self._memo[argument] = self._stack[-1]

    _do_long_binput = _do_binput

    def _do_memoize(self, argument: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _do_binget(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    _do_long_binget = _do_binget

    # -- containers ------------------------------------------------------------------------------------------

    def _do_append(self, argument: None) -> None:
        item = self.pop()
        self._target(list).append(item)

    def _do_appends(self, argument: None) -> None:
        items = self._to_mark()
        self._target(list).extend(items)

    _do_additems = _do_appends

    def _do_setitem(self, argument: None) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def _do_setitems(self, argument: None) -> None:
        self._set_items(self._to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._target(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | bytes | None):  # hashing nested tuples could recurse too deep
                raise ValueError(f"a {type(key).__name__} as dictionary key")
            target[key] = value

    def _target(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"items for a {type(self._stack[-1]).__name__}")
        return self._stack[-1]

    # -- what would run code elsewhere ------------------------------------------------------------------------

    def _do_global(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self._mention(module, name)

    def _do_stack_global(self, argument: None) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global needs two strings")
        self._mention(module, name)

    def _mention(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if not self._reader.allowed(full):
            raise CheckpointError(f"{self._reader.source}: refused: the pickle names {full}, which no checkpoint needs")
        self._stack.append(Call(full))

    def _do_reduce(self, argument: None) -> None:
        arguments, target = self.pop(), self.pop()
        if not isinstance(target, Call) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no name")
        meaning = self._reader.calls.get(target.name)
        self._stack.append(Call(target.name, arguments) if meaning is None else meaning(*arguments))

    _do_newobj = _do_reduce

    def _do_build(self, argument: None) -> None:
        """State for the object below. Dictionaries drop theirs: state dicts carry version notes there."""
        state = self.pop()
        target = self._stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif not isinstance(target, dict):
            raise ValueError(f"state for a {type(target).__name__}")

    def _do_binpersid(self, argument: None) -> None:
        self._stack.append(self._reader.persistent(self.pop()))
