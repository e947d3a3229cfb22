"""What ``torch.compile`` sees of this package.

Its tracer (Dynamo) follows Python calls. Our updates are Python around one launch, so following
them costs seconds, and their counters and weights, which change at every step, cost a compilation
each. So a public method is :func:`outside_graphs`: the tracer ends its graph before the call, runs
it as it is, and goes on behind it. The functions on lists of tensors are registered operators,
which stay inside a graph (:mod:`.operators`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

try:
    from torch._C._dynamo import eval_frame as _interpreter

    _SKIPPED = _interpreter._FrameExecStrategy(
        _interpreter._FrameAction.SKIP, _interpreter._FrameAction.SKIP
    )
    _mark: Callable[[CodeType, Any], object] | None = _interpreter.set_code_exec_strategy
except (ImportError, AttributeError):  # another torch
    _mark = None

_WHY = "averages are updated between graphs; lerp_, copy_ and swap_ on lists stay inside"


def outside_graphs(function: _Function) -> _Function:
    """Keeps ``torch.compile`` from tracing ``function`` and whatever it calls.

    As ``torch.compiler.disable`` does, but by two marks on the function instead of a wrapper around
    it, which would take two microseconds at every call: one for the tracer of a caller, one for the
    interpreter, which else would have the function's own frame compiled when it runs between two
    graphs. A torch without these marks gets the wrapper.
    """
    if _mark is None or not isinstance(function, FunctionType):
        wrapped: _Function = torch.compiler.disable(function)
        return wrapped
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    _mark(function.__code__, _SKIPPED)
    return function
