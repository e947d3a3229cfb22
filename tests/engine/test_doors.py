"""What the extension asks of torch, where torch answers otherwise than it does today."""

from __future__ import annotations

import pytest

from ema_fused.engine import backends
from tests import processes

# Each in place of the function that makes handles of tensors. In a process of its own: to connect
# concerns all that is in it.
_PROGRAM = """
from pathlib import Path

import torch

from ema_fused import _C

def fails(tensors):
    raise LookupError("no handles")

answers = {
    "none": lambda tensors: [],
    "a tuple": lambda tensors: tuple(tensors),
    "no capsules": lambda tensors: list(tensors),
    "an error": fails,
}
real = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
answers["one of them no capsule"] = lambda tensors: [*real(tensors[:1]), 7]
library = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
for what, answer in answers.items():
    try:
        _C.connect(torch.Tensor, torch.nn.Parameter, library, answer)
    except Exception as error:
        print(what, type(error).__name__, error, sep=": ")
_C.connect(torch.Tensor, torch.nn.Parameter, library, real)
for given in (7, None):
    try:
        _C.Counter(given)
    except Exception as error:
        print(given, type(error).__name__, sep=": ")
_C.Counter(torch.tensor(1))
"""


@pytest.mark.slow
def test_an_unknown_answer_is_an_error_and_not_a_crash() -> None:
    if backends.native() is None:
        pytest.skip("the extension is not built")
    printed = processes.run("-c", _PROGRAM).stdout.splitlines()
    no_list = "ImportError: torch made no list of one handle for each tensor"
    no_capsule = "ValueError: PyCapsule_GetPointer called with invalid PyCapsule object"
    assert printed == [
        f"none: {no_list}",
        f"a tuple: {no_list}",
        f"no capsules: {no_capsule}",
        "an error: LookupError: no handles",
        f"one of them no capsule: {no_list}",
        "7: ValueError",
        "None: ValueError",
    ]
