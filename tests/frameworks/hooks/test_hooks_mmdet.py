"""``MeanTeacherHook`` beside mmdet's: equal to the bit, but for what is better."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ema_fused.hooks.mmdet import MeanTeacherHook
from tests import processes
from tests.frameworks.hooks import mmengine_runs as runs
from tests.frameworks.hooks.ema_hooks import QUIET
from tests.frameworks.originals import original
from tests.networks import Cached, Tied, conv_net, differences, generator, snapshot, train

pytestmark = QUIET

Theirs = original("mmdet==3.3.0", "mmdet.engine.hooks.mean_teacher_hook").MeanTeacherHook
HOOKS = [Theirs, "FusedMeanTeacherHook"]  # ours by the name that it has in mmengine's HOOKS
COUNTER = "teacher.norm.num_batches_tracked"


class SemiSupervised(BaseModel):  # type: ignore[misc]
    """A student that is also held to what its teacher says of mirrored images."""

    def __init__(self) -> None:
        super().__init__()
        self.student = runs.Net()
        self.teacher = runs.Net().requires_grad_(False)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        self.teacher.eval()  # batch norm of a teacher counts nothing
        taught = torch.stack(self.teacher(images.flip(-1), labels, mode="predict"))
        if mode == "loss":
            logits = torch.stack(self.student(images, labels, mode="predict"))
            supervised = nn.functional.cross_entropy(logits, labels)
            return {"loss": supervised + nn.functional.mse_loss(logits, taught)}
        return [*self.student(images, labels, mode="predict"), *taught]


def trained(hook: Any, folder: Path, **arguments: Any) -> runs.Run:
    """A run with a hook of this type; with arguments of the hook and of the harness."""
    own = {name: arguments.pop(name) for name in ("interval", "skip_buffer") if name in arguments}
    config = {"type": hook, "momentum": 0.05, **own}
    return runs.trained(config, folder, model=SemiSupervised, **arguments)


def without_counters(found: dict[str, Any]) -> dict[str, Any]:
    """Without the teacher's integer buffer, which the original leaves where it was."""
    for part in [found["model"], *(found[name]["state_dict"] for name in found if ".pth" in name)]:
        del part[COUNTER]
    return found


def test_a_training_is_equal_to_the_bit(tmp_path: Path) -> None:
    long = {"epochs": 24, "val_interval": 6, "save_interval": 6}
    their, our = (
        trained(hook, tmp_path / str(number), **long) for number, hook in enumerate(HOOKS)
    )
    assert type(our.hook(MeanTeacherHook)) is MeanTeacherHook
    assert our.runner.iter == 120
    assert len(our.metrics) == 4
    found = our.everything()
    assert runs.differences(found, their.everything()) == []
    weights = {name: found["model"][f"{name}.head.weight"] for name in ("teacher", "student")}
    assert 0.001 < (weights["teacher"] - weights["student"]).abs().max() < 1


@pytest.mark.parametrize("loop", ["epochs", "iterations"])
@pytest.mark.parametrize("skip_buffer", [True, False], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("interval", [1, 3])
def test_intervals_buffers_and_loops_are_equal_to_the_bit(
    interval: int, skip_buffer: bool, loop: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"interval": interval, "skip_buffer": skip_buffer}
    if loop == "epochs":
        arguments |= {"epochs": 4}
    else:
        arguments |= {"iters": 20, "val_interval": 7, "save_interval": 5}
    their, our = (
        trained(hook, tmp_path / str(number), **arguments) for number, hook in enumerate(HOOKS)
    )
    found, expected = our.everything(), their.everything()
    counted, batches = found["model"][COUNTER], our.model.student.norm.num_batches_tracked
    assert expected["model"][COUNTER] == 0
    assert batches == 20
    # As of the last update, where buffers are to follow.
    assert counted == (0 if skip_buffer else 20 if interval == 1 else 18)
    assert runs.differences(without_counters(found), without_counters(expected)) == []
    mean = found["model"]["teacher.norm.running_mean"]
    assert bool(mean.eq(0).all()) is skip_buffer


def test_a_run_resumed_in_a_new_process_is_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trained("FusedMeanTeacherHook", tmp_path / "whole", epochs=4, skip_buffer=False)
    code = """
import sys
from pathlib import Path
from tests.frameworks.hooks import test_hooks_mmdet as here

here.trained(
    "FusedMeanTeacherHook", Path(sys.argv[1]), epochs=4, skip_buffer=False,
    load_from=Path(sys.argv[2]), resume=True,
)
"""
    processes.run_fork(
        "mmengine.runner", "-c", code, tmp_path / "rest", whole.folder / "epoch_2.pth"
    )
    runs.assert_same_rest(tmp_path / "rest", whole.folder)


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "loaded"])
@pytest.mark.parametrize("saved_by", ["original", "ours"])
def test_checkpoints_go_both_ways(saved_by: str, resume: bool, tmp_path: Path) -> None:
    """A resumed teacher goes on as it was; one that is only loaded is set to its student again."""
    first = trained(HOOKS[saved_by == "ours"], tmp_path / "first", epochs=2)
    rest = {"epochs": 4, "load_from": first.folder / "epoch_2.pth", "resume": resume}
    their, our = (trained(hook, tmp_path / f"{hook}", **rest) for hook in HOOKS)
    assert our.runner.iter == 20
    assert runs.differences(our.everything(), their.everything()) == []


@pytest.mark.parametrize("iteration", [0, 1, 500])
def test_the_teacher_is_set_to_the_student_where_a_training_begins_and_nowhere_else(
    iteration: int,
) -> None:
    for kind in (Theirs, MeanTeacherHook):
        model = two_networks(conv_net)
        before = snapshot(model.teacher)
        kind().before_train(runner_of(model, iteration))
        expected = snapshot(model.student) if iteration == 0 else before
        for name, parameter in model.teacher.named_parameters():
            assert torch.equal(parameter, expected[name])


_RANK = """
import json, os, sys
from pathlib import Path
import torch
from tests.frameworks.hooks.ema_hooks import QUIET
from mmengine.model import MMDistributedDataParallel
from tests.frameworks.hooks import mmengine_runs as runs
from tests.frameworks.hooks import test_hooks_mmdet as here

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
os.environ["LOCAL_RANK"] = str(rank)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
)
wrapped = {"cfg": {"model_wrapper_cfg": {"device_ids": None}}}  # a CPU has none
their, our = (
    here.trained(hook, folder / str(i), epochs=3, launcher="pytorch", **wrapped)
    for i, hook in enumerate(here.HOOKS)
)
torch.distributed.barrier()
print(json.dumps({
    "wrapped": isinstance(our.runner.model, MMDistributedDataParallel),
    "iterations": our.runner.iter,
    "differences": runs.differences(our.everything(), their.everything()),
    "teacher": our.model.teacher.head.weight.tolist(),
}))
"""


def test_a_wrapped_model_in_two_processes_is_equal_to_the_bit(tmp_path: Path) -> None:
    ranks = [processes.fork("mmengine.runner", "-c", _RANK, tmp_path, rank) for rank in range(2)]
    told = [json.loads(text.splitlines()[-1]) for text in processes.finish_group(ranks)]
    for rank in told:
        assert rank["wrapped"]
        assert rank["iterations"] == 9  # 3 batches an epoch for each
        assert rank["differences"] == []
    assert told[0]["teacher"] == told[1]["teacher"]


# The hook by itself.


def two_networks(make: Callable[..., nn.Module]) -> Any:
    """A model whose student and teacher are made by ``make``, with different values."""
    torch.manual_seed(4)
    model = nn.Module()
    model.student, model.teacher = make(), make()
    random = generator(5)
    for network in (model.student, model.teacher):
        train(network, random)
    return model


def runner_of(model: nn.Module, iteration: int = 0) -> Any:
    """All that the hook asks a runner for."""
    return SimpleNamespace(model=model, iter=iteration)


def iterate(hook: Any, model: Any, steps: int, start: int = 0) -> None:
    """Trains the student, and calls the hook after each iteration."""
    random = generator(start)
    for iteration in range(start, start + steps):
        train(model.student, random)
        hook.after_train_iter(runner_of(model, iteration), 0)


def test_arguments_have_the_original_s_order_and_defaults() -> None:
    for arguments in ([], [0.3, 4, False]):
        assert {**vars(Theirs(*arguments)), "_pairing": None} == vars(MeanTeacherHook(*arguments))


def test_the_momentum_may_be_changed_while_it_trains() -> None:
    models = [two_networks(conv_net), two_networks(conv_net)]
    for hook, model in zip([Theirs(0.1, 2), MeanTeacherHook(0.1, 2)], models, strict=True):
        iterate(hook, model, 3)
        hook.momentum, hook.interval, hook.skip_buffers = 0.4, 1, False
        iterate(hook, model, 3, start=3)
        model.teacher.norm.num_batches_tracked.zero_()  # the original never touches it
    assert differences(*map(snapshot, models)) == []


def test_going_back_through_a_teacher_that_was_updated_is_refused() -> None:
    model, hook = two_networks(conv_net), MeanTeacherHook(0.1)
    images = torch.rand(2, 1, 6, 6, requires_grad=True)
    iterate(hook, model, 1)
    for step in range(1, 3):
        loss = model.teacher.eval()(images).square().sum()
        iterate(hook, model, 1, start=step)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def replace_parameter(layer: Any) -> None:
    layer.bias = nn.Parameter(torch.ones_like(layer.bias))


def replace_memory(layer: Any) -> None:
    layer.bias.data = torch.ones_like(layer.bias)


REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "a layer": lambda model: setattr(model.student, "head", nn.Linear(67, 31)),
    "a parameter of the student": lambda model: replace_parameter(model.student.head),
    "a parameter of the teacher": lambda model: replace_parameter(model.teacher.head),
    "memory of the student": lambda model: replace_memory(model.student.head),
    "memory of the teacher": lambda model: replace_memory(model.teacher.head),
    "the student": lambda model: setattr(model, "student", conv_net(seed=8)),
    "the teacher": lambda model: setattr(model, "teacher", conv_net(seed=8)),
    "the dtype of both": lambda model: model.double(),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_what_is_replaced_is_followed(what: str) -> None:
    models = []
    for hook in (Theirs(0.1), MeanTeacherHook(0.1)):
        model = two_networks(conv_net)
        iterate(hook, model, 3)
        torch.manual_seed(0)
        REPLACEMENTS[what](model)
        iterate(hook, model, 3)
        models.append(model)
    assert differences(*map(snapshot, models)) == []


@pytest.mark.parametrize("skip_buffer", [True, False])
def test_non_persistent_buffers_are_left_alone(skip_buffer: bool) -> None:
    models = []
    for kind in (Theirs, MeanTeacherHook):
        model = two_networks(Cached)
        iterate(kind(0.1, skip_buffer=skip_buffer), model, 2)
        model.student.register_buffer("another", torch.zeros(9), persistent=False)
        iterate(kind(0.1, skip_buffer=skip_buffer), model, 2)
        models.append(model)
    assert differences(*map(snapshot, models)) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda hook: pickle.loads(pickle.dumps(hook))])
def test_a_hook_that_has_run_can_be_copied_and_pickled(copied: Callable[[Any], Any]) -> None:
    models = [two_networks(conv_net), two_networks(conv_net)]
    for model, kind in zip(models, (Theirs, MeanTeacherHook), strict=True):
        hook = kind(0.1, 2)
        iterate(hook, model, 3)
        iterate(copied(hook) if kind is MeanTeacherHook else hook, model, 3, start=3)
    assert differences(*map(snapshot, models)) == []


# What is different on purpose: first the original's behaviour, then ours.


def test_a_teacher_of_nan_is_copied_over_where_the_original_keeps_nan() -> None:
    for kind, is_whole in ((Theirs, False), (MeanTeacherHook, True)):
        model = two_networks(conv_net)
        with torch.no_grad():
            for parameter in model.teacher.parameters():
                parameter.fill_(math.nan)
        hook = kind(0.1)
        hook.before_train(runner_of(model))
        iterate(hook, model, 2)
        assert all(bool(p.isfinite().all()) is is_whole for p in model.teacher.parameters())


def test_a_teacher_s_integer_buffers_follow_where_the_original_s_stay() -> None:
    for kind, expected in ((Theirs, 1), (MeanTeacherHook, 4)):
        model = two_networks(conv_net)
        iterate(kind(0.1, skip_buffer=False), model, 3)
        assert model.student.norm.num_batches_tracked == 4
        assert model.teacher.norm.num_batches_tracked == expected


class _Ordered(nn.Module):
    """Layers that are registered in a given order; widths by name."""

    def __init__(self, names: str, **widths: int) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(widths.get(name, 3), 2, bias=False))


@pytest.mark.parametrize("skip_buffer", [True, False])
def test_networks_pair_by_name_where_the_original_pairs_by_order(skip_buffer: bool) -> None:
    for kind, taken_from in ((Theirs, "b"), (MeanTeacherHook, "a")):
        model = nn.Module()
        model.student, model.teacher = _Ordered("ab"), _Ordered("ba")
        kind(skip_buffer=skip_buffer).before_train(runner_of(model))
        weight = model.student.get_submodule(taken_from).weight
        assert torch.equal(model.teacher.a.weight, weight)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message", "original_notices"),
    [
        (_Ordered("abc"), _Ordered("ab"), KeyError, r"unexpected in the model: c\.weight", False),
        (_Ordered("ab"), _Ordered("abc"), KeyError, r"missing from the model: c\.weight", False),
        (_Ordered("ab"), _Ordered("ax"), KeyError, r"missing from the model: x\.weight", False),
        (_Ordered("ab", b=5), _Ordered("ab"), ValueError, r"'b\.weight' has shape \(2, 3\)", True),
    ],
    ids=["student has more", "teacher has more", "other names", "other shape"],
)
def test_networks_that_differ_are_refused_where_the_original_changes_a_part(
    student: Any, teacher: Any, error: Any, message: str, original_notices: bool
) -> None:
    model = nn.Module()
    model.student, model.teacher = student, teacher
    before = snapshot(model)
    hook = MeanTeacherHook()
    for call in (
        lambda: hook.before_train(runner_of(model)),
        lambda: hook.before_train(runner_of(model, 7)),  # resumed: checked before it trains
        lambda: hook.after_train_iter(runner_of(model), 0),
    ):
        with pytest.raises(error, match=message):
            call()
        assert differences(snapshot(model), before) == []
    try:
        Theirs().before_train(runner_of(model))
    except RuntimeError:
        assert original_notices
    else:
        assert not original_notices
    assert "teacher.a.weight" in differences(snapshot(model), before)


def test_tied_weights_are_averaged_once_where_the_original_averages_each_name() -> None:
    for kind, expected in ((Theirs, 1 - 0.75**2), (MeanTeacherHook, 0.25)):
        model = nn.Module()
        model.student, model.teacher = Tied(), Tied()
        nn.init.ones_(model.student.encoder.weight)
        nn.init.zeros_(model.teacher.encoder.weight)
        hook = kind(0.25, skip_buffer=False)
        hook.after_train_iter(runner_of(model), 0)
        assert model.teacher.encoder.weight.unique().tolist() == [expected]


def test_a_teacher_in_its_student_s_memory_is_refused_where_the_original_spoils_both() -> None:
    model = nn.Module()
    model.student = model.teacher = nn.Linear(2, 2)
    nn.init.ones_(model.student.weight)
    with pytest.raises(ValueError, match="the model's own memory"):
        MeanTeacherHook(0.5).before_train(runner_of(model, 3))
    assert model.student.weight.eq(1).all()
    Theirs(0.5).after_train_iter(runner_of(model), 0)
    assert model.student.weight.eq(0.75).all()


@pytest.mark.parametrize("lacking", ["teacher", "student"])
def test_a_network_that_is_not_there_is_an_error_that_names_those_that_are(lacking: str) -> None:
    model = two_networks(Tied)
    delattr(model, lacking)
    model.backbone = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match=r"^$"):
        Theirs().before_train(runner_of(model))
    there = {"teacher", "student"} - {lacking}
    with pytest.raises(AttributeError, match=rf"has the networks {there.pop()}, backbone; .*Mean"):
        MeanTeacherHook().before_train(runner_of(model))


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(AssertionError, match=r"^$"):
        Theirs(momentum)
    with pytest.raises(ValueError, match=rf"momentum is {momentum}; a number in \(0, 1\)"):
        MeanTeacherHook(momentum)


def test_an_interval_of_0_is_refused_at_once_where_the_original_fails_in_training() -> None:
    with pytest.raises(ZeroDivisionError):
        Theirs(interval=0).after_train_iter(runner_of(two_networks(Tied)), 0)
    with pytest.raises(ValueError, match="interval is 0; at least 1 is expected"):
        MeanTeacherHook(interval=0)
    with pytest.raises(TypeError, match=r"interval is 1\.5; an integer is expected"):
        MeanTeacherHook(interval=1.5)  # type: ignore[arg-type]
