"""Processes with a gloo process group, started once and given functions to run."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

_PATIENCE = 120.0  # seconds, for a collective call and for an answer
# Imported once, in a process that all others are forks of: it takes each seconds otherwise.
_IMPORTED = [
    "torch._dynamo",  # which optimizers import
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def _serve(rank: int, ranks: int, meeting: str, orders: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
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
            orders.send((True, function(*arguments)))
        except BaseException:
            orders.send((False, f"process {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()


def _fork_each(imported: Sequence[str], served: list[tuple[int, int, str, Connection]]) -> None:
    """Imports modules once, and serves in as many forks of this process as there are orders."""
    os.setsid()  # so that all can be killed together
    for module in imported:
        importlib.import_module(module)
    forks = []
    for arguments in served:
        fork = os.fork()
        if fork == 0:
            for *_, orders in served:  # a process has ended when nobody holds its end of the pipe
                if orders is not arguments[-1] and not orders.closed:
                    orders.close()
            _serve(*arguments)
            os._exit(0)
        arguments[-1].close()
        forks.append(fork)
    for fork in forks:
        os.waitpid(fork, 0)


class Ranks:
    """Processes that run one function at a time, together.

    Args:
        count: how many.
        imported: names of further modules, imported once for all of them.
    """

    def __init__(self, count: int, imported: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._folder = tempfile.TemporaryDirectory()
        self._orders = []
        self._is_forked = bool(imported)
        served = []
        for rank in range(count):
            here, there = context.Pipe()
            self._orders.append(here)
            served.append((rank, count, f"{self._folder.name}/meeting", there))
        self._processes = (
            [context.Process(target=_fork_each, args=(imported, served), daemon=True)]
            if imported
            else [context.Process(target=_serve, args=each, daemon=True) for each in served]
        )
        for process in self._processes:
            process.start()
        for *_, there in served:
            there.close()

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
            if self._is_forked and process.is_alive() and process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        self._folder.cleanup()


@contextmanager
def started(count: int, imported: Sequence[str] = ()) -> Iterator[Ranks]:
    """``count`` processes for the length of the block."""
    ranks = Ranks(count, imported)
    try:
        yield ranks
    finally:
        ranks.end()
