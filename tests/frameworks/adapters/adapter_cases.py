"""What the tests of the adapters share: originals side by side with ours, and what may differ."""

from __future__ import annotations

import gc
import logging
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.originals import original
from tests.networks import ConvNet, conv_net

DTYPES = [torch.float32, torch.float64, torch.bfloat16]

# torch's CPU loops serve some 16-bit arithmetics to the original's bits, and a warning tells of it.
SLOW = pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")


def without_integers(dtype: torch.dtype = torch.float32) -> ConvNet:
    """A network with float buffers only: originals differ from ours on others."""
    model = conv_net(dtype=dtype)
    model.norm.register_buffer("num_batches_tracked", None)
    return model


def unit_in_the_last_place(tensor: Tensor) -> Tensor:
    """The distance to the next number, in float64."""
    exponent = torch.frexp(tensor.double().abs()).exponent - 1
    eps = torch.finfo(tensor.dtype).eps
    return eps * torch.exp2(exponent.double())


def assert_within_2_ulp(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    before: Sequence[Tensor],
    source: Sequence[Tensor],
) -> None:
    """Within 2 units in the last place of the largest number among inputs and result.

    Where an average and its step cancel out, the result alone would be no measure.
    """
    for ours, theirs, old, new in zip(found, expected, before, source, strict=True):
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
            continue
        largest = torch.stack([t.detach().to(theirs.dtype).abs() for t in (theirs, old, new)])
        bound = 2 * unit_in_the_last_place(largest.amax(0))
        assert ((ours.double() - theirs.double()).abs() <= bound).all()


def values(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_next_within_2_ulp(
    model: nn.Module, our: Any, their: Any, update: Callable[[Any], object]
) -> None:
    """One update begins with their averages in both: the bound holds for one."""
    before = values(their.shadow_params)
    for ours_now, wanted in zip(our.shadow_params, before, strict=True):
        ours_now.copy_(wanted)
    for ema in (our, their):
        update(ema)
    source = list(model.parameters())
    assert_within_2_ulp(our.shadow_params, their.shadow_params, before, source)


@contextmanager
def no_value_asked_of(*modules: nn.Module) -> Iterator[None]:
    """Makes reading values on the host raise, for tensors of ``modules`` or, without any, for all.

    On a GPU each such read synchronises with the device.
    """
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    addresses = {tensor.data_ptr() for tensor in held}

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def guard(self: Tensor, *arguments: Any) -> Any:
            if not modules or self.data_ptr() in addresses:
                raise AssertionError("a tensor was asked for its value")
            return method(self, *arguments)

        return guard

    with pytest.MonkeyPatch.context() as patched:
        for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, guarded(getattr(torch.Tensor, name)))
        yield


def assert_freed(delete: Callable[[], weakref.ref[Any]]) -> None:
    """Checks that ``delete`` drops the last reference to the object whose weak one it returns."""
    reference = delete()
    gc.collect()
    assert reference() is None


def timm_originals() -> Any:
    """timm's module of averages, and with it our adapter for it imported.

    timm itself needs torchvision, so it stands in bare while the adapter is imported.
    """
    loaded = original("timm==1.0.31", "timm.utils.model_ema")
    if "ema_fused.adapters.timm" not in sys.modules:
        with in_place("timm.utils.model_ema", loaded):
            import ema_fused.adapters.timm  # noqa: F401
    return loaded


@contextmanager
def in_place(path: str, loaded: Any) -> Iterator[None]:
    """Makes a loaded module importable by its path, in packages that stand in bare."""
    package, utils, _ = path.split(".")
    modules = {
        package: types.ModuleType(package),
        f"{package}.{utils}": types.ModuleType(f"{package}.{utils}"),
        path: loaded,
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, module in modules.items():
            patched.setitem(sys.modules, name, module)
            around, _, last = name.rpartition(".")
            if around:
                setattr(modules[around], last, module)
        yield


def ultralytics_originals() -> Any:
    """ultralytics' module of averages, and with it our adapter for it imported.

    What that module imports needs torchvision, and would write settings into the home folder. Its
    averages use none of it but the comparison of versions, of which torch has the newest.
    """
    unused = ("DEFAULT_CFG_DICT", "DEFAULT_CFG_KEYS", "colorstr")
    flags = ("ARM64", "MACOS", "WINDOWS")
    stand_ins: dict[str, dict[str, object]] = {
        "ultralytics": {"__version__": "8.4.190"},
        "ultralytics.utils": {
            **dict.fromkeys(unused),
            **dict.fromkeys(flags, False),
            "LOCAL_RANK": -1,
            "LOGGER": logging.getLogger("ultralytics"),
            "NUM_THREADS": 1,
            "PYTHON_VERSION": "3.11",
            "TORCH_VERSION": torch.__version__,
            "TORCHVISION_VERSION": "0.28.0",
        },
        "ultralytics.utils.checks": {
            "check_requirements": None,
            "check_version": lambda *_, **__: True,
        },
        "ultralytics.utils.cpu": {"CPUInfo": None},
        "ultralytics.utils.patches": {"torch_load": None},
    }
    loaded = original("ultralytics==8.4.190", "ultralytics.utils.torch_utils", stand_ins=stand_ins)
    if "ema_fused.adapters.ultralytics" not in sys.modules:
        with in_place("ultralytics.utils.torch_utils", loaded):
            import ema_fused.adapters.ultralytics  # noqa: F401
    return loaded
