"""Lets the first process of a group work while the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def by_the_first(group: dist.ProcessGroup | None = None) -> Iterator[bool]:
    """``with by_the_first() as is_first:`` the others leave the block after the first process.

    If the first process raises, the others raise too. Without a process group, this process is the
    first.

    Raises:
        RuntimeError: in the others, if the first process raised.
    """
    if not dist.is_initialized():
        yield True
        return
    failed: Exception | None = None
    try:
        yield dist.get_rank(group) == 0
    except Exception as error:
        failed = error
    told = [repr(failed) if failed is not None else None]
    dist.broadcast_object_list(told, group=group, group_src=0)
    if failed is not None:
        raise failed
    if told[0] is not None:
        raise RuntimeError(f"process 0 of the group couldn't do its part: {told[0]}")
