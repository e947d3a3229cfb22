"""The backends, and why one can't be used for some tensors.

``cuda`` and ``cpu`` are the native kernels of the compiled extension; ``foreach`` is torch's own
``_foreach_*`` functions, which need no compiled extension and work on every device.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ema_fused.engine.notices import warn

BACKENDS = ("cuda", "cpu", "foreach")


class SlowPathWarning(UserWarning):
    """An update takes a slow path, for example torch's functions instead of a native kernel."""


def _connect() -> tuple[ModuleType | None, str | None]:
    """The compiled extension, connected to torch's C functions; or why there is none."""
    try:
        extension = importlib.import_module("ema_fused._C")
    except ImportError as error:
        return None, f"the compiled extension is missing ({error})"
    aoti = getattr(torch._C, "_aoti", None)
    make_handles = getattr(aoti, "unsafe_alloc_void_ptrs_from_tensors", None)
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        extension.connect(torch.Tensor, torch.nn.Parameter, str(library), make_handles)
    except ImportError as error:
        return None, f"the compiled extension can't reach torch {torch.__version__} ({error})"
    return extension, None


_native, _why_no_native = _connect()
_warned: set[str] = set()


def native() -> ModuleType | None:
    """The compiled extension, or None in a pure-Python install."""
    return _native


def counter_of(buffer: torch.Tensor) -> Any:
    """The extension's Counter of a buffer of one int64 in host memory; None for any other."""
    if _native is None:
        return None
    try:
        return _native.Counter(buffer)
    except ValueError:
        return None


def why_not(backend: str) -> str | None:
    """Why ``backend`` can't be used in this process; None if it can.

    Raises:
        ValueError: no backend has this name.
    """
    check_name(backend)
    if backend == "foreach":
        return None
    if _native is None:
        return _why_no_native
    if backend == "cpu":
        return None
    if torch.version.hip is not None:  # whose devices torch calls cuda too
        return "no kernel is built for ROCm"
    count, reason = _native.cuda_devices()
    return None if count else str(reason)


def why_not_on(device: torch.device) -> str | None:
    """Why no native kernel serves tensors on ``device``; None if one does."""
    if device.type not in ("cpu", "cuda"):
        return f"no kernel is built for device type {device.type!r}"
    reason = why_not(device.type)
    if reason is None and device.type == "cuda" and _native is not None:
        index = torch.cuda.current_device() if device.index is None else device.index
        reason = _native.why_not_on_cuda(index) or None
    return reason


def check_name(backend: str) -> None:
    """Raises ValueError unless ``backend`` is in ``BACKENDS``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")


def pinned(backend: str | None) -> str | None:
    """The backend that was asked for, by the argument or the variable EMA_FUSED_BACKEND; or None.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend can't be used here, with the reason.
    """
    name = backend or os.environ.get("EMA_FUSED_BACKEND") or None
    if name is None:
        return None
    check_name(name)
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and can't be used: {reason}")
    return name


def warn_slow_path(reason: str, example: str, pairs: int, total: int) -> None:
    """Warns that pairs are updated by ``foreach``; once per process for each reason."""
    if reason in _warned:
        return
    _warned.add(reason)
    warn(
        f"{pairs} of {total} pairs are updated by torch's foreach functions instead of a native "
        f"kernel of ema_fused, because {reason} (first: {example}). Results are right, only "
        f"slower; backend='foreach' says that this is meant.",
        SlowPathWarning,
        stacklevel=2,
    )
