"""Every kind of average of ours is recognised, converted, and taken back to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_fused import (
    AveragedWeights,
    BiasCorrectedEMA,
    EmaDecaySqrt,
    ExponentialMovingAverage,
    LatestWeightAverage,
    PowerFunctionEMA,
    StochasticWeightAverage,
    cli,
)
from ema_fused.converting import convert, inspect, read_average
from ema_fused.converting.average_state import whole
from ema_fused.converting.recognising_averages import FORMATS, TARGETS
from ema_fused.saving import checkpoints
from tests.converting.originals_of_averages import Tensors, copied, model, train

STEPS, MORE = range(5), range(5, 9)
KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "lawa": lambda net: LatestWeightAverage(net, 3),
    "bema": lambda net: BiasCorrectedEMA(net, lag=2),
    "sqrt": lambda net: EmaDecaySqrt(net, 0.9, switch_step=3, decay_steps=4),
    "mean": StochasticWeightAverage,
    "seeded": lambda net: AveragedWeights(
        net, 0.3, averaged_dtype=torch.bfloat16, rounding="stochastic", seed=5
    ),
    "power": lambda net: PowerFunctionEMA(net, 0.1),
}
OWN = [kind for kind in KINDS if kind != "power"]  # that take states by load_state_from
# What is told to be lost of each in the format of another package.
LOST = {
    "lawa": "the checkpoints of LatestWeightAverage",
    "bema": "the weights that BiasCorrectedEMA has begun with",
    "mean": "the average is the mean of all values",
    "seeded": "the seed of stochastic rounding",
    "power": "the profile of its width (sigma_rel 0.1)",
}


def averaged(kind: str, steps: range = STEPS, net: nn.Module | None = None) -> Any:
    net = model() if net is None else net
    made = KINDS[kind](net)
    for step in steps:
        train(net, step)
        made.update_parameters(net)
    return made, net


def averages_of(made: Any) -> Tensors:
    if isinstance(made, PowerFunctionEMA):
        return copied(made.average())
    made.settle()
    return copied(made.module.state_dict())


def whole_state(made: Any) -> Tensors:
    return {name: one for name, one in made.state_dict().items() if isinstance(one, Tensor)}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made, net = averaged(request.param)
    torch.save({"model": net.state_dict(), "ema": made.state_dict()}, tmp_path / "run.pt")
    return tmp_path / "run.pt"


every = pytest.mark.parametrize(
    ("checkpoint", "kind"), [(kind, kind) for kind in KINDS], indirect=["checkpoint"]
)


@every
@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_becomes_every_format(
    checkpoint: Path, kind: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, net = averaged(kind)
    names = [name for name, _ in net.named_parameters()]
    (tmp_path / "names").write_text("\n".join(names))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    output = tmp_path / ("out" if FORMATS[target].output == "folder" else "out.pt")
    given = [
        *("convert", str(checkpoint), "--to", target, "-o", str(output)),
        *("--names", str(tmp_path / "names"), "--model", str(tmp_path / "model")),
    ]
    assert cli.main([*given, "--decay", "0.9"]) == 0
    printed = capsys.readouterr().out
    is_lost = kind in LOST and (target not in ("ema_fused", "huggingface") or kind == "power")
    assert (LOST.get(kind, "no such text") in printed) == is_lost
    assert ("AveragedModel goes on as one" in printed) == (target == "torch" and kind != "mean")
    found = read_average(output, names=names)
    assert found.format == target
    expected = averages_of(made)
    for name in names:
        assert torch.equal(whole(found.averaged[name]), expected[name]), name
    keeps_steps = target not in ("timm", "torchtitan")
    assert found.steps == (len(STEPS) if keeps_steps else None)
    assert (found.raw is not None) == (
        target in ("lightning", "mmengine", "mmcv", "timm", "ema-pytorch")
    )


@pytest.mark.parametrize("form", ["out.pt", "out.safetensors", "out", "trainer"])
@pytest.mark.parametrize(
    ("checkpoint", "kind"), [(kind, kind) for kind in OWN], indirect=["checkpoint"]
)
def test_a_state_of_ours_comes_back_whole_and_goes_on(
    checkpoint: Path, kind: str, form: str, tmp_path: Path
) -> None:
    made, net = averaged(kind)
    path = tmp_path / form
    if form == "trainer":  # the folder that our callback for transformers has
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"a": 1}')
        done = convert(checkpoint, "huggingface", path, folder=tmp_path / "model")
    else:
        done = convert(checkpoint, "ema_fused", path)
    assert done.lost == ("the weights of the model, which stay in the source",)
    if form == "out.pt":
        assert_same(torch.load(path, weights_only=True), whole_state(made))
    elif form == "out.safetensors":
        assert_same(load_file(path), whole_state(made))
    fresh = KINDS[kind](model(seed=1))
    loaded = fresh.load_state_from(path)
    assert loaded.format == ("huggingface" if form == "trainer" else "ema_fused")
    assert (loaded.steps, loaded.kept, loaded.lost) == (5, (), ())
    assert_same(whole_state(fresh), whole_state(made))
    other = copy.deepcopy(net)
    for step in MORE:
        for each, trained in ((made, net), (fresh, other)):
            train(trained, step)
            each.update_parameters(trained)
    assert_same(whole_state(fresh), whole_state(made))
    if kind == "bema":
        assert_same(fresh.corrected(other), made.corrected(net))


@pytest.mark.parametrize("kind", ["lawa", "bema", "mean"])
def test_the_callback_s_folder_is_taken_whole(kind: str, tmp_path: Path) -> None:
    files = pytest.importorskip("ema_fused.callbacks.huggingface_files")
    made, net = averaged(kind)
    files.write(made, net, tmp_path / "averaged", sigma_rel=None)
    fresh = KINDS[kind](model(seed=1))
    assert fresh.load_state_from(tmp_path / "averaged").lost == ()
    assert_same(whole_state(fresh), whole_state(made))
    convert(tmp_path / "averaged", "huggingface", tmp_path / "again")
    other = KINDS[kind](model(seed=1))
    files.read(other, net, tmp_path / "again", sigma_rel=None)
    assert_same(whole_state(other), whole_state(made))


@pytest.mark.parametrize("kind", ["lawa", "bema"])
def test_parts_of_tied_tensors_are_taken_too(kind: str, tmp_path: Path) -> None:
    files = pytest.importorskip("ema_fused.callbacks.huggingface_files")

    def tied(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        return net

    made, net = averaged(kind, net=tied(0))
    files.write(made, net, tmp_path / "averaged", sigma_rel=None)
    fresh = KINDS[kind](tied(1))
    loaded = fresh.load_state_from(tmp_path / "averaged")
    assert len(loaded.parts) == 1 and loaded.lost == ()
    assert_same(whole_state(fresh), whole_state(made))


def test_inspect_tells_of_what_kind_an_average_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        "lawa": "beside it      window.* (LatestWeightAverage)",
        "bema": "beside it      initial.* (BiasCorrectedEMA)",
        "mean": "kind           mean of all values",
        "seeded": "beside it      rounding_seed",
        "power": "(sigma_rel 0.1)",
    }
    for kind, text in texts.items():
        torch.save(averaged(kind)[0].state_dict(), tmp_path / f"{kind}.pt")
        assert cli.main(["inspect", str(tmp_path / f"{kind}.pt")]) == 0
        assert text in capsys.readouterr().out


def test_a_state_in_memory_stays_as_it_is() -> None:
    made, _ = averaged("lawa")
    state = copied(made.state_dict())
    fresh, net = averaged("lawa", range(20, 22), model(1))
    fresh.load_state_from(state)
    before = copied(state)
    for step in MORE:
        train(net, step)
        fresh.update_parameters(net)
        fresh.settle()
    assert_same(state, before)


@pytest.mark.parametrize(("before", "after"), [(3, 5), (3, 2), (2, 3)])
def test_a_window_of_another_size_takes_the_latest_checkpoints(before: int, after: int) -> None:
    net = model()
    made = LatestWeightAverage(net, before)
    values = []
    for step in STEPS:
        train(net, step)
        made.update_parameters(net)
        values.append(net[0].weight.detach().clone())
    fresh = LatestWeightAverage(net, after)
    assert fresh.load_state_from(made.state_dict()).parts == ("window.",)
    train(net, 9)
    fresh.update_parameters(net)
    values = [*values[-before:], net[0].weight.detach().clone()][-after:]
    fresh.settle()
    expected = (sum(one.double() for one in values) / len(values)).float()
    assert torch.equal(fresh.module.state_dict()["0.weight"], expected)


def test_names_of_wrappers_are_those_of_the_model_in_parts_too() -> None:
    for kind in ("lawa", "bema"):
        made, _ = averaged(kind)
        plain = whole_state(made)
        wrapped = {}
        for name, tensor in plain.items():
            first, _, rest = name.partition(".")
            if first == "window" and not rest.startswith("filled"):
                place, _, rest = rest.partition(".")
                first = f"window.{place}"
            is_count = name == "steps" or rest == "filled"
            wrapped[name if is_count else f"{first}._orig_mod.{rest}"] = tensor
        fresh, _ = averaged(kind, range(0), model(1))
        assert len(fresh.load_state_from(wrapped).parts) == 1
        assert_same(whole_state(fresh), plain)


def test_parts_of_another_class_are_told_and_left() -> None:
    lawa, bema, mean = (averaged(kind)[0] for kind in ("lawa", "bema", "mean"))
    ema = ExponentialMovingAverage(model(1))
    for made, text in ((lawa, LOST["lawa"]), (bema, LOST["bema"])):
        (lost,) = ema.load_state_from(made.state_dict()).lost
        assert lost.startswith(text)
        assert_same(averages_of(ema), averages_of(made))
    fresh = BiasCorrectedEMA(model(1))
    begun = copied({n: t for n, t in fresh.state_dict().items() if n.startswith("initial.")})
    loaded = fresh.load_state_from(mean.state_dict())
    assert loaded.parts == ()
    assert any("corrects by aren't in the state" in one for one in loaded.lost)
    after = {n: t for n, t in fresh.state_dict().items() if n.startswith("initial.")}
    assert_same(after, begun)
    window = LatestWeightAverage(model(1), 2)
    assert "counts as one" in window.load_state_from(bema.state_dict()).lost[-1]
    assert int(window.window.filled) == 1


def test_the_kind_of_a_mean_is_kept_by_torch_s_files(tmp_path: Path) -> None:
    mean, _ = averaged("mean")
    torch.save(mean.state_dict(), tmp_path / "mean.pt")
    convert(tmp_path / "mean.pt", "ema_fused", tmp_path / "again.pt")
    with pytest.warns(UserWarning, match="the state is of a mean of all values"):
        ExponentialMovingAverage(model()).load_state_from(tmp_path / "again.pt")
    StochasticWeightAverage(model()).load_state_dict(
        torch.load(tmp_path / "again.pt", weights_only=True)
    )


# ---- PowerFunctionEMA: several averages in one state ---------------------------------------------


@pytest.mark.parametrize("form", ["memory", "file", "folder"])
def test_widths_are_listed_and_one_is_chosen(form: str, tmp_path: Path) -> None:
    net = model()
    ema = PowerFunctionEMA(net, (0.05, 0.2))
    for step in STEPS:
        train(net, step)
        ema.update_parameters(net)
    tree: Any = {"model": net.state_dict(), "ema": ema.state_dict()}
    if form == "file":
        torch.save(tree, tmp_path / "run.pt")
        tree = tmp_path / "run.pt"
    elif form == "folder":
        checkpoints.save(tree, tmp_path / "run")
        tree = tmp_path / "run"
    average = AveragedWeights(net)
    with pytest.raises(ValueError, match=r"'ema.averages.0' \(PowerFunctionEMA, sigma_rel 0.05\)"):
        average.load_state_from(tree)
    for number, width in enumerate(ema.sigma_rel):
        done = average.load_state_from(tree, key=f"ema.averages.{number}")
        assert (done.format, done.steps) == ("power-function", len(STEPS))
        assert f"sigma_rel {width:g}" in done.lost[0]
        assert_same(copied(average.weights), copied(ema.average(width)))
        if form != "memory":
            found = inspect(tree, key=f"ema.averages.{number}")
            apart = [
                (ema.average(width)[name] - one).double().square().sum()
                for name, one in net.state_dict().items()
                if one.is_floating_point()
            ]
            assert found.total.distance == pytest.approx(float(sum(apart)) ** 0.5)


def test_the_folder_of_our_callback_with_several_widths_is_read(tmp_path: Path) -> None:
    files = pytest.importorskip("ema_fused.callbacks.huggingface_files")
    net = model()
    ema = PowerFunctionEMA(net, (0.05, 0.1, 0.2))
    for step in STEPS:
        train(net, step)
        ema.update_parameters(net)
    run = tmp_path / "checkpoint-5"
    run.mkdir()
    torch.save(net.state_dict(), run / "pytorch_model.bin")
    files.write(ema, net, run / "averaged", sigma_rel=0.1)
    for number, width in enumerate(ema.sigma_rel):
        state = read_average(run, key=f"averages.{number}")
        assert (state.format, state.steps) == ("power-function", len(STEPS))
        averages = {name: whole(one) for name, one in state.averaged.items()}
        assert_same(averages, copied(ema.average(width)))
        assert state.raw is not None
        assert torch.equal(whole(state.raw["0.weight"]), net.state_dict()["0.weight"])


def test_a_format_that_is_only_read_is_no_target(tmp_path: Path) -> None:
    torch.save(averaged("mean")[0].state_dict(), tmp_path / "mean.pt")
    with pytest.raises(ValueError, match="'power-function' is none of ema_fused, torch"):
        convert(tmp_path / "mean.pt", "power-function", tmp_path / "out.pt")
