"""Wrapper subclasses of tensors are updated by their own operations, as by the originals."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ema_fused
from ema_fused import AveragedWeights, ExponentialMovingAverage, Plan, SlowPathWarning
from ema_fused.engine.memory import is_wrapper, memory_of
from ema_fused.offloading.offloaded_plan import OffloadedPlan
from tests.wrapper_tensors import WithoutLerp, Wrapped

pytestmark = pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")


def plain_pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)


ORIGINALS: dict[str, Callable[[Tensor, Tensor, float], object]] = {
    "lerp": lambda a, s, w: a.lerp_(s, w),
    "axpby": lambda a, s, w: a.mul_(1 - w).add_(s, alpha=w),
    "delta": lambda a, s, w: a.add_(s - a, alpha=w),
    "products": lambda a, s, w: a.copy_(a * (1 - w) + s * w),
}


@pytest.mark.parametrize("arithmetic", ORIGINALS)
@pytest.mark.parametrize("sides", ["both", "averaged", "source"])
def test_a_wrapper_is_averaged_as_by_the_original(arithmetic: str, sides: str) -> None:
    a, s = plain_pair()
    expected = a.clone()
    ORIGINALS[arithmetic](expected, s, 0.25)
    inside = a.clone()
    averaged = Wrapped(inside) if sides != "source" else inside
    source = Wrapped(s) if sides != "averaged" else s
    # A plain pair beside it, which has a kernel.
    beside = torch.zeros(5)
    plan = Plan([averaged, beside], [source, torch.ones(5)], arithmetic=arithmetic)
    plan.lerp_(0.25)
    assert torch.equal(inside, expected)
    assert beside.tolist() == [0.25] * 5


def test_lists_of_wrappers_are_averaged_copied_and_swapped() -> None:
    a, s = plain_pair()
    for operation, expected in (
        (lambda x, y: ema_fused.lerp_(x, y, 0.25), (torch.lerp(a, s, 0.25), s)),
        (ema_fused.copy_, (s, s)),
        (ema_fused.swap_, (s, a)),
    ):
        ours, theirs = Wrapped(a.clone()), Wrapped(s.clone())
        operation([ours], [theirs])
        assert torch.equal(ours.inside, expected[0])
        assert torch.equal(theirs.inside, expected[1])


def test_wrappers_of_one_tensor_are_one_memory() -> None:
    a, s = plain_pair()
    one, same, other = Wrapped(a), Wrapped(a), Wrapped(s)
    assert is_wrapper(one)
    assert not is_wrapper(a)
    assert memory_of(one) == memory_of(same) != memory_of(other)
    before = a.clone()
    Plan([one], [same]).lerp_(0.5)
    assert torch.equal(a, before)
    # A tied pair is updated once.
    Plan([one, same], [other, Wrapped(s)]).lerp_(0.5)
    assert torch.equal(a, torch.lerp(before, s, 0.5))


def test_the_warning_names_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ema_fused.engine.backends._warned", set())
    a, s = plain_pair()
    if ema_fused.engine.backends.native() is None:
        pytest.skip("the extension is not built")
    with pytest.warns(SlowPathWarning, match="only the own operations of Wrapped can update it"):
        Plan([Wrapped(a)], [Wrapped(s)])


def test_an_operation_that_a_class_lacks_is_named_and_nothing_is_changed() -> None:
    a, s = plain_pair()
    before = a.clone()
    averaged = [torch.zeros(5), Wrapped(torch.zeros(3, 4)), WithoutLerp(a)]
    source = [torch.ones(5), Wrapped(torch.ones(3, 4)), WithoutLerp(s)]
    plan = Plan(averaged, source, names=["bias", "other", "weight"])
    message = r"'weight': WithoutLerp can't average: NotImplementedError: .* no lerp_.*share_frozen"
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            plan.lerp_(0.5)
    assert averaged[0].tolist() == [0.0] * 5
    assert torch.equal(averaged[1].inside, torch.zeros(3, 4))
    assert torch.equal(a, before)
    plan.swap_()
    assert torch.equal(s, before)
    assert averaged[0].tolist() == [1.0] * 5
    # Other operations will do.
    Plan([WithoutLerp(before)], [WithoutLerp(a)], arithmetic="delta").lerp_(0.5)


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_models_of_wrappers_are_averaged_and_swapped(
    kind: type[ExponentialMovingAverage],
) -> None:
    model, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    model.weight = nn.Parameter(Wrapped(model.weight.detach().clone()))
    averaged, expected = kind(model, momentum=0.25), ExponentialMovingAverage(plain, momentum=0.25)
    for step in range(3):
        with torch.no_grad():
            for one in (model, plain):
                one.weight.add_(step)
        averaged.update_parameters(model)
        expected.update_parameters(plain)
    weight = dict(averaged.module.named_parameters())["weight"]
    assert isinstance(weight.detach(), Wrapped)
    assert torch.equal(weight.detach().inside, expected.module.weight)
    with averaged.swapped(model):
        assert torch.equal(model.weight.detach().inside, expected.module.weight)
    assert torch.equal(model.weight.detach().inside, plain.weight)
    averaged.copy_to(model)
    assert torch.equal(model.weight.detach().inside, expected.module.weight)


def test_a_model_that_is_its_own_average_is_still_refused() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(Wrapped(model.weight.detach().clone()))
    averaged = ExponentialMovingAverage(model)
    averaged.module.weight = model.weight
    with pytest.raises(ValueError, match="'weight' of the average is the model's own memory"):
        averaged.update_parameters(model)


def test_offloaded_averages_refuse_wrappers_by_name() -> None:
    a, s = plain_pair()
    with pytest.raises(TypeError, match="'w': the averaged tensor is a Wrapped, whose elements"):
        OffloadedPlan([Wrapped(a)], [Wrapped(s)], names=["w"])


def test_weights_of_torchao_are_averaged_as_by_torch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = pytest.importorskip("torchao.prototype.quantized_training")
        from torchao.quantization.quant_api import quantize_
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, training.int8_mixed_precision_training())
    averaged = ExponentialMovingAverage(model, momentum=0.25)
    averaged.update_parameters(model)
    before = averaged.module[0].weight.detach()._data.clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averaged.update_parameters(model)
    expected = torch.lerp(before, model[0].weight.detach()._data, 0.25)
    assert torch.equal(averaged.module[0].weight.detach()._data, expected)
