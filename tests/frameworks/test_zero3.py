"""Averages of models that DeepSpeed's ZeRO-3 partitions, beside those of the recorded pieces."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused import (
    AveragedWeights,
    ExponentialMovingAverage,
    LatestWeightAverage,
    PowerFunctionEMA,
)
from ema_fused.engine.dtensors import local
from ema_fused.saving import averaged_state_dict, load_averaged_state_dict
from tests.frameworks.zero3_models import (
    alike,
    bits_of,
    deepspeed,
    differing,
    masters,
    network,
    outputs,
    partitioned,
    train,
    whole_weights,
)
from tests.networks import differences
from tests.ranks import Ranks

pytest.importorskip("deepspeed", reason="DeepSpeed isn't installed")

FROZEN = {"frozen.weight", "frozen.bias"}


class Beside:
    """An average of a partitioned model, and one of its recorded pieces as plain parameters."""

    def __init__(self, engine: Any, **options: Any) -> None:
        self.engine = engine
        self.averaged = AveragedWeights(engine.module, **options)
        self.recorded = nn.ParameterList(masters(engine).values())
        self.expected = ExponentialMovingAverage(self.recorded, **options)

    def step(self, number: int) -> None:
        train(self.engine, number)
        self.averaged.update_parameters(self.engine.module)
        with torch.no_grad():
            for one, piece in zip(self.recorded, masters(self.engine).values(), strict=True):
                one.copy_(piece)
        self.expected.update_parameters(self.recorded)

    def differing(self) -> list[str]:
        found = [(name, local(one)) for name, one in self.averaged.module.named_parameters()]
        expected = self.expected.module.parameters()
        return [
            name
            for (name, one), other in zip(found, expected, strict=True)
            if one.dtype != other.dtype or not torch.equal(one, other)
        ]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "double": {"averaged_dtype": torch.float64},
    "every": {"every": 2},
    "foreach": {"backend": "foreach"},
}


def averages(bf16: bool) -> dict[str, list[str]]:
    engine = partitioned(network(), bf16=bf16, sub_group_size=600)
    every = {name: Beside(engine, momentum=0.1, **options) for name, options in OPTIONS.items()}
    for beside in every.values():
        beside.averaged.update_parameters(engine.module)
        beside.expected.update_parameters(beside.recorded)
    for number in range(4):
        train(engine, number)
        for beside in every.values():
            beside.step(number)
    return {name: beside.differing() for name, beside in every.items()}


@pytest.mark.parametrize("bf16", [True, False])
def test_averages_are_those_of_the_float32_pieces(deepspeed_ranks: Ranks, bf16: bool) -> None:
    for found in deepspeed_ranks.run(averages, bf16):
        assert found == {name: [] for name in OPTIONS}


def latest_checkpoints(bf16: bool) -> dict[str, list[str]]:
    engine = partitioned(network(), bf16=bf16)
    averaged = LatestWeightAverage(engine.module, 2)
    resumed = LatestWeightAverage(engine.module, 2)
    recorded = []
    for number in range(5):
        train(engine, number)
        for one in (averaged, resumed) if number == 4 else (averaged,):
            one.update_parameters(engine.module)
        recorded.append(masters(engine))
        if number == 3:
            saved = averaged_state_dict(averaged, engine.module)
            load_averaged_state_dict(resumed, engine.module, saved)
    expected = {
        name: ((recorded[-2][name].double() + piece.double()) / 2).to(piece.dtype)
        for name, piece in recorded[-1].items()
    }
    found = {}
    for label, one in (("averaged", averaged), ("resumed", resumed)):
        held = {name: local(tensor) for name, tensor in one.module.named_parameters()}
        found[label] = differences(held, {name: expected[name] for name in held})
    before = bits_of(engine)
    with averaged.swapped(engine.module):
        inside = bits_of(engine)
    found["swapped"] = [] if differences(inside, before) else ["nothing was swapped"]
    found["swapped back"] = differences(bits_of(engine), before)
    return found


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
def test_the_latest_checkpoints_are_float32_pieces(deepspeed_ranks: Ranks, bf16: bool) -> None:
    for found in deepspeed_ranks.run(latest_checkpoints, bf16):
        assert {label: names for label, names in found.items() if names} == {}


def what_is_sent() -> tuple[int, int]:
    engine = partitioned(network())
    averaged = AveragedWeights(engine.module, 0.1)
    averaged.update_parameters(engine.module)
    train(engine, 0)
    with CommDebugMode() as updating:
        averaged.update_parameters(engine.module)
    with CommDebugMode() as gathering:
        averaged.weights["first.weight"].full_tensor()  # type: ignore[attr-defined]
    assert int(averaged.steps) == 2
    return updating.get_total_counts(), gathering.get_total_counts()


def test_an_update_sends_nothing(deepspeed_ranks: Ranks) -> None:
    assert deepspeed_ranks.run(what_is_sent) == [(0, 1)] * 2


def swaps(bf16: bool, options: dict[str, Any]) -> None:
    engine = partitioned(network(), bf16=bf16)
    averaged = AveragedWeights(engine.module, 0.3, **options)
    for number in range(3):
        train(engine, number)
        averaged.update_parameters(engine.module)
    assert statuses(engine) == {"AVAILABLE", "NOT_AVAILABLE"}  # what persists is gathered
    own, said = bits_of(engine), outputs(engine)
    assert statuses(engine) == {"AVAILABLE"}  # and so is what the last pass has left
    plain = network()
    plain.load_state_dict(whole_weights(averaged))
    expected = outputs(plain.bfloat16() if bf16 else plain)
    assert not alike(expected, said)
    for _ in range(2):
        with averaged.swapped(engine.module):
            assert alike(outputs(engine), expected)
        assert not differing(bits_of(engine), own)
        assert alike(outputs(engine), said)
    with averaged.swapped(engine.module), gathered(engine):
        assert torch.equal(engine.module.last.weight, plain.last.weight)
    with pytest.raises(ZeroDivisionError), averaged.swapped(engine.module):
        broken = engine.module.last.register_forward_pre_hook(lambda *_: 1 / 0)
        outputs(engine)
    broken.remove()
    assert not differing(bits_of(engine), own)
    assert alike(outputs(engine), said)
    train(engine, 4)


def statuses(engine: Any) -> set[str]:
    return {parameter.ds_status.name for parameter in engine.module.parameters()}


def gathered(engine: Any) -> Any:
    return deepspeed().zero.GatheredParameters(list(engine.module.parameters()))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("options", [{}, {"averaged_dtype": torch.bfloat16}, {"offload": "cpu"}])
def test_averages_swapped_in_are_what_is_gathered(
    deepspeed_ranks: Ranks, bf16: bool, options: dict[str, Any]
) -> None:
    deepspeed_ranks.run(swaps, bf16, options)


def copies(bf16: bool) -> None:
    engine = partitioned(network(), bf16=bf16)
    averaged = AveragedWeights(engine.module, 0.3)
    for number in range(3):
        train(engine, number)
        averaged.update_parameters(engine.module)
    averaged.copy_to(engine.module)
    pieces = {name: local(one) for name, one in averaged.module.named_parameters()}
    assert not differing(masters(engine), pieces)
    plain = network()
    plain.load_state_dict(whole_weights(averaged))
    assert alike(outputs(engine), outputs(plain.bfloat16() if bf16 else plain))
    train(engine, 4)
    trained = {name for name, piece in pieces.items() if piece.numel()} - FROZEN
    assert set(differing(masters(engine), pieces)) == trained


@pytest.mark.parametrize("bf16", [True, False])
def test_training_goes_on_from_averages_copied_in(deepspeed_ranks: Ranks, bf16: bool) -> None:
    deepspeed_ranks.run(copies, bf16)


def of_the_engine() -> None:
    engine = partitioned(network())
    averaged = AveragedWeights(engine, 0.3, share_frozen=True)
    assert averaged.shared_names == FROZEN
    assert list(averaged.weights) == list(network().state_dict())
    for number in range(2):
        train(engine, number)
        averaged.update_parameters(engine)
    first, tied = averaged.module.first, averaged.module.tied
    assert first.weight is tied.weight
    own = bits_of(engine)
    with averaged.swapped(engine):
        inside = bits_of(engine)
    pieces = {f"{name} piece" for name, _ in engine.module.named_parameters()}
    assert set(differing(inside, own)) <= pieces - {f"{name} piece" for name in FROZEN}
    assert not differing(bits_of(engine), own)


def test_the_engine_itself_is_a_wrapper_and_frozen_pieces_are_shared(
    deepspeed_ranks: Ranks,
) -> None:
    deepspeed_ranks.run(of_the_engine)


def refusals() -> list[str]:
    model = network()
    before = AveragedWeights(model), ExponentialMovingAverage(model)
    engine = partitioned(model)
    averaged = AveragedWeights(engine.module)
    attempts: list[Callable[[], object]] = [
        lambda: ExponentialMovingAverage(engine.module),
        lambda: before[0].update_parameters(engine.module),
        lambda: before[1].update_parameters(engine.module),
        lambda: AveragedWeights(engine.module, skip_nonfinite=True),
        lambda: averaged.weights["first.weight"] + 1,
        lambda: AveragedWeights(engine.module, source={}),
        lambda: PowerFunctionEMA(engine.module),
        lambda: AveragedWeights(quantized(engine.module)),
        lambda: AveragedWeights(on_a_disk(engine).module),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as found:
            attempt()
        messages.append(f"{type(found.value).__name__}: {found.value}")
    assert int(before[0].steps) == 0
    return messages


def quantized(model: nn.Module) -> nn.Module:
    """As DeepSpeed marks it; its quantizer needs a GPU."""
    model.frozen.weight.ds_tensor.ds_quant_scale = torch.ones(1)
    return model


def on_a_disk(engine: Any) -> Any:
    """As its swapper leaves what is on a disk, which needs a library of the system's."""
    del engine.module.frozen.weight.ds_tensor.ds_quant_scale
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        flat.data = flat.data[:0]
    return engine


def test_what_cannot_be_is_refused_with_what_to_do(deepspeed_ranks: Ranks) -> None:
    made_before = r"TypeError: 'scale' is cut into flat pieces in the model .*deepspeed.initialize"
    expected = [
        r"TypeError: 'scale' is partitioned by DeepSpeed ZeRO-3.*AveragedWeights\(engine.module",
        made_before,
        made_before,
        r"ValueError: skip_nonfinite=True with ZeRO-3.*was_step_applied",
        r"NotImplementedError: .* of a FlatShard.*to_local\(\).*full_tensor\(",
        r"ValueError: source= with ZeRO-3.*leave it out",
        r"TypeError: DeepSpeed ZeRO-3 has partitioned the model, and snapshots",
        r"TypeError: 'frozen.weight' is quantized by DeepSpeed ZeRO-3",
        r"TypeError: 'scale' is kept on a disk by DeepSpeed ZeRO-3.*device: cpu",
    ]
    for found in deepspeed_ranks.run(refusals):
        for message, pattern in zip(found, expected, strict=True):
            assert re.match(pattern, message, re.DOTALL), message


LEFT_OUT = ["scale", "norm.weight", "norm.bias", "frozen.weight", "frozen.bias"]


def left_out(bf16: bool) -> dict[str, list[str]]:
    engine = partitioned(network(), bf16=bf16)
    of_all = AveragedWeights(engine.module, 0.3)
    averaged = AveragedWeights(engine.module, 0.3, include="^(first|tied|last)")
    for number in range(3):
        train(engine, number)
        with CommDebugMode() as communication:
            averaged.update_parameters(engine.module)
        assert communication.get_total_counts() == 0
        of_all.update_parameters(engine.module)
    problems = {}
    weights, expected = averaged.weights, of_all.weights
    chosen = [name for name, _ in averaged.module.named_parameters() if name not in LEFT_OUT]
    problems["averages"] = [
        name for name in chosen if not torch.equal(local(weights[name]), local(expected[name]))
    ]
    pieces = dict(engine.module.named_parameters())
    problems["elsewhere"] = [
        name
        for name in LEFT_OUT
        if local(weights[name]).numel()
        and local(weights[name]).data_ptr() != pieces[name].ds_tensor.data_ptr()
    ]
    before = bits_of(engine)
    with averaged.swapped(engine.module):
        inside = bits_of(engine)
    swapped = {name.split()[0] for name in differing(inside, before)}
    problems["swapped"] = sorted(swapped & set(LEFT_OUT))
    assert "first.weight" in swapped
    problems["afterwards"] = differing(bits_of(engine), before)
    averaged.copy_to(engine.module)
    written = {name.split()[0] for name in differing(bits_of(engine), before)}
    problems["written"] = sorted(written & set(LEFT_OUT))
    assert "first.weight" in written
    return problems | {"left_out": averaged.left_out_names}


@pytest.mark.parametrize("bf16", [True, False])
def test_what_is_left_out_is_in_the_pieces_that_passes_gather(
    deepspeed_ranks: Ranks, bf16: bool
) -> None:
    for problems in deepspeed_ranks.run(left_out, bf16):
        assert problems.pop("left_out") == LEFT_OUT
        assert not any(problems.values()), problems
