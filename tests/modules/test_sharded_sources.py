"""Averages of what optimizers keep of models that are spread over processes (``source=``)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_fused import AveragedWeights
from ema_fused.engine.dtensors import local
from tests.modules.sharded_beside import differing
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread, train, whole, whole_weights


def of_master_weights() -> tuple[list[str], list[str]]:
    model = spread(perceptron().bfloat16(), "fsdp2")
    masters = {name: weight.detach().float() for name, weight in model.named_parameters()}
    averaged = AveragedWeights(model, 0.5, source=masters)
    averaged.update_parameters(model)
    before = {name: whole(master) for name, master in masters.items()}
    for master in masters.values():
        local(master).add_(1)
    averaged.update_parameters(model)
    expected = {name: before[name].lerp(whole(masters[name]), 0.5) for name in masters}
    found = {name: whole(averaged.weights[name]) for name in masters}
    averaged.copy_to(model)
    written = {name: whole(weight).float() for name, weight in model.named_parameters()}
    return differing(found, expected), differing(
        written, {name: tensor.bfloat16().float() for name, tensor in expected.items()}
    )


def test_sources_are_sharded_as_the_weights_are(two_ranks: Ranks) -> None:
    assert two_ranks.run(of_master_weights) == [([], [])] * 2


class CutMasters(torch.optim.Optimizer):
    """SGD on float32 copies of 16-bit weights, of which each process keeps a flat piece.

    As ColossalAI's LowLevelZeroOptimizer, whose map Open-Sora's average reads: by the weights'
    ``id``, and evened out by zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.map = {id(one): self._piece(one).float() for one in model.parameters()}

    @staticmethod
    def _piece(tensor: Tensor) -> Tensor:
        count = dist.get_world_size()
        flat = nn.functional.pad(tensor.detach().flatten(), (0, -tensor.numel() % count))
        return flat.chunk(count)[dist.get_rank()].clone()

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.map[id(parameter)].sub_(self._piece(parameter.grad).float(), alpha=1e-3)
            with torch.no_grad():
                parameter.copy_(self.whole(parameter))

    def whole(self, parameter: Tensor) -> Tensor:
        piece = self.map[id(parameter)]
        every = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
        dist.all_gather(every, piece)
        return torch.cat(every)[: parameter.numel()].view_as(parameter)

    def write(self, model: nn.Module) -> None:
        """As ``update_master_params``: from the weights."""
        for parameter in model.parameters():
            self.map[id(parameter)].copy_(self._piece(parameter))


def of_cut_masters() -> tuple[str, list[str]]:
    model = spread(perceptron().bfloat16(), "ddp")
    plain = model.module
    optimizer = CutMasters(model)
    try:
        pieces = {name: optimizer.map[id(one)] for name, one in plain.named_parameters()}
        AveragedWeights(plain, 0.25, source=pieces)
        said = ""
    except ValueError as error:
        said = str(error)

    def masters(of: nn.Module) -> dict[str, Tensor]:
        return {name: optimizer.whole(one) for name, one in of.named_parameters()}

    averaged = AveragedWeights(plain, 0.25, source=masters)
    expected: dict[str, Tensor] = {}
    for number in range(4):
        train(model, optimizer, number, "ddp")
        averaged.update_parameters(plain)
        for name, master in masters(plain).items():
            expected.setdefault(name, master).lerp_(master, 0.25)
    found = {name: averaged.weights[name] for name in expected}
    problems = differing(found, expected)
    # Rounded to the weights' 16 bits they would be others.
    rounded = {name: one.bfloat16().float() for name, one in expected.items()}
    assert "first.weight" in differing(rounded, expected)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        averaged.copy_to(plain)
    assert any("copy_to() writes the averages into the weights" in str(w.message) for w in warned)
    optimizer.write(plain)
    own = {name: one for name, one in whole_weights(model).items() if name in expected}
    return said, problems + differing({name: one.float() for name, one in own.items()}, rounded)


def test_pieces_that_an_optimizer_cuts_are_refused_and_taken_gathered(two_ranks: Ranks) -> None:
    for said, problems in two_ranks.run(of_cut_masters):
        assert "'first.weight' has shape (46,), and (13, 7) in the model" in said
        assert problems == []
