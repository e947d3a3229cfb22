"""``inspect``: norms and distances beside those in float64, and what is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver

import ema_fused
from ema_fused import ExponentialMovingAverage
from ema_fused.converting import comparing_tensors, inspect
from ema_fused.converting.telling import draw, of_inspection
from tests.converting.originals_of_averages import model, train

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
)


def tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    found = {f"part.{number}.weight": torch.randn(41, 13) for number, _ in enumerate(DTYPES)}
    found = {
        name: tensor.to(dtype) for (name, tensor), dtype in zip(found.items(), DTYPES, strict=True)
    }
    return {
        **found,
        "part.0.bias": torch.randn(()),
        "none": torch.empty(0, 4),
        "count": torch.ones(2).int(),
    }


def exact(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


@pytest.mark.parametrize("format", ["torch", "safetensors", "distributed"])
@pytest.mark.parametrize("most", [64, 2**21])
def test_norms_and_distances_are_those_in_float64(
    format: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing_tensors, "_PIECE", most)
    here, there = tensors(0), tensors(1)
    for name, state in (("here", here), ("there", there)):
        if format == "torch":
            torch.save({"model": state}, tmp_path / name)
        elif format == "safetensors":
            save_file(state, tmp_path / name)
        else:
            state_dict_saver.save(dict(state), checkpoint_id=tmp_path / name, no_dist=True)
    read: list[int] = []
    threads = torch.get_num_threads()
    found = inspect(tmp_path / "here", tmp_path / "there", progress=read.append)
    assert found.format == "weights"
    assert {one.name for one in found.tensors} == here.keys()
    for seen in found.tensors:
        own, other = exact(here[seen.name]), exact(there[seen.name])
        if here[seen.name].dtype != torch.int32:
            assert math.sqrt(seen.squares) == pytest.approx(float(own.norm()), rel=1e-6)
        assert seen.distance == pytest.approx(float((own - other).norm()), rel=1e-6, abs=1e-12)
    assert sum(read) == 2 * found.bytes
    assert torch.get_num_threads() == threads
    part = next(layer for layer in found.layers if layer.name == "part.0")
    both = [(here[f"part.0.{one}"], there[f"part.0.{one}"]) for one in ("weight", "bias")]
    squares = sum(float((a - b).double().square().sum()) for a, b in both)
    assert part.distance == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert part.elements == 41 * 13 + 1


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(6)))
    averaged = ExponentialMovingAverage(net, momentum=0.5)
    averaged.update_parameters(net)
    state = averaged.state_dict()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, number in (("0", math.nan), ("1", math.inf), ("2", None), ("3", 1e-30), ("4", 0.5)):
        value = state[f"module.{name}.weight"]
        if number is None:
            value.zero_()
        else:
            value[1, 1] = number
    state["module.3.weight"].fill_(1e-30)  # its square is 0 in float32
    torch.save({"model": weights, "averaged": state}, tmp_path / "in.pt")
    found = inspect(tmp_path / "in.pt")
    assert found.with_nan == ["0.weight"] and found.with_infinity == ["1.weight"]
    assert found.zero == ["2.weight"]
    assert found.never_updated == ["5.weight"]
    text = of_inspection(found)
    assert "NaN in: '0.weight'" in text and "infinity in: '1.weight'" in text
    assert "all 0: '2.weight'" in text and "'5.weight'" in text
    assert "never updated" in text and "key 'averaged'" in text
    # The distance of the others counts, without what is no number.
    finite = state["module.0.weight"].isfinite()
    apart = (state["module.0.weight"] - weights["0.weight"])[finite].double().norm()
    assert found.layers[0].distance == pytest.approx(float(apart), rel=1e-5)


def test_an_average_that_was_just_made_has_nothing_never_updated(tmp_path: Path) -> None:
    net = model()
    averaged = ExponentialMovingAverage(net)
    averaged.update_parameters(net)
    torch.save({"model": net.state_dict(), "averaged": averaged.state_dict()}, tmp_path / "in.pt")
    found = inspect(tmp_path / "in.pt")
    assert found.never_updated == [] and found.total.distance == 0.0


def test_values_whose_squares_overflow_are_finite(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((4,), 1e30)}, tmp_path / "a.pt")
    torch.save({"weight": torch.full((4,), -1e30)}, tmp_path / "b.pt")
    found = inspect(tmp_path / "a.pt", tmp_path / "b.pt")
    assert found.with_infinity == [] and found.with_nan == []
    assert found.total.norm == pytest.approx(2e30) and found.total.relative == pytest.approx(2.0)


def test_names_that_only_one_of_two_has_are_told(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"a": torch.ones(2), "b": torch.ones(3), "d": torch.ones(2)}, tmp_path / "b.pt")
    found = inspect(tmp_path / "a.pt", tmp_path / "b.pt")
    assert found.only_here == ("b", "c") and found.only_there == ("d",)
    text = of_inspection(found)
    assert "only there: 'd'" in text and "'b', 'c'" in text


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    torch.save({"embed.weight": weight, "head.weight": weight}, tmp_path / "in.pt")
    assert inspect(tmp_path / "in.pt").elements == 64


def test_many_layers_are_cut_short_and_said_so(tmp_path: Path) -> None:
    torch.save({f"layer{n}.weight": torch.ones(1) for n in range(80)}, tmp_path / "in.pt")
    found = inspect(tmp_path / "in.pt")
    assert "and 20 layers more" in of_inspection(found)
    assert "layer79" in of_inspection(found, all_layers=True)


def test_the_picture_is_drawn_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = model()
    averaged = ExponentialMovingAverage(net)
    averaged.update_parameters(net)
    train(net, 0)
    torch.save({"model": net.state_dict(), "averaged": averaged.state_dict()}, tmp_path / "in.pt")
    draw(inspect(tmp_path / "in.pt"), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw(inspect(tmp_path / "in.pt"), tmp_path / "new" / "out.png")  # the folder is made
    before = (tmp_path / "in.pt").read_bytes()
    with pytest.raises(FileExistsError, match="exists and is no PNG"):
        draw(inspect(tmp_path / "in.pt"), tmp_path / "in.pt")
    assert (tmp_path / "in.pt").read_bytes() == before
    draw(inspect(tmp_path / "in.pt"), tmp_path / "out.png")  # an earlier picture is replaced
    torch.save(net.state_dict(), tmp_path / "raw.pt")
    with pytest.raises(ValueError, match="no distance to draw"):
        draw(inspect(tmp_path / "raw.pt"), tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_what_power_function_averages_have_saved_is_told(tmp_path: Path) -> None:
    net = model()
    ema = ema_fused.PowerFunctionEMA(net, sigma_rel=(0.05, 0.1))
    for _ in range(3):
        ema.update_parameters(net)
    torch.save({"step": 3, "ema": ema.state_dict()}, tmp_path / "state.pt")
    snapshot = ema.save_snapshot(tmp_path)[1]
    with pytest.raises(
        ValueError, match=r"'ema\.averages\.1' \(PowerFunctionEMA, sigma_rel 0\.1\)"
    ):
        inspect(tmp_path / "state.pt")
    for found, title in (
        (inspect(snapshot), "ema_fused: a snapshot of PowerFunctionEMA, sigma_rel 0.1"),
        (inspect(tmp_path / "state.pt", key="ema.averages.1"), "power-function"),
    ):
        told = of_inspection(found).splitlines()
        assert told[0].removeprefix("format").strip().startswith(title)
        assert "steps          3" in told
