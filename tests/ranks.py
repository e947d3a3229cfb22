"""Processes with a process group, started once and given functions to run.

The group is gloo's, and the device of the processes the CPU; or NCCL's, with a GPU for each.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from tests import device

_PATIENCE = 120.0  # seconds, for a collective call and for an answer
# Imported once, in a process that all others are forks of: it takes each seconds otherwise.
_IMPORTED = [
    "torch._dynamo",  # which optimizers import
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def _serve(rank: int, ranks: int, meeting: str, orders: Connection, kind: str) -> None:
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
        init_method=f"file://{meeting}",
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
        # A fork can't use CUDA if an import has asked for GPUs before.
        context = multiprocessing.get_context("spawn" if kind == "cuda" else "forkserver")
        self._folder = tempfile.TemporaryDirectory()
        self._orders = []
        self._processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, count, f"{self._folder.name}/meeting", there, kind),
                daemon=True,
            )
            with _forked_from_one_with(imported):
                process.start()
            there.close()
            self._orders.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function`` returns in each process; fails with what it raises there."""
        for orders in self._orders:
            orders.send((function, arguments))
        answers = [self._answer(orders) for orders in self._orders]
        problems = [answer for done, answer in answers if not done]
        if problems:
            raise AssertionError("\n".join(problems))
        return [answer for _, answer in answers]

    def _answer(self, orders: Connection) -> tuple[bool, Any]:
        try:
            if orders.poll(2 * _PATIENCE):
                answer: tuple[bool, Any] = orders.recv()
                return answer
            return False, "a process didn't answer"
        except EOFError:
            return False, "a process ended"

    def end(self) -> None:
        """Ends the processes, those too that wait for others."""
        for orders in self._orders:
            try:
                orders.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()


@contextmanager
def started(count: int, imported: Sequence[str] = (), kind: str = "cpu") -> Iterator[Ranks]:
    """``count`` processes for the length of the block."""
    ranks = Ranks(count, imported, kind)
    try:
        yield ranks
    finally:
        ranks.end()
