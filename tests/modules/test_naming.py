"""Tensors find their averages by name, whatever the model is wrapped in."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ema_fused import AveragedWeights, SlowPathWarning
from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.modules.naming import match_names, without_wrappers
from tests.networks import conv_net, differences, snapshot


def required(*names: str) -> dict[str, bool]:
    return dict.fromkeys(names, True)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("weight", "weight"),
        ("module.weight", "weight"),
        ("module._orig_mod.a.b.weight", "a.b.weight"),
        ("a._orig_mod.module.b", "a.b"),
        ("a._checkpoint_wrapped_module.b", "a.b"),
        ("module", "module"),
        ("modules.module_list.a", "modules.module_list.a"),
    ],
)
def test_wrappers_are_path_components(name: str, short: str) -> None:
    assert without_wrappers(name) == short


def test_equal_names_are_paired_as_they_stand() -> None:
    names = required("module.a", "a", "_orig_mod.a")
    assert match_names(names, names) == {name: name for name in names}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
def test_a_wrapper_around_the_whole_is_seen_through(prefix: str) -> None:
    bare, wrapped = required("a.w", "b"), required(f"{prefix}a.w", f"{prefix}b")
    assert match_names(bare, wrapped) == {"a.w": f"{prefix}a.w", "b": f"{prefix}b"}
    assert match_names(wrapped, bare) == {f"{prefix}a.w": "a.w", f"{prefix}b": "b"}


def test_wrappers_inside_are_seen_through_on_both_sides() -> None:
    averaged = required("a._orig_mod.w", "b.w")
    source = required("module.a.w", "module.b.module.w")
    assert match_names(averaged, source) == {
        "a._orig_mod.w": "module.a.w",
        "b.w": "module.b.module.w",
    }


def test_a_submodule_called_module_is_not_taken_for_a_wrapper() -> None:
    """Here 'module.w' is on both sides and means two different tensors."""
    averaged = required("module.w", "w")
    source = required("module.module.w", "module.w")
    assert match_names(averaged, source) == {"module.w": "module.module.w", "w": "module.w"}


def test_names_that_would_become_equal_raise() -> None:
    averaged = required("module.w", "w", "a.w")
    source = required("module.w", "w", "a._orig_mod.w")
    with pytest.raises(KeyError, match="would make different tensors equal"):
        match_names(averaged, source)


def test_missing_and_unexpected_names_are_listed() -> None:
    with pytest.raises(KeyError) as raised:
        match_names(required("a.w", "b.w"), required("module.a.w", "module.c.w"))
    message = str(raised.value)
    assert "missing from the model: b.w;" in message
    assert "unexpected in the model: module.c.w." in message
    assert "averaged.adopt(model) takes that over" in message


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(KeyError, match=r"layer\.5 and 94 more; unexpected in the model: none"):
        match_names(required(*(f"layer.{i}" for i in range(100))), {})


def test_names_that_need_no_partner_may_be_alone() -> None:
    averaged = {"w": True, "cache": False, "both": False}
    source = {"module.w": True, "module.other": False, "module.both": False}
    assert match_names(averaged, source) == {"w": "module.w", "both": "module.both"}
    with pytest.raises(KeyError, match="missing from the model: cache"):
        match_names({"w": True, "cache": True}, source)


# The wrappers themselves.


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    model.conv, model.hidden = compiled(model.conv), compiled(model.hidden)
    return model


def checkpointed_inside(model: nn.Module) -> nn.Module:
    model.hidden = checkpoint_wrapper(model.hidden)
    return model


WRAPPERS = {
    "ddp": distributed,
    "data-parallel": nn.DataParallel,
    "compile": compiled,
    "compile-of-ddp": lambda model: compiled(distributed(model)),
    "ddp-of-compile": lambda model: distributed(compiled(model)),
    "compiled-submodules": compiled_inside,
    "ddp-of-compiled-submodules": lambda model: distributed(compiled_inside(model)),
    "checkpointed-submodule": checkpointed_inside,
}


def shift(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        for buffer in model.buffers():
            buffer.add_(1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_may_be_wrapped_after_its_average_was_made(wrapper: str) -> None:
    plain, model = conv_net(), conv_net()
    expected, averaged = (ExponentialMovingAverage(net, 0.5) for net in (plain, model))
    for average, net in ((expected, plain), (averaged, model)):
        average.update_parameters(net)
    wrapped = WRAPPERS[wrapper](model)
    for average, net in ((expected, plain), (averaged, wrapped)):
        shift(net)
        average.update_parameters(net)
    assert differences(snapshot(averaged), snapshot(expected)) == []
    raw = snapshot(wrapped)
    with averaged.swapped(wrapped):
        assert differences(snapshot(plain), snapshot(model)) != []
    assert differences(snapshot(wrapped), raw) == []


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_average_may_be_made_of_a_wrapped_model(wrapper: str) -> None:
    model = conv_net()
    wrapped = WRAPPERS[wrapper](model)
    averaged = ExponentialMovingAverage(wrapped, 0.5)
    averaged.update_parameters(wrapped)
    before = snapshot(model)
    shift(model)
    averaged.update_parameters(conv_net())  # another model of this structure, unwrapped
    target = conv_net(seed=3)
    averaged.copy_to(target)
    found = snapshot(target)
    plain = snapshot(conv_net())
    for name, start in before.items():
        short = without_wrappers(name)
        averages = name in dict(model.named_parameters())
        value = torch.lerp(start, plain[short], 0.5) if averages else plain[short]
        assert torch.equal(found[short], value), name


@pytest.mark.usefixtures("process_group")
def test_passing_the_wrapper_and_the_model_in_turn_works_and_warns() -> None:
    model = conv_net()
    wrapped = distributed(model)
    averaged = ExponentialMovingAverage(model, 0.5)
    with pytest.warns(SlowPathWarning, match="another model object is passed in turn"):
        for _ in range(4):
            averaged.update_parameters(wrapped)
            averaged.update_parameters(model)
    assert averaged.steps == 8
    assert differences(snapshot(averaged.module), snapshot(model)) == []


def test_another_model_is_refused_by_name_and_nothing_changes() -> None:
    averaged = ExponentialMovingAverage(conv_net(), 0.5)
    averaged.update_parameters(conv_net())
    before = snapshot(averaged)
    other = conv_net(seed=1)
    del other.head
    other.tail = nn.Linear(67, 31)
    with pytest.raises(KeyError) as raised:
        averaged.update_parameters(other)
    assert "head.weight, head.bias" in str(raised.value)
    assert "tail.weight, tail.bias" in str(raised.value)
    assert differences(snapshot(averaged), before) == []


@pytest.mark.usefixtures("process_group")
def test_a_teacher_inside_a_distributed_model_keeps_its_count() -> None:
    """The wrapper broadcasts every buffer at each forward pass, the step count too."""

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = conv_net()
            self.teacher = ExponentialMovingAverage(self.student, 0.5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.student(images) - self.teacher(images)

    model = Student()
    wrapped = distributed(model)
    for count in range(1, 5):
        wrapped(torch.rand(2, 1, 6, 6)).sum().backward()
        shift(model.student)
        model.teacher.update_parameters(model.student)
        assert model.teacher.steps == count
        assert wrapped.state_dict()["module.teacher.steps"] == count
    assert not torch.equal(model.teacher.module.head.bias, model.student.head.bias)


# Wrappers of frameworks.


def of_fabric(model: nn.Module) -> nn.Module:
    fabrics = pytest.importorskip("lightning_fabric")
    return fabrics.Fabric(accelerator="cpu", devices=1).setup(model)


def of_fabric_with_ddp(model: nn.Module) -> nn.Module:
    """As ``Fabric(strategy="ddp").setup(model)`` wraps it."""
    wrappers = pytest.importorskip("lightning_fabric.wrappers")
    fabrics = pytest.importorskip("lightning_fabric")
    strategy = fabrics.Fabric(accelerator="cpu", devices=1).strategy
    return wrappers._FabricModule(distributed(model), strategy, original_module=model)


class GradSampleModule(nn.Module):
    """The module that opacus wraps around a model: the model and its hooks are in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._module = model
        self.handles = [model.register_forward_hook(self.capture)]

    def capture(self, *_: Any) -> None:
        assert not torch.is_grad_enabled() or self._module.training

    def forward(self, *inputs: Any) -> Any:
        return self._module(*inputs)


@pytest.fixture
def _opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    opacus = SimpleNamespace(AbstractGradSampleModule=GradSampleModule)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample.gsm_base", opacus)


FRAMEWORKS = {
    "fabric": of_fabric,
    "fabric-with-ddp": of_fabric_with_ddp,
    "opacus": GradSampleModule,
    "compile-of-fabric": lambda model: compiled(of_fabric(model)),
    "opacus-with-ddp": lambda model: GradSampleModule(distributed(model)),
}


@pytest.mark.usefixtures("process_group", "_opacus")
@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.slow
def test_wrappers_of_frameworks_are_seen_through(framework: str, kind: Any) -> None:
    plain, model = conv_net(), conv_net()
    wrapped = FRAMEWORKS[framework](model)
    expected, before, after = kind(plain, 0.5), kind(model, 0.5), kind(wrapped, 0.5)
    for _ in range(3):
        for net in (plain, model):
            shift(net)
        expected.update_parameters(plain)
        before.update_parameters(wrapped)
        after.update_parameters(wrapped)
    assert differences(snapshot(before), snapshot(expected)) == []
    if framework != "opacus-with-ddp" or kind is AveragedWeights:
        assert list(after.state_dict()) == list(expected.state_dict())
        assert differences(snapshot(after), snapshot(expected)) == []
        conv_net().load_state_dict(after.module.state_dict())
    after.load_state_dict(after.state_dict())
    after.update_parameters(model)  # unwrapped again
    raw = snapshot(model)
    for averaged in (before, after):
        with averaged.swapped(wrapped):
            assert differences(snapshot(model), raw) != []
        assert differences(snapshot(model), raw) == []
        target = conv_net(seed=3)
        averaged.copy_to(target)
    assert differences(snapshot(target), snapshot(model)) != []


def test_a_part_wrapped_by_fabric_is_named_once() -> None:
    model = conv_net()
    averaged = ExponentialMovingAverage(model, 0.5)
    averaged.update_parameters(model)
    expected, plain = ExponentialMovingAverage(conv_net(), 0.5), conv_net()
    expected.update_parameters(plain)
    model.hidden = of_fabric(model.hidden)
    for average, net in ((averaged, model), (expected, plain)):
        shift(net.conv)
        average.update_parameters(net)
    assert differences(snapshot(averaged), snapshot(expected)) == []


def test_children_that_are_named_like_a_frameworks_are_kept() -> None:
    """Only the frameworks' own classes are left out of the names of an average."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._module = nn.Linear(2, 2)
            self._original_module = nn.Linear(2, 2)
            self._forward_module = nn.Linear(2, 2)

    model = nn.Sequential(Encoder())
    for kind in (ExponentialMovingAverage, AveragedWeights):
        averaged = kind(model, 0.5)
        averaged.update_parameters(model)
        assert set(averaged.module.state_dict()) == set(model.state_dict())
        with torch.no_grad():
            model[0]._forward_module.weight.add_(1.0)
            model[0]._original_module.weight.add_(2.0)
        averaged.update_parameters(model)
        found = averaged.module.state_dict()
        for name, value in model.state_dict().items():
            is_moved = "weight" in name and "0._module" not in name
            assert torch.equal(found[name], value) is not is_moved, name
