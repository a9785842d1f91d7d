"""The processes of a run: this one alone, several on this machine, or those that torchrun started.

Local processes talk over gloo on the loopback interface. Under torchrun (RANK, WORLD_SIZE, MASTER_ADDR in the
environment) each process is one member of the run, with NCCL and one GPU where there are GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from persimmon.errors import PersimmonError
from persimmon.train.signals import TrainingInterrupted


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is, and where its tensors live."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add the gradients of all processes, in place, as one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values


def under_torchrun() -> bool:
    """Whether this process was started as one of several by torchrun or a launcher that sets the same variables."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def _joined_from_environment() -> Iterator[World]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():  # one GPU was tried, several were not
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exit_with_parent() -> None:
    """End this process when its parent is gone, however that died: no orphan goes on training."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _process(
    rank: int, size: int, port: int, failures: Any, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    _exit_with_parent()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        work(World(rank, size), *arguments)
        dist.destroy_process_group()
    except TrainingInterrupted as stop:
        os._exit(128 + stop.signal_number)
    except BaseException as error:  # told to the parent, which raises it there
        known = isinstance(error, PersimmonError)
        failures.put((rank, error if known else f"process {rank} of {size} failed:\n{traceback.format_exc()}"))
        os._exit(1)


def run_processes(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(world, *arguments)` in `size` processes; in this one when `size` is 1 or torchrun started it.

    An error of a process ends all and is raised here. Signals to this process reach the others, which save and
    leave by TrainingInterrupted.
    """
    if under_torchrun():
        with _joined_from_environment() as world:
            work(world, *arguments)
        return
    if size == 1:
        work(World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")), *arguments)
        return
    context = mp.get_context("spawn")
    port, failures = _free_port(), context.SimpleQueue()
    processes: list[Any] = [
        context.Process(target=_process, args=(rank, size, port, failures, work, arguments)) for rank in range(size)
    ]
    try:
        with _signals_passed_on(processes):
            for process in processes:
                process.start()
            codes = _wait(processes)
        _raise_failure(codes, failures)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            if process.pid is not None:
                process.join()


def _wait(processes: list[Any]) -> list[int]:
    """Exit codes of all; once one has failed the others, which wait for it in vain, get five seconds."""
    deadline: float | None = None
    while any(process.is_alive() for process in processes):
        if deadline is None and any(process.exitcode for process in processes):
            deadline = time.monotonic() + 5.0
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                if process.is_alive():
                    process.kill()
        time.sleep(0.05)
    return [int(process.exitcode or 0) for process in processes]


def _raise_failure(codes: list[int], failures: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        if 128 + number in codes:
            raise TrainingInterrupted(number)
    if not any(codes):
        return
    reports = []
    while not failures.empty():
        reports.append(failures.get())
    # A PersimmonError explains; what other processes say about lost connections does not.
    for _, error in reports:
        if isinstance(error, PersimmonError):
            raise error
    raise RuntimeError("\n".join(text for _, text in sorted(reports)) or f"the processes ended with codes {codes}")


@contextlib.contextmanager
def _signals_passed_on(processes: list[Any]) -> Iterator[None]:
    """While the processes run, SIGTERM and SIGINT go to them (the terminal sends Ctrl-C to all by itself)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, _frame: Any) -> None:
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
