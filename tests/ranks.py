"""Processes with a process group, started once and given functions to run.

The group is gloo's, and the device of the processes the CPU; or NCCL's, with a GPU for each.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from tests import device

_PATIENCE = 120.0  # seconds, for a collective call and for an answer
_GRACE = 10.0  # seconds, for the answers of others once a process has failed
# Imported once, in a process that all others are forks of: it takes each seconds otherwise.
_IMPORTED = [
    "torch._dynamo",  # which optimizers import
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack_{rank}")


def _serve(rank: int, ranks: int, folder: str, orders: Connection, kind: str) -> None:
    faulthandler.register(signal.SIGUSR1, _stack_file(folder, rank).open("w"))
    import torch
    import torch.distributed as dist
    from torch.utils import _pytree as pytree

    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        device.rehearse()
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=_PATIENCE),
    )
    while True:
        order = orders.recv()
        if order is None:
            break
        function, arguments = order
        try:
            answer = function(*arguments)
            if kind == "cuda":  # whose memory ends with this process
                answer = pytree.tree_map_only(torch.Tensor, lambda one: one.detach().cpu(), answer)
            orders.send((True, answer))
        except BaseException:
            orders.send((False, f"process {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()


# The processes that others are forks of, by what they have imported further.
_servers: dict[tuple[str, ...], forkserver.ForkServer] = {}


@contextmanager
def _forked_from_one_with(imported: Sequence[str]) -> Iterator[None]:
    """A block in which new processes are forks of one that has imported these modules too."""
    server = _servers.get(tuple(imported))
    if server is None:
        server = _servers[tuple(imported)] = forkserver.ForkServer()
        server.set_forkserver_preload([*_IMPORTED, *imported])
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        yield


class Ranks:
    """Processes that run one function at a time, together.

    Args:
        count: how many.
        imported: names of further modules, imported once for all such processes.
        kind: of their devices, "cpu" or "cuda". In a process ``tests.device.DEVICE`` is the same.
    """

    def __init__(self, count: int, imported: Sequence[str] = (), kind: str = "cpu") -> None:
        self._count, self._imported, self._kind = count, imported, kind
        self._start()

    def _start(self) -> None:
        # A fork can't use CUDA if an import has asked for GPUs before.
        context = multiprocessing.get_context("spawn" if self._kind == "cuda" else "forkserver")
        self._folder = tempfile.TemporaryDirectory()
        self._orders: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(self._count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self._count, self._folder.name, there, self._kind),
                daemon=True,
            )
            with _forked_from_one_with(self._imported):
                process.start()
            there.close()
            self._orders.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function`` returns in each process; fails with what it raises there.

        After a failure the next call runs in new processes: of the old ones some may wait for one
        that will not come, and no later test is to fail for that.
        """
        if not self._processes:
            self._start()
        for orders in self._orders:
            with suppress(OSError):  # of a process that has ended, which is told below
                orders.send((function, arguments))
        results, problems = self._answers()
        if problems:
            self.end()
            raise AssertionError("\n".join(problems))
        return [results[rank] for rank in range(self._count)]

    def _answers(self) -> tuple[dict[int, Any], list[str]]:
        """What each process returned, and what went wrong, the first first."""
        results: dict[int, Any] = {}
        problems: list[str] = []
        waited_for = {orders: rank for rank, orders in enumerate(self._orders)}
        while waited_for:
            ready = wait(waited_for, _GRACE if problems else 2 * _PATIENCE)
            if not ready:
                return results, [*problems, *map(self._where, waited_for.values())]
            for orders in ready:
                rank = waited_for.pop(orders)
                try:
                    done, answer = orders.recv()
                except (EOFError, ConnectionError):
                    done, answer = False, "a process ended"
                if done:
                    results[rank] = answer
                else:
                    problems.append(answer)
        return results, problems

    def _where(self, rank: int) -> str:
        file = _stack_file(self._folder.name, rank)
        if not file.exists():
            return f"process {rank} has not started yet"
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)  # in which it writes
        return f"process {rank} didn't answer, and is here:\n{file.read_text()}"

    def end(self) -> None:
        """Ends the processes, those too that wait for others."""
        for orders in self._orders:
            with suppress(OSError):
                orders.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()
        self._orders, self._processes = [], []
        self._folder.cleanup()


@contextmanager
def started(count: int, imported: Sequence[str] = (), kind: str = "cpu") -> Iterator[Ranks]:
    """``count`` processes for the length of the block."""
    ranks = Ranks(count, imported, kind)
    try:
        yield ranks
    finally:
        ranks.end()
