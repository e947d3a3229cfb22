"""Models that deepcopy refuses: copied where that is possible, or named where it isn't."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.modules import deep_copies
from tests.networks import differences, generator, snapshot

# Computed attributes.


def _weight_norm() -> nn.Module:
    return nn.Sequential(
        torch.nn.utils.weight_norm(nn.Conv1d(3, 5, 3)),
        nn.LeakyReLU(),
        torch.nn.utils.weight_norm(nn.ConvTranspose1d(5, 3, 4, stride=2), dim=1),
    )


def _spectral_norm() -> nn.Module:
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv1d(3, 3, 3)), nn.BatchNorm1d(3))


def _pruned() -> nn.Module:
    conv = nn.Conv1d(3, 3, 3)
    prune.l1_unstructured(conv, "weight", amount=0.5)
    return nn.Sequential(conv)


class _KeepsItsOutputs(nn.Module):
    """Plain attributes with a history: a tensor, one in a list, one in a tuple in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3)
        self.last: Any = None
        self.all: list[Tensor] = []
        self.states: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        self.all.append(self.last)
        self.states["now"] = (self.last, self.last * 2)
        return self.last


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("build", [_weight_norm, _spectral_norm, _pruned, _KeepsItsOutputs])
@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_copy_with_computed_attributes_is_its_model(
    build: Callable[[], nn.Module], run_before: bool, dtype: torch.dtype | None
) -> None:
    model, random = build(), generator()
    x = torch.randn(2, 3, 16, generator=random)
    if run_before:
        model(x).sum().backward()
    hooks = {path: len(part._forward_pre_hooks) for path, part in model.named_modules()}
    held = {
        (path, name): value
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }
    before = snapshot(model)
    averaged = ExponentialMovingAverage(model, 0.1, averaged_dtype=dtype)
    averaged.update_parameters(model)
    assert differences(snapshot(model), before) == []
    for path, part in model.named_modules():
        assert len(part._forward_pre_hooks) == hooks[path]
        assert len(averaged.module.get_submodule(path)._forward_pre_hooks) == hooks[path]
        for name, value in vars(part).items():
            assert not isinstance(value, Tensor) or value is held[path, name]
    tensors = [*averaged.parameters(), *averaged.buffers()]
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not any(tensor.requires_grad or tensor.data_ptr() in own for tensor in tensors)
    if dtype is not None:
        return  # another dtype rounds otherwise
    twin = copy.deepcopy(averaged.module)
    for mode in (True, False):
        assert torch.equal(twin.train(mode)(x), model.train(mode)(x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_model_with_weight_norm_is_averaged_swapped_and_saved() -> None:
    model, random = _weight_norm(), generator()
    averaged, reference = ExponentialMovingAverage(model, 0.1), AveragedWeights(model, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 16, generator=random)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        reference.update_parameters(model)
    assert differences(averaged.module.state_dict(), reference.weights) == []
    with reference.swapped(model):
        swapped = model(x)
    assert torch.equal(averaged(x), swapped)
    assert not torch.equal(averaged(x), model(x))
    again = pickle.loads(pickle.dumps(averaged.eval()))
    assert torch.equal(again(x), swapped)


def test_parts_that_share_a_computed_tensor_share_its_copy() -> None:
    model = _KeepsItsOutputs()
    model(torch.ones(1, 3, 16))
    copied = deep_copies.deep_copy(model, {})
    assert copied.all[0] is copied.last and copied.states["now"][0] is copied.last
    assert copied.last.grad_fn is None and model.last.grad_fn is not None


# What can't be copied.


class _WithA(nn.Module):
    def __init__(self, thing: object) -> None:
        super().__init__()
        self.thing = thing


class _UnusualError(Exception):
    """An error of its own that a message alone doesn't make."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)


class _RefusesUnusually:
    def __deepcopy__(self, memo: object) -> object:
        raise _UnusualError("it", "is unusual")


def _holds_it(thing: object) -> nn.Module:
    part = _WithA({"inside": [thing]})
    root = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Sequential(part)})
    root.register_forward_hook(lambda *_: None)
    root.part_of_it = [part]  # type: ignore[assignment]  # isn't what can't be copied
    return root


@pytest.mark.parametrize(
    ("thing", "raised"),
    [
        (threading.Lock(), TypeError),
        ((number for number in range(3)), TypeError),
        (_RefusesUnusually(), RuntimeError),
    ],
    ids=["lock", "generator", "unusual"],
)
def test_what_cannot_be_copied_is_named(thing: object, raised: type[Exception]) -> None:
    model = _holds_it(thing)
    before = snapshot(model)
    with pytest.raises(raised, match=r"'second\.0\.thing' of the model \(dict in a _WithA\)") as it:
        ExponentialMovingAverage(model, 0.1)
    assert "ema_fused.AveragedWeights(model, ...)" in str(it.value)
    assert it.value.__cause__ is not None and str(it.value.__cause__) in str(it.value)
    averaged = AveragedWeights(model, 0.1)
    averaged.update_parameters(model)
    assert differences(snapshot(model), before) == []


def test_an_open_file_and_a_process_group_are_named(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        model = _WithA(file)
        with pytest.raises(TypeError, match=r"'thing' of the model \(TextIOWrapper in a _WithA\)"):
            ExponentialMovingAverage(model, 0.1)
    if not torch.distributed.is_available():
        return
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    group = torch.distributed.ProcessGroup(store, 0, 1)
    norm = nn.SyncBatchNorm(3, process_group=group)
    with pytest.raises(TypeError, match=r"'0\.process_group' of the model \(ProcessGroup in"):
        ExponentialMovingAverage(nn.Sequential(norm), 0.1)
    AveragedWeights(nn.Sequential(norm), 0.1)


class _Uncopied(Tensor):
    """A class of tensors that can't be copied."""

    def __deepcopy__(self, memo: object) -> Any:
        raise RuntimeError("these can't be copied")


def test_a_tensor_that_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].register_buffer("scale", torch.ones(2).as_subclass(_Uncopied))
    with pytest.raises(RuntimeError, match=r"'1\.scale' of the model \(_Uncopied\) can't be deep"):
        ExponentialMovingAverage(model, 0.1)


# Plain tensors, which no average follows.


class _Normaliser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(3)
        self.std = torch.ones(3)
        self.order = torch.arange(3)
        self.register_buffer("scale", torch.ones(3))
        self.same_as_scale = self.scale


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_line_names_the_plain_tensors_of_a_class_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep_copies, "_told", set())
    model = nn.Sequential(_Normaliser(), _Normaliser(), nn.Linear(3, 3), _weight_norm())
    with torch.no_grad():
        model.append(_spectral_norm())
    with caplog.at_level(logging.INFO):
        ExponentialMovingAverage(model, 0.1)
        ExponentialMovingAverage(model, 0.1)
    assert [record.getMessage() for record in caplog.records] == [
        "_Normaliser keeps mean, std as plain tensors: their copies in the average stay as they "
        "are now. Tensors that change in training are followed if they are registered by "
        "register_buffer()"
    ]
    model[0].mean.fill_(1.0)
    averaged: Any = AveragedWeights(model, 0.1)  # which copies nothing of them
    averaged.update_parameters(model)
    assert len(caplog.records) == 1
