"""Processes whose averages differ under one name: a file would hold the first process's alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage
from ema_fused.engine.flat_shards import Cut, FlatShard
from ema_fused.saving import checkpoints
from ema_fused.saving.checkpoints import averaged_state_dict
from ema_fused.saving.export import export_safetensors
from ema_fused.saving.replicas import averages_in
from tests.ranks import Ranks
from tests.sharded_models import perceptron, spread


class WithExperts(nn.Module):
    """``router`` is the same everywhere; ``expert`` is each process's own, under one name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.router = nn.Linear(3, 3)
        self.expert = nn.Linear(3, 3, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(3)


def averaged_of(model: nn.Module) -> ExponentialMovingAverage:
    averaged = ExponentialMovingAverage(model, 0.25)
    averaged.update_parameters(model)
    return averaged


def refusal(function, *arguments, **options) -> str:  # type: ignore[no-untyped-def]
    try:
        function(*arguments, **options)
    except RuntimeError as error:
        return str(error)
    return ""


def experts(folder: str) -> list[str]:
    model = WithExperts()
    with torch.no_grad():
        model.expert.weight[0, 0] += dist.get_rank()
    averaged = averaged_of(model)
    path = Path(folder)
    state = {"step": 3, "averaged": averaged_state_dict(averaged, model)}
    found = [
        refusal(checkpoints.save, state, path / "saved"),
        refusal(checkpoints.save, {"one": averaged.state_dict()}, path / "saved"),
        refusal(export_safetensors, averaged.module.state_dict(), path / "exported"),
        str(sorted(p.name for p in path.iterdir())),
    ]
    dist.barrier()  # the other process may still be looking
    checkpoints.save(state, path / "saved", check_replicas=False)
    pytest.importorskip("safetensors")
    export_safetensors(averaged.module.state_dict(), path / "exported", check_replicas=False)
    return found


def test_experts_of_each_process_are_refused_with_their_names(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    for saved, of_state, exported, files in two_ranks.run(experts, str(tmp_path)):
        assert "'averaged.module.expert.weight' (processes 0, 1)" in saved
        assert "'one.module.expert.weight' (processes 0, 1)" in of_state
        assert "'expert.weight' (processes 0, 1)" in exported
        for message in (saved, of_state, exported):
            assert message.startswith("1 tensors that aren't sharded differ")
            assert "check_replicas=False" in message
            assert "router" not in message
        assert files == "[]"
    assert checkpoints.exists(tmp_path / "saved")
    assert (tmp_path / "exported" / "model.safetensors").exists()


def what_may_differ(folder: str) -> list[str]:
    """Statistics, integers, sharded tensors, names that only one process has, and other state."""
    rank = dist.get_rank()
    model = WithExperts()
    model.register_buffer("queue_at", torch.tensor(rank))
    model.norm.running_mean += rank
    if rank == 1:
        model.stage = nn.Linear(2, 2)
    averaged = averaged_of(model)
    sharded = spread(perceptron(), "fsdp2")
    of_sharded = AveragedWeights(sharded, 0.25)
    of_sharded.update_parameters(sharded)
    path = Path(folder)
    state = {
        "averaged": averaged_state_dict(averaged, model),
        "sharded": averaged_state_dict(of_sharded, sharded),
        "loss": torch.tensor(float(rank)),
    }
    checkpoints.save(state, path / "saved")
    names = [name for name, one in state["averaged"].items() if "stage" not in name]
    return [str(checkpoints.exists(path / "saved")), str(len(names) > 5)]


def test_what_processes_have_of_their_own_is_saved(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(what_may_differ, str(tmp_path)) == [["True", "True"]] * 2


def test_only_averages_are_compared() -> None:
    state = {
        "averaged": {"steps": torch.tensor(1), "module.weight": 1, "rounding_seed": 2},
        "model": {"module.weight": 3},
        "deep": {"er": {"steps": 0, "module.a.b": 4}},
    }
    assert averages_in(state) == {"averaged.module.weight": 1, "deep.er.module.a.b": 4}


def test_one_process_has_nothing_to_compare(tmp_path: Path) -> None:
    averaged = averaged_of(WithExperts())
    checkpoints.save({"averaged": averaged.state_dict()}, tmp_path / "saved")
    assert checkpoints.exists(tmp_path / "saved")


def pieces_of_groups(folder: str, difference: float) -> str:
    """Each process alone is a group that has cut the tensor, as experts' groups do."""
    rank = dist.get_rank()
    whole = torch.arange(6.0) + difference * rank
    shard = FlatShard(whole, (2, 3), Cut((rank,), 0))
    state = {"averaged": {"steps": torch.tensor(1), "module.expert": shard}}
    return refusal(checkpoints.save, state, Path(folder) / "saved")


def test_pieces_of_groups_must_be_equal(two_ranks: Ranks, tmp_path: Path) -> None:
    for message in two_ranks.run(pieces_of_groups, str(tmp_path), 1.0):
        assert "'averaged.module.expert[0:6]' (processes 0, 1)" in message
    assert not checkpoints.exists(tmp_path / "saved")
    assert two_ranks.run(pieces_of_groups, str(tmp_path), 0.0) == ["", ""]
    loaded = {"averaged": {"steps": torch.tensor(0), "module.expert": torch.zeros(2, 3)}}
    checkpoints.load(loaded, tmp_path / "saved")
    assert torch.equal(loaded["averaged"]["module.expert"], torch.arange(6.0).view(2, 3))
