"""An average takes over a changed structure of its model and keeps what goes on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ema_fused import AveragedWeights, ExponentialMovingAverage, PowerFunctionEMA, attach
from ema_fused.averages.base import BaseAveragedModel
from tests.networks import Tied, conv_net, differences, generator, run, snapshot, train

KINDS = [ExponentialMovingAverage, AveragedWeights]


class Net(nn.Module):
    """An embedding to grow, a list to append to, a layer to parametrize."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.points = nn.ParameterList([torch.zeros(3), torch.ones(3)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.layer(self.embedding(tokens))) + sum(self.points)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def grow(model: Net) -> None:
    grown = torch.cat([model.embedding.weight.detach(), torch.full((2, 3), 7.0)])
    model.embedding = nn.Embedding.from_pretrained(grown, freeze=False)


def grow_in_place(model: Net) -> None:
    model.embedding.weight.data = torch.cat([model.embedding.weight.data, torch.ones(2, 3)])


def prune(model: Net) -> None:
    model.embedding = nn.Embedding.from_pretrained(model.embedding.weight[:3], freeze=False)


def append(model: Net) -> None:
    model.points.append(torch.full((3,), 2.0))


def add(model: Net) -> None:
    model.add_module("more", nn.Linear(3, 2))


def remove(model: Net) -> None:
    model.norm = nn.Identity()


def parametrized(model: Net) -> None:
    parametrizations.weight_norm(model.layer)


NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
ORIGINALS = [f"layer.parametrizations.weight.original{i}" for i in (0, 1)]
CHANGES = [
    (grow, [], ["embedding.weight"], []),
    (grow_in_place, [], ["embedding.weight"], []),
    (prune, [], ["embedding.weight"], []),
    (append, ["points.2"], [], []),
    (add, ["more.weight", "more.bias"], [], []),
    (remove, [], [], [f"norm.{name}" for name in NORM]),
    (parametrized, ORIGINALS, [], ["layer.weight"]),
]


@pytest.mark.parametrize("options", [{}, {"averaged_dtype": torch.float64}, {"offload": "cpu"}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("change", "started", "resized", "dropped"), CHANGES)
@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_what_is_unchanged_keeps_its_average_and_the_rest_starts(
    change: Callable[[Net], None],
    started: list[str],
    resized: list[str],
    dropped: list[str],
    kind: type[ExponentialMovingAverage],
    options: dict[str, Any],
) -> None:
    model = net()
    averaged = kind(model, 0.25, **options)
    run(averaged, model, 4)
    before, tensors = snapshot(averaged.module), averaged.avg_parameters
    change(model)
    with pytest.raises((KeyError, ValueError), match=r"averaged\.adopt\(model\)"):
        averaged.update_parameters(model)
    adopted = averaged.adopt(model)
    names = [*model.state_dict()]
    converted = started if change is parametrized and kind is ExponentialMovingAverage else []
    started = [name for name in started if name not in converted]
    kept = len(names) - len(started) - len(resized) - len(converted)
    assert adopted == (kept, started, resized, dropped, converted)
    assert int(averaged.steps) == 4
    assert [*averaged.module.state_dict()] == names
    now, theirs = snapshot(averaged.module), snapshot(model)
    for name in names:
        if name in started + resized:
            assert torch.equal(now[name], theirs[name].to(now[name].dtype))
        elif name not in converted:
            assert torch.equal(now[name], before[name])
            if name in tensors:
                assert averaged.avg_parameters[name] is tensors[name]
    train(model, generator(1))
    averaged.update_parameters(model)
    for name, value in averaged.avg_parameters.items():
        assert value.dtype == options.get("averaged_dtype", torch.float32)
        assert not value.requires_grad
        source = model.get_parameter(name).detach().to(value.dtype)
        assert torch.equal(value, torch.lerp(now[name], source, 0.25))


def test_the_averaged_module_has_the_models_layers() -> None:
    model = net()
    averaged = ExponentialMovingAverage(model, 0.25)
    averaged.eval()
    run(averaged, model, 2)
    parametrized(model)
    append(model)
    averaged.adopt(model)
    assert not averaged.module.training and model.training
    averaged.copy_to(model)
    tokens = torch.tensor([0, 4, 2])
    assert torch.equal(averaged(tokens), model.eval()(tokens))


@pytest.mark.parametrize(
    "put_on",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
@pytest.mark.parametrize("options", [{}, {"averaged_dtype": torch.float64}])
def test_a_parametrization_put_on_or_taken_off_keeps_the_average(
    put_on: Callable[..., nn.Module], options: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    averaged = ExponentialMovingAverage(model, 0.25, **options)
    run(averaged, model, 3)
    before = averaged.module[0].weight.clone()
    put_on(model[0])
    adopted = averaged.adopt(model)
    assert (adopted.started, adopted.dropped) == (
        [name for name, _ in model.named_buffers()],
        ["0.weight"],
    )
    averaged.module.eval()
    model.eval()
    if put_on is parametrizations.weight_norm:
        assert torch.allclose(averaged.module[0].weight, before)
    run(averaged, model, 3)
    expected, theirs = averaged.module[0].weight.clone(), model[0].weight.clone()
    frozen = snapshot(averaged.module)
    parametrize.remove_parametrizations(model[0], "weight")
    old = averaged.module
    adopted = averaged.adopt(model)
    assert adopted.converted == ["0.weight"] and adopted.started == []
    assert differences(snapshot(old), frozen) == []
    assert torch.allclose(averaged.module[0].weight, expected)
    assert not torch.allclose(averaged.module[0].weight, theirs.to(expected.dtype))
    averaged.update_parameters(model)


def squared(model: nn.Module) -> nn.Module:
    class Square(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value.square()

    parametrize.register_parametrization(model, "weight", Square())
    return model


def test_a_parametrization_without_an_inverse_starts_with_the_models_values() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    averaged = ExponentialMovingAverage(model, 0.25)
    run(averaged, model, 3)
    squared(model[0])
    adopted = averaged.adopt(model)
    assert (adopted.started, adopted.converted) == (["0.parametrizations.weight.original"], [])
    assert torch.equal(averaged.module[0].weight, model[0].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_may_make_the_averages_of_what_was_resized(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = net()
    averaged = kind(model, 0.25, averaged_dtype=torch.float64)
    run(averaged, model, 4)
    before = averaged.avg_parameters["embedding.weight"].clone()
    grow(model)
    asked = []

    def resize(name: str, old_average: Tensor, new_value: Tensor) -> Tensor:
        asked.append(name)
        return torch.cat([old_average, new_value[len(old_average) :]]).float()

    assert averaged.adopt(model, resize=resize).resized == asked == ["embedding.weight"]
    weight = averaged.avg_parameters["embedding.weight"]
    assert weight.dtype == torch.float64 and not weight.requires_grad
    assert torch.equal(weight[:5], before.float().double())
    assert weight[5:].eq(7.0).all()
    run(averaged, model, 2)


def wrong_shape(name: str, old: Tensor, new: Tensor) -> Tensor:
    old.zero_()
    return old


def wrong_kind(name: str, old: Tensor, new: Tensor) -> Tensor:
    return new.zero_().long()


def nothing(name: str, old: Tensor, new: Tensor) -> Any:
    return None


def raising(name: str, old: Tensor, new: Tensor) -> Any:
    old.zero_()
    new.zero_()
    raise InterruptedError("as asked")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("resize", "error", "message"),
    [
        (wrong_shape, ValueError, r"shape \(5, 3\) for 'embedding\.weight'; .* \(7, 3\)"),
        (wrong_kind, TypeError, r"returned torch\.int64 for 'embedding\.weight'; a floating"),
        (nothing, TypeError, r"returned NoneType for 'embedding\.weight'"),
        (raising, InterruptedError, "as asked"),
    ],
)
def test_a_function_that_fails_has_changed_nothing(
    resize: Callable[..., Any],
    error: type[Exception],
    message: str,
    kind: type[ExponentialMovingAverage],
) -> None:
    model = net()
    averaged = kind(model, 0.25)
    run(averaged, model, 3)
    grow(model)
    append(model)
    module, before, theirs = averaged.module, snapshot(averaged), snapshot(model)
    with pytest.raises(error, match=message):
        averaged.adopt(model, resize=resize)
    assert averaged.module is module
    assert differences(snapshot(averaged), before) == []
    assert differences(snapshot(model), theirs) == []


@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_swapped_block_it_is_refused(kind: type[ExponentialMovingAverage]) -> None:
    model = net()
    averaged = kind(model, 0.25)
    with (
        averaged.swapped(model),
        pytest.raises(RuntimeError, match=r"adopt\(\) was called while averaged weights"),
    ):
        averaged.adopt(model)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_untied_are_named_and_adopted(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = Tied()
    averaged = kind(model, 0.25)
    run(averaged, model, 3)
    model.decoder.weight = nn.Parameter(model.encoder.weight.detach() + 1.0)
    before = snapshot(averaged)
    message = r"'encoder\.weight' and 'decoder\.weight' are one tensor in the average and two"
    with pytest.raises(ValueError, match=message):
        averaged.update_parameters(model)
    with pytest.raises(ValueError, match=message), averaged.swapped(model):
        pass
    assert differences(snapshot(averaged), before) == []
    assert averaged.adopt(model) == (2, [], [], [], [])
    weights = averaged.avg_parameters
    assert torch.equal(weights["encoder.weight"], weights["decoder.weight"])
    expected = torch.lerp(weights["decoder.weight"], model.decoder.weight.detach(), 0.25)
    averaged.update_parameters(model)
    assert torch.equal(averaged.avg_parameters["decoder.weight"], expected)
    assert not torch.equal(expected, averaged.avg_parameters["encoder.weight"])
    # And tied again: each goes on by itself until the average adopts it.
    model.decoder.weight = model.encoder.weight
    averaged.update_parameters(model)
    first = averaged.avg_parameters["encoder.weight"]
    assert averaged.adopt(model) == (2, [], [], [], [])
    module = averaged.module
    assert module.get_parameter("decoder.weight") is module.get_parameter("encoder.weight")
    assert module.get_parameter("decoder.weight") is first
    averaged.update_parameters(model)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_parameters_stay_shared_and_others_keep_their_memory(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = net()
    model.embedding.requires_grad_(False)
    averaged = kind(model, 0.25, share_frozen=True)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    averaged.update_parameters(model)
    trained = averaged.avg_parameters["layer.weight"]
    model.layer.requires_grad_(False)  # its average isn't the model's value
    append(model)
    add(model)
    model.get_submodule("more").requires_grad_(False)
    assert averaged.adopt(model).started == ["points.2", "more.weight", "more.bias"]
    assert averaged.shared_names == {"embedding.weight", "more.weight", "more.bias"}
    weights = averaged.avg_parameters
    assert weights["layer.weight"] is trained
    for name in averaged.shared_names:
        assert weights[name].data_ptr() == model.get_parameter(name).data_ptr()
    assert weights["points.2"].data_ptr() != model.points[2].data_ptr()
    model.embedding.requires_grad_(True)
    assert averaged.adopt(model).started == []
    assert averaged.shared_names == {"more.weight", "more.bias"}
    assert averaged.avg_parameters["embedding.weight"].data_ptr() != (
        model.embedding.weight.data_ptr()
    )
    averaged.update_parameters(model)


class Passing(nn.DataParallel):
    """Holds a model, and asks for no devices."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_are_not_copied_into_it(kind: type[ExponentialMovingAverage]) -> None:
    model = net()
    averaged = kind(model, 0.25)
    run(averaged, model, 2)
    append(model)
    wrapped = Passing(torch.compile(model, backend="eager"))
    assert averaged.adopt(wrapped).started == ["points.2"]
    assert [*averaged.avg_parameters] == [name for name, _ in model.named_parameters()]
    averaged.update_parameters(wrapped)
    # One that was made of a wrapped model, and adopts the plain one.
    outer = ExponentialMovingAverage(Passing(model), 0.25)
    run(outer, Passing(model), 2)
    before = outer.avg_parameters["module.layer.weight"]
    append(model)
    assert outer.adopt(model).started == ["points.3"]
    assert outer.avg_parameters["layer.weight"] is before
    outer.update_parameters(Passing(model))


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_buffers_are_kept_and_resized(kind: type[ExponentialMovingAverage]) -> None:
    model = net()
    averaged = kind(model, 0.25, update_buffers=True)
    run(averaged, model, 3)
    before = averaged.module.get_buffer("norm.running_mean").clone()
    append(model)
    averaged.adopt(model)
    assert torch.equal(averaged.module.get_buffer("norm.running_mean"), before)
    model.norm = nn.BatchNorm1d(2)
    adopted = averaged.adopt(model, resize=lambda name, old, new: old[: len(new)])
    assert adopted.resized == [f"norm.{name}" for name in NORM[:-1]]
    assert torch.equal(averaged.module.get_buffer("norm.running_mean"), before[:2])


def test_an_attached_average_goes_on_and_its_state_is_of_the_new_structure() -> None:
    model = net()
    averaged = ExponentialMovingAverage(model, 0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.tensor([0, 1, 2, 3])

    def step() -> None:
        optimizer.zero_grad()
        model(tokens).square().sum().backward()
        optimizer.step()

    with attach(optimizer, model, averaged):
        step()
        append(model)
        averaged.adopt(model)
        optimizer.add_param_group({"params": [model.points[2]]})
        step()
    assert int(averaged.steps) == 2
    other = ExponentialMovingAverage(model, 0.25)
    other.load_state_dict(averaged.state_dict())
    assert differences(snapshot(other), snapshot(averaged)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [False, True])
def test_before_the_first_update_it_is_still_the_first(
    loaded: bool, kind: type[ExponentialMovingAverage]
) -> None:
    model = net()
    averaged = kind(model, 0.25)
    if loaded:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        averaged.module.load_state_dict(zeros)
    append(model)
    averaged.adopt(model)
    averaged = copy.deepcopy(averaged)
    with torch.no_grad():
        model.layer.weight.fill_(1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        averaged.update_parameters(model)
    assert len(caught) == loaded
    weight = averaged.avg_parameters["layer.weight"]
    assert weight.unique().tolist() == [0.25 if loaded else 1.0]


def test_a_model_that_is_the_same_keeps_everything() -> None:
    model = conv_net()
    averaged: BaseAveragedModel = ExponentialMovingAverage(model, 0.25)
    run(averaged, model, 2)
    before = snapshot(averaged)
    assert averaged.adopt(model) == (len(model.state_dict()), [], [], [], [])
    assert differences(snapshot(averaged), before) == []


def test_power_function_averages_adopt_at_every_width(tmp_path: Path) -> None:
    model = net()
    ema = PowerFunctionEMA(model, (0.05, 0.1))
    for step in range(4):
        train(model, generator(step))
        ema.update_parameters(model)
    before = [{name: t.clone() for name, t in ema.average(width).items()} for width in (0.05, 0.1)]
    grow(model)
    append(model)
    with pytest.raises((KeyError, ValueError), match=r"averaged\.adopt\(model\)"):
        ema.update_parameters(model)
    with pytest.raises(ValueError, match="shape"):
        ema.adopt(model, resize=wrong_shape)
    assert ema.averages[0].get_parameter("embedding.weight").shape == (5, 3)
    adopted = ema.adopt(model, resize=lambda name, old, new: torch.cat([old, new[len(old) :]]))
    assert adopted[1:] == (["points.2"], ["embedding.weight"], [], [])
    for width, kept in zip((0.05, 0.1), before, strict=True):
        now = ema.average(width)
        assert torch.equal(now["embedding.weight"][:5], kept["embedding.weight"])
        assert torch.equal(now["layer.weight"], kept["layer.weight"])
    ema.update_parameters(model)
    assert ema.steps == 5
    ema.save_snapshot(tmp_path)


def test_power_function_averages_name_what_is_untied_or_lazy() -> None:
    model = Tied()
    ema = PowerFunctionEMA(model)
    ema.update_parameters(model)
    model.decoder.weight = nn.Parameter(model.encoder.weight.detach() + 1.0)
    with pytest.raises(ValueError, match="are one tensor in the average and two in the model"):
        ema.update_parameters(model)
    ema.adopt(model)
    ema.update_parameters(model)
    with pytest.raises(ValueError, match=r"'0\.weight' of the model has no elements yet"):
        PowerFunctionEMA(nn.Sequential(nn.LazyLinear(3)))
