"""What is shared with the model (``share_frozen``) is never written through the average."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from tests.wrapper_tensors import Wrapped


def adapted() -> nn.Sequential:
    """A frozen layer, and one that is trained."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    return model


def _add_to_data(weight: nn.Parameter) -> None:
    weight.data += 1.0  # as PEFT's merge_and_unload


def _set_item(weight: nn.Parameter) -> None:
    weight[0] = 1.0


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "data +=": _add_to_data,
    "data.add_": lambda weight: weight.data.add_(1.0),
    "data.copy_": lambda weight: weight.data.copy_(torch.ones(3, 3)),
    "add_": lambda weight: weight.add_(1.0),
    "copy_": lambda weight: weight.copy_(torch.ones(3, 3)),
    "item": _set_item,
    "init": nn.init.ones_,
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_a_write_to_the_average_leaves_the_model_alone(write: str) -> None:
    model = adapted()
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    averaged.update_parameters(model)
    weight, frozen = averaged.module[0].weight, model[0].weight
    assert weight.data_ptr() == frozen.data_ptr()
    expected = frozen.clone()
    WRITES[write](expected)
    before = frozen.clone()
    WRITES[write](weight)
    assert torch.equal(frozen, before)
    assert torch.equal(weight, expected)
    assert type(weight) is nn.Parameter
    # The next update shares again.
    averaged.update_parameters(model)
    assert averaged.module[0].weight.data_ptr() == frozen.data_ptr()
    WRITES[write](averaged.module[0].weight)
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_a_loaded_state_is_not_written_into_the_model(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = adapted()
    averaged = kind(model, share_frozen=True)
    averaged.update_parameters(model)
    other = ExponentialMovingAverage(adapted())
    state = other.state_dict()
    before = model[0].weight.clone()
    averaged.load_state_dict(state)
    assert torch.equal(model[0].weight, before)
    weights = dict(averaged.module.named_parameters())
    assert torch.equal(weights["0.weight"], other.module[0].weight)


def test_reading_keeps_the_memory_shared() -> None:
    model = adapted()
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    weight, memory = averaged.module[0].weight, model[0].weight.data_ptr()
    averaged(torch.ones(1, 3))
    assert weight.data.sum() == model[0].weight.sum()
    assert type(weight + 1) is Tensor
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))  # the same values
    averaged.module.to(torch.float32).requires_grad_(False)
    assert averaged.module[0].weight.data_ptr() == memory


def test_copies_and_pickles_are_plain() -> None:
    model = adapted()
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    for copied in (
        copy.deepcopy(averaged.module[0]),
        pickle.loads(pickle.dumps(averaged.module[0])),
    ):
        assert type(copied.weight) is nn.Parameter
        assert torch.equal(copied.weight, model[0].weight)
    file = io.BytesIO()
    torch.save([averaged.state_dict(), averaged.module[0].weight.data], file)
    file.seek(0)
    assert type(torch.load(file)[1]) is Tensor


class Quantized(nn.Parameter):
    """Knows more than its elements, as bitsandbytes' ``Int8Params``."""

    scale: Tensor

    def __new__(cls, data: Tensor, scale: Tensor) -> Quantized:
        made = Tensor._make_subclass(cls, data, False)
        made.scale = scale
        return made


class QuantizedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        data = torch.randint(-9, 9, (3, 3), dtype=torch.int8)
        self.weight = Quantized(data, torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        # As bitsandbytes' layers, which move what the weight knows into the module.
        if hasattr(self.weight, "scale"):
            self.scale = vars(self.weight).pop("scale")
        return inputs @ (self.weight * self.scale)


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_parameters_of_other_classes_keep_class_and_attributes(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = nn.Sequential(QuantizedLinear(), nn.Linear(3, 2))
    averaged = kind(model, share_frozen=True, momentum=0.5)
    for _ in range(2):
        averaged.update_parameters(model)

    def expect_shared() -> None:
        weight = dict(averaged.module.named_parameters())["0.weight"]
        assert type(weight) is Quantized
        assert weight.data_ptr() == model[0].weight.data_ptr()
        assert weight.scale == 0.5

    expect_shared()
    with averaged.swapped(model):
        model(torch.ones(1, 3))
    expect_shared()
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))
    # One that takes its place is followed.
    model[0] = QuantizedLinear()
    averaged.update_parameters(model)
    expect_shared()


class Tagged(nn.Parameter):
    """A trained parameter with an attribute and a constructor of its own."""

    tag: str

    def __new__(cls, data: Tensor, tag: str) -> Tagged:
        made = Tensor._make_subclass(cls, data, True)
        made.tag = tag
        return made


class Plain(Tensor):
    pass


@pytest.mark.parametrize(
    "weight",
    [Tagged(torch.ones(2, 3), "expert"), nn.Parameter(torch.ones(2, 3).as_subclass(Plain))],
    ids=["parameter", "tensor"],
)
def test_trained_parameters_of_other_classes_are_copied_and_averaged(weight: Any) -> None:
    model = nn.Linear(3, 2)
    model.weight = weight
    averaged = ExponentialMovingAverage(model, momentum=0.25)
    averaged.update_parameters(model)
    with torch.no_grad():
        weight.add_(1.0)
    averaged.update_parameters(model)
    copied: Any = averaged.module.weight
    assert type(copied) is type(weight)
    assert getattr(copied, "tag", None) == getattr(weight, "tag", None)
    assert copied.tolist() == [[1.25] * 3] * 2
    with averaged.swapped(model):
        assert weight.tolist() == [[1.25] * 3] * 2


class WithoutClone(Wrapped):
    refused = ("clone",)


def test_a_class_that_cannot_be_copied_is_named() -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(WithoutClone(torch.ones(2, 3)))
    with pytest.raises(TypeError, match=r"'weight' is a WithoutClone, .*share_frozen=True"):
        ExponentialMovingAverage(model)
    model.requires_grad_(False)
    ExponentialMovingAverage(model, share_frozen=True).update_parameters(model)


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_a_shared_wrapper_that_trains_again_is_refused_by_name() -> None:
    model = adapted()
    model[0].weight = nn.Parameter(Wrapped(torch.ones(3, 3)), requires_grad=False)
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    averaged.update_parameters(model)
    assert averaged.module[0].weight is model[0].weight
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.weight' is shared with the model as the very"):
        averaged.update_parameters(model)


@pytest.mark.slow
def test_peft_merges_into_the_average_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    base: Any = nn.Sequential(nn.Linear(4, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    averaged = ExponentialMovingAverage(model, share_frozen=True)
    averaged.update_parameters(model)
    before, inputs = model(torch.ones(1, 4)), torch.ones(1, 4)
    merged = averaged.module.merge_and_unload()
    torch.testing.assert_close(merged(inputs), before)
    assert torch.equal(model(inputs), before)


def _view(weight: nn.Parameter) -> object:
    return weight.detach().add_(1.0)


THROUGH: dict[str, Callable[[nn.Parameter], object]] = {
    "fill_": lambda weight: torch.fill_(weight, 1.0),
    "out=": lambda weight: torch.add(weight, 1.0, out=weight),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "view": _view,
}


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
@pytest.mark.parametrize("write", THROUGH)
@torch.no_grad()
def test_a_write_that_reaches_the_model_is_told_at_the_next_update(
    write: str, kind: type[ExponentialMovingAverage]
) -> None:
    model = adapted()
    averaged = kind(model, 0.5, share_frozen=True)
    for _ in range(3):
        averaged.update_parameters(model)
    THROUGH[write](averaged.module.get_parameter("0.weight"))
    with pytest.warns(UserWarning, match=r"0\.weight: frozen parameters of the average were writ"):
        averaged.update_parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0].weight.fill_(0.0)  # the model's own writes are nobody's mistake
        averaged.update_parameters(model)
        model.load_state_dict(adapted().state_dict())
        averaged.update_parameters(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_average_is_called(backend: str, grad: bool) -> None:
    model = adapted()
    averaged = ExponentialMovingAverage(model, 0.5, share_frozen=True)
    averaged.update_parameters(model)
    compiled = torch.compile(averaged.module, backend=backend)
    inputs = torch.rand(4, 3)
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(inputs), model(inputs))
        with torch.no_grad():
            for parameter in model[1].parameters():
                parameter.add_(1.0)
        averaged.update_parameters(model)
        assert torch.equal(compiled(inputs), averaged.module(inputs))
    of_compiled = ExponentialMovingAverage(
        torch.compile(adapted(), backend=backend), share_frozen=True
    )
    assert of_compiled(inputs).shape == (4, 2)
