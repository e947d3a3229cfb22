"""Averages with DeepSpeed's other ways: offloaded, without an optimizer, ZeRO-1 and ZeRO-2."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from ema_fused import AveragedWeights, ExponentialMovingAverage, SlowPathWarning, attach
from ema_fused.engine.dtensors import local
from tests.frameworks.zero3_models import (
    Network,
    alike,
    bits_of,
    configuration,
    deepspeed,
    differing,
    masters,
    network,
    outputs,
    partitioned,
    train,
    whole_weights,
)
from tests.ranks import Ranks

pytest.importorskip("deepspeed", reason="DeepSpeed isn't installed")

HOST = {"device": "cpu"}
WAYS: dict[str, dict[str, Any]] = {
    "offloaded optimizer": {"offload_optimizer": HOST},
    "offloaded parameters": {"offload_optimizer": HOST, "offload_param": HOST},
    "second pieces inside a node": {"zero_hpz_partition_size": 2},
}


def averages(options: dict[str, Any]) -> None:
    engine = partitioned(network(), **options)
    averaged = AveragedWeights(engine.module, 0.3)
    expected: dict[str, Tensor] = {}
    for number in range(3):
        train(engine, number)
        averaged.update_parameters(engine.module)
        for name, piece in masters(engine).items():
            expected.setdefault(name, piece).lerp_(piece, 0.3)
    assert not differing(pieces_of(averaged), expected)
    own, said, wanted = bits_of(engine), outputs(engine), outputs(plain_with(averaged))
    with averaged.swapped(engine.module):
        assert alike(outputs(engine), wanted)
    assert not differing(bits_of(engine), own)
    assert alike(outputs(engine), said)
    # DeepSpeed gives second pieces to all later engines of a process, and loads no checkpoint into
    # them.
    deepspeed().utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def pieces_of(averaged: AveragedWeights) -> dict[str, Tensor]:
    return {name: local(one) for name, one in averaged.module.named_parameters()}


def plain_with(averaged: AveragedWeights) -> nn.Module:
    plain = network()
    plain.load_state_dict(whole_weights(averaged))
    return plain.bfloat16()


@pytest.mark.parametrize("way", WAYS)
def test_averages_are_those_of_the_pieces_wherever_they_are(
    deepspeed_ranks: Ranks, way: str
) -> None:
    deepspeed_ranks.run(averages, WAYS[way])


def made_before() -> None:
    with deepspeed().zero.Init(config_dict_or_path=configuration()):
        model = network()
    averaged = AveragedWeights(model, 0.3, averaged_dtype=torch.float32)
    averaged.update_parameters(model)
    before = pieces_of(averaged)["first.weight"].clone()
    engine = partitioned(model)
    train(engine, 0)
    averaged.update_parameters(model)
    master = masters(engine)["first.weight"]
    assert torch.equal(pieces_of(averaged)["first.weight"], before.lerp(master, 0.3))


def test_an_optimizer_that_comes_later_is_noticed(deepspeed_ranks: Ranks) -> None:
    deepspeed_ranks.run(made_before)


def moved() -> None:
    engine = partitioned(network())
    averaged = AveragedWeights(engine.module, 0.3)
    for number in range(2):
        train(engine, number)
        averaged.update_parameters(engine.module)
    before = {name: piece.clone() for name, piece in pieces_of(averaged).items()}
    # As offload_states() and reload_states() do it.
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        flat.data = flat.data * 2
    averaged.update_parameters(engine.module)
    for name, piece in masters(engine).items():
        assert torch.equal(pieces_of(averaged)[name], before[name].lerp(piece, 0.3)), name
    # Frozen weights aren't the optimizer's.
    frozen = engine.module.frozen.weight
    replaced = frozen.ds_tensor.clone().mul_(2)
    vars(replaced).update(vars(frozen.ds_tensor))
    frozen.ds_tensor = replaced
    averaged.update_parameters(engine.module)
    average = before["frozen.weight"].lerp(replaced, 0.3)
    assert torch.equal(pieces_of(averaged)["frozen.weight"], average)


def test_pieces_that_have_moved_are_noticed(deepspeed_ranks: Ranks) -> None:
    deepspeed_ranks.run(moved)


def without_an_optimizer() -> None:
    engine = partitioned(network(), trains=False)
    averaged = AveragedWeights(engine.module, averaged_dtype=torch.float32)
    averaged.update_parameters(engine.module)
    for parameter in averaged.module.parameters():
        local(parameter).mul_(2)
    said, wanted = outputs(engine), outputs(plain_with(averaged))
    with averaged.swapped(engine.module):
        assert alike(outputs(engine), wanted)
    assert alike(outputs(engine), said)


def test_weights_that_no_optimizer_has_are_swapped_too(deepspeed_ranks: Ranks) -> None:
    deepspeed_ranks.run(without_an_optimizer)


def copied() -> None:
    engine = partitioned(network())
    averaged = AveragedWeights(engine.module, 0.3)
    averaged.update_parameters(engine.module)
    other = copy.deepcopy(averaged)
    for number in range(2):
        train(engine, number)
        averaged.update_parameters(engine.module)
        other.update_parameters(engine.module)
    assert other.adopt(engine.module).kept == len(network().state_dict())
    assert not differing(whole_weights(other), whole_weights(averaged))


def test_averages_are_copied_and_adopt_the_model(deepspeed_ranks: Ranks) -> None:
    deepspeed_ranks.run(copied)


def whole_on_each_rank(stage: int) -> tuple[dict[str, Tensor], list[str]]:
    engine = partitioned(network(), stage=stage, accumulation=2)
    averaged = ExponentialMovingAverage(engine, 0.3, averaged_dtype=torch.float32)
    assert type(averaged.module) is Network
    expected: dict[str, Tensor] = {}
    messages = []
    for optimizer in (engine, engine.optimizer, engine.optimizer.optimizer):
        with pytest.raises(TypeError) as found:
            attach(optimizer, engine.module, averaged)
        messages.append(str(found.value))
    for number in range(6):
        train(engine, number)
        assert engine.was_step_applied() == (number % 2 == 1)
        if engine.was_step_applied():
            averaged.update_parameters(engine.module)
            for name, weight in engine.module.named_parameters():
                expected.setdefault(name, weight.detach().float()).lerp_(weight.float(), 0.3)
    assert int(averaged.steps) == 3
    assert not differing(dict(averaged.module.named_parameters()), expected)
    return {name: tensor.clone() for name, tensor in averaged.module.state_dict().items()}, messages


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_have_whole_weights(deepspeed_ranks: Ranks, stage: int) -> None:
    (first, messages), (second, _) = deepspeed_ranks.run(whole_on_each_rank, stage)
    assert not differing(first, second)
    for message in messages:
        assert re.search(r"engine\.step\(\).*was_step_applied\(\).*engine\.module", message)


def whole_masters(model: nn.Module) -> dict[str, Tensor]:
    """The float32 copies that ZeRO-1 and ZeRO-2 spread over the processes, gathered."""
    get = deepspeed().utils.safe_get_full_fp32_param
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return {name: get(parameter) for name, parameter in trained.items()}


def of_gathered_masters(stage: int) -> list[str]:
    """The averages are made of what the optimizer steps on; the engine has 16-bit weights."""
    engine = partitioned(network(), stage=stage)
    averaged = AveragedWeights(engine.module, 0.1, source=whole_masters, every=2)
    asked = []
    averaged_every_step = AveragedWeights(engine.module, 0.1, source=whole_masters)
    expected: dict[str, Tensor] = {}
    for number in range(6):
        train(engine, number)
        with CommDebugMode() as communication:
            averaged.update_parameters(engine.module)
        asked.append(communication.get_total_counts() > 0)
        averaged_every_step.update_parameters(engine.module)
        for name, master in whole_masters(engine.module).items():
            expected.setdefault(name, master).lerp_(master, 0.1)
    weights, own = averaged_every_step.weights, dict(engine.module.named_parameters())
    assert {weights[name].dtype for name in expected} == {torch.float32}
    assert not differing({name: weights[name] for name in expected}, expected)
    assert differing(expected, {name: own[name].float() for name in expected})
    before = {name: one.detach().clone() for name, one in own.items()}
    with averaged_every_step.swapped(engine.module):
        assert not differing(
            {name: own[name].detach() for name in expected},
            {name: one.bfloat16() for name, one in expected.items()},
        )
    assert not differing({name: one.detach() for name, one in own.items()}, before)
    return asked


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_function_that_gathers_masters_is_a_source(deepspeed_ranks: Ranks, stage: int) -> None:
    for asked in deepspeed_ranks.run(of_gathered_masters, stage):
        assert asked == [True, False] * 3


def gone_on_from_averages(stage: int, bf16: bool, has_source: bool) -> str:
    engine = partitioned(network(), stage=stage, bf16=bf16)
    options: dict[str, Any] = {"source": whole_masters} if has_source else {}
    averaged = AveragedWeights(engine.module, 0.1, averaged_dtype=torch.float32, **options)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in range(8):
            train(engine, number)
            averaged.update_parameters(engine.module)
        averaged.copy_to(engine.module)
    masters_now = whole_masters(engine.module)
    averages = {name: averaged.weights[name].clone() for name in masters_now}
    assert not differing(masters_now, averages)
    weights = {name: p.detach() for name, p in engine.module.named_parameters()}
    rounded = {name: one.to(weights[name].dtype) for name, one in averages.items()}
    assert not differing({name: weights[name].clone() for name in averages}, rounded)
    train(engine, 8)
    for name, master in whole_masters(engine.module).items():
        assert (master - averages[name]).abs().max() <= 0.02, name  # a step of AdamW's is 0.01
    said = [str(one.message) for one in warned if issubclass(one.category, SlowPathWarning)]
    assert not any("copy_to()" in str(one.message) for one in warned)
    return " ".join(said)


@pytest.mark.parametrize("has_source", [False, True])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_training_goes_on_from_averages_copied_into_zero_1_and_2(
    deepspeed_ranks: Ranks, stage: int, bf16: bool, has_source: bool
) -> None:
    for said in deepspeed_ranks.run(gone_on_from_averages, stage, bf16, has_source):
        assert ("source= gives 'scale' in other memory each time" in said) is has_source


def attached() -> str:
    engine = partitioned(network())
    with pytest.raises(TypeError) as found:
        attach(engine, engine.module, AveragedWeights(engine.module))
    return str(found.value)


def test_attach_says_what_to_do_with_an_engine(deepspeed_ranks: Ranks) -> None:
    for message in deepspeed_ranks.run(attached):
        assert message.startswith("DeepSpeed's engine makes the steps of this model")


def dropped() -> None:
    engine = partitioned(network())
    weight = engine.module.last.weight
    with deepspeed().zero.GatheredParameters([weight]):
        before = weight.detach().clone()
        weight.data.add_(1)
    with deepspeed().zero.GatheredParameters([weight]):
        assert torch.equal(weight, before)
    averaged = AveragedWeights(engine.module)
    averaged.update_parameters(engine.module)
    for parameter in averaged.module.parameters():
        local(parameter).add_(1)
    averaged.copy_to(engine.module)
    with deepspeed().zero.GatheredParameters([weight]):
        assert torch.equal(weight, whole_weights(averaged)["last.weight"].bfloat16())


def test_writes_that_zero_3_drops(deepspeed_ranks: Ranks) -> None:
    """Of gathered weights, without a modifier_rank; ours go to the pieces."""
    deepspeed_ranks.run(dropped)
