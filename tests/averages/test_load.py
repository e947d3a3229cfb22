"""Ten thousand updates of an average while its model is changed in every way that training knows.

Beside it a reference of a few lines: a tensor a name, torch.lerp, and nothing that is remembered
about the model. Both are equal to the bit all the way, and nothing grows.
"""

from __future__ import annotations

import copy
import gc
import io
import random
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from resource import getpagesize
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ema_fused import AveragedWeights, ExponentialMovingAverage, SlowPathWarning
from ema_fused.engine import backends

pytestmark = pytest.mark.slow

UPDATES = 10_000
LOOK_EVERY = 1_000  # updates from one look at the memory to the next
OBJECTS = 20  # more than before, after 4,000 updates
RESIDENT = 1 << 21  # bytes more than before, after 4,000 updates
LEAST_MOMENTUM, GAMMA = 0.01, 20.0  # of the schedule
BOUND = 4.0  # what all parameters stay within


class Net(nn.Module):
    """Convolution, batch norm, tied weights, a cache; float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2))
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(19, 19)
        self.tied = nn.Linear(19, 19, bias=False)
        self.tied.weight = self.hidden.weight
        self.head = nn.Linear(19, 5)
        self.scale: Tensor
        self.cache: Tensor
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


class Passing(nn.DataParallel):
    """Holds a model, and asks for no devices."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def never_called(*_: Any) -> Any:
    raise AssertionError("this compiler is for wrapping alone")


def compiled(module: nn.Module) -> nn.Module:
    """In torch.compile's wrapper; never run."""
    wrapped: nn.Module = torch.compile(module, backend=never_called)
    return wrapped


def plain(name: str) -> str:
    return re.sub(r"\b(module|_orig_mod|_checkpoint_wrapped_module)\.", "", name)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their plain names, tied ones under each."""
    found = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return {plain(name): tensor for name, tensor in found}


def average_of(averaged: Tensor, source: Tensor, momentum: float) -> Tensor:
    """In the wider of the two dtypes, rounded once."""
    if averaged.dtype == source.dtype:
        return torch.lerp(averaged, source.contiguous(), momentum)
    wide = torch.promote_types(averaged.dtype, source.dtype)
    mean = torch.lerp(averaged.to(wide), source.to(wide).contiguous(), momentum)
    return mean.to(averaged.dtype)


class Reference:
    """What the documentation says, with a tensor a name.

    ``exact`` is the same of parameters in float64 from the first copy on, never rounded.
    """

    def __init__(self, model: nn.Module, share_frozen: bool) -> None:
        self.steps = 0
        self.shared = frozen_names(model) if share_frozen else set()
        self.values = {name: contiguous_copy(tensor) for name, tensor in tensors_of(model).items()}
        self.exact: dict[str, Tensor] = {}

    def settle(self, model: nn.Module) -> dict[str, Tensor]:
        """What is shared is the model's; what has become trainable has its value from then.

        Returns:
            What isn't shared, of the model.
        """
        tensors = tensors_of(model)
        for name in list(self.shared):
            self.values[name] = tensors[name].detach()
            self.exact[name] = contiguous_copy(tensors[name], torch.float64)
            if tensors[name].requires_grad:
                self.values[name] = contiguous_copy(tensors[name])
                self.shared.discard(name)
        return {name: tensor for name, tensor in tensors.items() if name not in self.shared}

    def update(self, model: nn.Module, momentum: float) -> None:
        if self.steps == 0:
            self.copy_from(model)
        else:
            sources: dict[str, Tensor] = {}
            for name, tensor in self.settle(model).items():
                source, ours = tensor.detach(), self.values[name]
                if isinstance(tensor, nn.Parameter):
                    self.values[name] = average_of(ours, source, momentum)
                    sources[name] = source.double()
                else:
                    self.values[name] = contiguous_copy(source, ours.dtype)
            exact = [self.exact[name] for name in sources]
            if exact:
                torch._foreach_lerp_(exact, list(sources.values()), momentum)
        self.steps += 1

    def copy_from(self, model: nn.Module) -> None:
        for name, tensor in self.settle(model).items():
            self.values[name] = contiguous_copy(tensor, self.values[name].dtype)
            if isinstance(tensor, nn.Parameter):
                self.exact[name] = contiguous_copy(tensor, torch.float64)


def contiguous_copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def frozen_names(model: nn.Module) -> set[str]:
    return {
        name
        for name, tensor in tensors_of(model).items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }


class Look(NamedTuple):
    """What is alive, at a moment when everything is as at the start."""

    tensors: int
    weak_references: int
    objects: int
    resident: int  # bytes


def what_is_alive() -> Look:
    objects = gc.get_objects()
    tensors = sum(issubclass(type(item), Tensor) for item in objects)
    weak_references = sum(issubclass(type(item), weakref.ref) for item in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Look(tensors, weak_references, len(objects), pages * getpagesize())


class InsideError(Exception):
    pass


class Run:
    """A model in training, its average and the reference, and what may happen between updates."""

    def __init__(self, kind: type[ExponentialMovingAverage], seed: int) -> None:
        self.kind = kind
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.bare = Net()
        self.model: nn.Module = self.bare
        self.averaged = self.average(share_frozen=False)
        self.reference = Reference(self.model, share_frozen=False)
        self.replaced: list[weakref.ref[Any]] = []  # tensors, memory and averages
        self.left: list[weakref.ref[Any]] = []  # to be gone at the next look
        self.happened: Counter[str] = Counter()
        self.before = [
            self.replace_a_parameter,
            self.give_other_memory,
            self.convert,
            self.convert_a_part,
            self.change_the_layout,
            self.freeze_and_unfreeze,
            self.wrap_or_unwrap,
            self.wrap_or_unwrap_a_part,
            self.replace_a_buffer,
            self.go_on_with_a_copy,
            self.swap,
        ]
        self.after = [
            self.save_and_load,
            self.copy_the_average,
            self.convert_the_average,
            self.copy_to_the_model,
            self.swap,
        ]

    def average(self, share_frozen: bool) -> ExponentialMovingAverage:
        return self.kind(self.model, schedule, share_frozen=share_frozen)

    @torch.no_grad()
    def train(self) -> None:
        """In place; parameters stay near 0."""
        parameters = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        noise = [torch.randn(p.shape, generator=self.numbers).to(p) for p in parameters]
        if parameters:  # not all frozen
            torch._foreach_mul_(parameters, 0.9)
            torch._foreach_add_(parameters, noise, alpha=0.2)
        self.inside("norm").get_buffer("num_batches_tracked").add_(1)
        self.inside("norm").get_buffer("running_mean").mul_(0.9).add_(0.1)
        self.bare.cache.add_(1)

    def update(self) -> None:
        self.train()
        self.averaged.update_parameters(self.model)
        self.reference.update(self.model, momentum_after(self.reference.steps))
        self.compare()

    def compare(self) -> None:
        steps, found = self.reference.steps, tensors_of(self.averaged.module)
        assert int(self.averaged.steps) == steps
        for name, expected in self.reference.values.items():
            tensor = found[name]
            assert tensor.dtype == expected.dtype, f"{name!r} after {steps} updates"
            assert torch.equal(tensor, expected), f"{name!r} differs after {steps} updates"
        assert found.keys() == self.reference.values.keys()

    def happens(self, events: list[Any]) -> None:
        event = self.random.choice(events)
        event()
        self.happened[event.__name__] += 1

    # What happens to the model.

    def inside(self, part: str) -> nn.Module:
        module = self.bare.get_submodule(part)
        inner = getattr(module, "_checkpoint_wrapped_module", module)
        assert isinstance(inner, nn.Module)
        return inner

    def choose(self) -> tuple[nn.Module, str]:
        part = self.inside(self.random.choice(["conv", "norm", "hidden", "head"]))
        return part, self.random.choice(["weight", "bias"])

    def replace_a_parameter(self) -> None:
        part, name = self.choose()
        old = part.get_parameter(name)
        values = torch.rand(old.shape, generator=self.numbers).to(old.dtype)
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        for owner in self.bare.modules():
            for key, tensor in owner._parameters.items():
                if tensor is old:
                    setattr(owner, key, new)
        self.replaced.append(weakref.ref(old))

    def give_other_memory(self) -> None:
        """The memory is numpy's, so that it can be told when it is given back."""
        part, name = self.choose()
        parameter = part.get_parameter(name)
        array = parameter.detach().numpy() + np.float32(0.25)
        parameter.data = torch.from_numpy(array)
        self.left.append(weakref.ref(array))

    def convert(self) -> None:
        self.model.to(self.random.choice([torch.float32, torch.float64]))

    def convert_a_part(self) -> None:
        part, _ = self.choose()
        part.to(self.random.choice([torch.float32, torch.float64]))

    def change_the_layout(self) -> None:
        formats = [torch.channels_last, torch.contiguous_format]
        self.model.to(memory_format=self.random.choice(formats))

    def freeze_and_unfreeze(self) -> None:
        for parameter in self.bare.parameters():
            parameter.requires_grad_(self.random.random() < 0.6)

    def wrap_or_unwrap(self) -> None:
        inside = self.bare
        wrapped = [lambda: inside, lambda: Passing(inside), lambda: checkpoint_wrapper(inside)]
        wrapped += [lambda: compiled(inside), lambda: Passing(compiled(inside))]
        self.model = self.random.choice(wrapped)()

    def wrap_or_unwrap_a_part(self) -> None:
        part = self.random.choice(["conv", "norm", "hidden", "head"])
        inner = self.inside(part)
        wrapped = inner is not self.bare.get_submodule(part)
        setattr(self.bare, part, inner if wrapped else checkpoint_wrapper(inner))

    def replace_a_buffer(self) -> None:
        norm = self.inside("norm")
        self.replaced += map(weakref.ref, (self.bare.scale, norm.get_buffer("running_var")))
        self.bare.scale = self.bare.scale + 1.0
        norm.register_buffer("running_var", norm.get_buffer("running_var") * 0.5)

    def go_on_with_a_copy(self) -> None:
        self.left += map(weakref.ref, self.model.parameters())
        self.model = copy.deepcopy(self.model)
        self.bare = next(part for part in self.model.modules() if isinstance(part, Net))

    def as_at_the_start(self) -> None:
        """No wrappers, float32, everything trained; the values go on."""
        for part in ("conv", "norm", "hidden", "head"):
            setattr(self.bare, part, self.inside(part))
        self.model = self.bare
        # Through float64, so that all memory is other memory.
        self.model.double().float().to(memory_format=torch.contiguous_format)
        self.model.requires_grad_(True)
        self.save_and_load()
        self.update()
        self.update()

    def expect_the_replaced_gone(self) -> None:
        alive = [item() for item in self.replaced if item() is not None]
        assert not alive, f"{len(alive)} kept alive, the first a {type(alive[0]).__name__}"
        self.replaced.clear()

    def look(self) -> Look:
        self.as_at_the_start()
        torch._dynamo.reset()  # it keeps the backend of each wrapper, and of each copy of one
        gc.collect()
        alive = [item() for item in self.left if item() is not None]
        assert not alive, f"{len(alive)} kept alive, the first a {type(alive[0]).__name__}"
        self.left.clear()
        return what_is_alive()

    def expect_no_drift(self) -> None:
        """Each update rounds twice at most, and forgets a part of all that was before."""
        allowed = 2 * torch.finfo(torch.float32).eps * BOUND / LEAST_MOMENTUM
        for name, exact in self.reference.exact.items():
            assert exact.abs().max() < BOUND
            error = (self.reference.values[name].double() - exact).abs().max().item()
            assert error < allowed, f"{name!r} is {error} away"

    # What happens to the average.

    def swap(self) -> None:
        """An exception is raised inside; both sides are then as they were."""
        before = {name: tensor.clone() for name, tensor in tensors_of(self.model).items()}
        with pytest.raises(InsideError), self.averaged.swapped(self.model):
            self.reference.settle(self.model)
            for name, tensor in tensors_of(self.model).items():
                expected = self.reference.values[name].to(tensor.dtype)
                assert torch.equal(tensor, expected), f"{name!r} swapped in"
            raise InsideError
        for name, tensor in tensors_of(self.model).items():
            assert torch.equal(tensor, before[name]), f"{name!r} of the model after swapping"
        self.compare()

    def save_and_load(self) -> None:
        """Into a new average, which shares or doesn't share what is frozen now."""
        file = io.BytesIO()
        torch.save(self.averaged.state_dict(), file)
        file.seek(0)
        state = torch.load(file)
        share_frozen = self.random.random() < 0.7
        old, new = self.reference, Reference(self.model, share_frozen)
        self.replaced.append(weakref.ref(self.averaged))
        self.averaged = self.average(share_frozen)
        if self.kind is not AveragedWeights:
            # Wrappers have come and gone, and are in the names of a copied module.
            saved = {plain(name): tensor for name, tensor in state.items()}
            state = {name: saved[plain(name)] for name in self.averaged.state_dict()}
        before = {name: tensor.clone() for name, tensor in tensors_of(self.model).items()}
        missing, unexpected = self.averaged.load_state_dict(state, strict=False)
        left_out: set[str] = set()
        if self.kind is AveragedWeights:
            # It leaves out what it shares; that is frozen, and the new one may not share it.
            left_out = old.shared
            new.shared &= old.shared
        assert {plain(name) for name in missing} == left_out - new.shared
        assert not unexpected
        model = tensors_of(self.model)
        for name in new.values.keys() - left_out - {"cache"}:
            new.values[name] = contiguous_copy(old.values[name], new.values[name].dtype)
            if name in new.shared:  # until the next update, which shares it with the model again
                assert torch.equal(model[name], before[name]), f"{name!r} of the model"
        new.steps, new.exact = old.steps, old.exact
        self.reference = new
        self.compare()

    def copy_the_average(self) -> None:
        self.replaced.append(weakref.ref(self.averaged))
        self.averaged = copy.deepcopy(self.averaged)
        self.compare()

    def convert_the_average(self) -> None:
        """What is shared is the model's again at the next update."""
        dtype = self.random.choice([torch.float32, torch.float64])
        self.averaged.to(dtype)
        for name, value in self.reference.values.items():
            if name not in self.reference.shared and value.is_floating_point():
                self.reference.values[name] = value.to(dtype)

    def copy_to_the_model(self) -> None:
        self.averaged.copy_to(self.model)
        self.reference.settle(self.model)
        for name, tensor in tensors_of(self.model).items():
            expected = self.reference.values[name].to(tensor.dtype)
            assert torch.equal(tensor, expected), f"{name!r} copied"

    def copy_from_the_model(self) -> None:
        self.averaged.copy_from(self.model)
        self.reference.copy_from(self.model)
        self.compare()


def momentum_after(steps: int) -> float:
    return max(LEAST_MOMENTUM, GAMMA / (GAMMA + steps))


def schedule(steps: int) -> float:
    return momentum_after(steps)


@pytest.fixture
def only_counting() -> Iterator[None]:
    """Garbage isn't collected by itself, and what is there already is not looked at."""
    compiled(nn.Identity())  # imports the compiler
    gc.disable()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("only_counting")
@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_ten_thousand_updates_of_a_model_that_changes_in_every_way(
    kind: type[ExponentialMovingAverage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    run = Run(kind, seed=1)
    looks: list[Look] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in range(1, UPDATES + 1):
            # Every twentieth and the one after it are busy; no warning is due for that.
            if number % 20 < 2:
                for _ in range(run.random.randint(1, 3)):
                    run.happens(run.before)
                run.update()
                run.happens(run.after)
            else:
                if 503 <= number % LOOK_EVERY < 511:  # for this one is
                    run.replace_a_buffer()
                run.update()
                run.expect_the_replaced_gone()
            if number == LOOK_EVERY:
                run.copy_from_the_model()
            if number % LOOK_EVERY == 10:
                looks.append(run.look())
                run.expect_no_drift()
    assert run.happened.keys() == {event.__name__ for event in run.before + run.after}
    assert min(run.happened.values()) > 50
    messages = [str(warning.message) for warning in warned]
    walked = [message for message in messages if "walked again at every update" in message]
    by_torch = [message for message in messages if "updated by torch's foreach" in message]
    assert len(walked) == UPDATES // LOOK_EVERY  # once for each average that it happened to
    assert len(by_torch) == 1  # once for channels_last on one side only
    assert sorted(messages) == sorted(walked + by_torch)
    assert {warning.category for warning in warned} == {SlowPathWarning}
    half = looks[len(looks) // 2 :]
    assert {now.tensors for now in half} == {looks[1].tensors}
    assert {now.weak_references for now in half} == {looks[1].weak_references}
    assert half[-1].objects - half[0].objects < OBJECTS
    assert half[-1].resident - half[0].resident < RESIDENT


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_a_state_assigned_in_inference_mode_can_be_updated(
    kind: type[ExponentialMovingAverage],
) -> None:
    model = nn.Linear(2, 2)
    averaged = kind(model, momentum=0.5)
    averaged.update_parameters(model)
    with torch.inference_mode():
        state = {name: tensor + 1 for name, tensor in averaged.state_dict().items()}
        averaged.load_state_dict(state, assign=True)
    expected = torch.lerp(model.weight.detach() + 1, model.weight.detach(), 0.5)
    averaged.update_parameters(model)
    assert torch.equal(dict(averaged.module.named_parameters())["weight"], expected)
    assert averaged.steps.item() == 3
    averaged.copy_to(model)
