"""The device of the GPU tests: a CUDA device, or in a rehearsal the CPU in its place.

``pytest --rehearse`` runs them without a GPU, on CPU tensors, so that on one they fail for what the
kernels do and not for mistakes of their own. What no CPU stands in for is marked ``needs``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch

DEVICE = BACKEND = "cuda"
REHEARSED_SO_FAR = "rehearsed up to here, where it needs"


def rehearse() -> None:
    """From now on the CPU is the device; called before any test is imported.

    Programs that tests start ask for ``device.DEVICE`` when they run: they are imported before.
    """
    global DEVICE, BACKEND
    DEVICE = BACKEND = "cpu"


def rather(count: int, rehearsed: int) -> int:
    """``count`` on a GPU, fewer in a rehearsal, which is to be quick."""
    return count if DEVICE == "cuda" else rehearsed


def needs(what: str) -> None:
    """Ends a rehearsal here."""
    if DEVICE == "cpu":
        pytest.skip(f"{REHEARSED_SO_FAR} {what}")


def needs_devices(count: int) -> None:
    """Ends a test for ``count`` GPUs where torch sees fewer; a rehearsal takes CPU processes."""
    seen = torch.cuda.device_count()
    if DEVICE == "cuda" and seen < count:
        pytest.skip(f"needs {count} CUDA devices, and torch sees {seen}")


def synchronize() -> None:
    """Waits until the device has finished all work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Whoever waits for the device within it gets an error from torch."""
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def told(ended: Mapping[str, Sequence[pytest.TestReport]]) -> str:
    """How far a rehearsal came, from the reports of its tests by their outcome."""
    reasons = [str(report.longrepr) for report in ended["skipped"]]
    stopped = Counter(
        reason.partition(REHEARSED_SO_FAR)[2].strip(" ')")
        for reason in reasons
        if REHEARSED_SO_FAR in reason
    )
    needed = ", ".join(f"{what} {count}" for what, count in stopped.most_common())
    return (
        f"on CPU tensors {len(ended['passed'])} passed, "
        f"{len(ended['failed']) + len(ended['error'])} failed, "
        f"{stopped.total()} ran up to what needs a GPU{f' ({needed})' if needed else ''}, "
        f"{len(reasons) - stopped.total()} skipped for other reasons"
    )
