"""What can't be updated is refused by name, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ema_fused
from ema_fused import Plan

GOOD = torch.ones(3)


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged)


CASES: dict[str, tuple[Any, type[Exception], str]] = {
    "meta": (lambda: torch.ones(3, device="meta"), ValueError, "on the meta device"),
    "sparse": (lambda: torch.ones(3).to_sparse(), TypeError, "layout torch.sparse_coo"),
    "quantized": (quantized, TypeError, "quantized"),
    "nested": (nested, TypeError, "nested"),
    "fake": (fake, TypeError, "FakeTensor"),
    "number": (lambda: 3.0, TypeError, "is a float; a torch.Tensor is expected"),
    "none": (lambda: None, TypeError, "is a NoneType"),
    "shape": (
        lambda: torch.ones(4),
        ValueError,
        r"shape \(3,\) and the source \(4,\)|must be equal",
    ),
    "broadcastable": (lambda: torch.ones(1), ValueError, "must be equal"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["averaged", "source"])
@pytest.mark.parametrize("operation", ["lerp_", "copy_", "swap_"])
def test_bad_tensors_are_refused_by_index(operation: str, side: str, case: str) -> None:
    make, error, message = CASES[case]
    good = [torch.zeros(3), torch.zeros(3)]
    bad = [torch.ones(3), make()]
    lists = (good, bad) if side == "source" else (bad, good)
    weight = (0.5,) if operation == "lerp_" else ()
    with pytest.raises(error, match=message) as caught:
        getattr(ema_fused, operation)(*lists, *weight)
    assert "pair 1" in str(caught.value)
    assert good[0].tolist() == [0.0] * 3
    assert bad[0].tolist() == [1.0] * 3


def test_names_stand_in_the_place_of_indices() -> None:
    with pytest.raises(ValueError, match=r"'head\.weight': the averaged tensor has shape"):
        Plan([torch.zeros(2)], [torch.zeros(3)], names=["head.weight"])


def test_dtensors_are_refused_with_what_to_do(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = distribute_tensor(torch.ones(3), mesh, [Replicate()])
        for lists in (([spread], [GOOD.clone()]), ([torch.zeros(3)], [spread])):
            with pytest.raises(TypeError, match=r"pair 0: .* is a DTensor, .*to_local\(\)"):
                ema_fused.lerp_(*lists, 0.5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_have_no_average_but_are_copied(backend: str, dtype: torch.dtype) -> None:
    averaged = [torch.zeros(3), torch.zeros(3, dtype=dtype)]
    source = [torch.ones(3), torch.ones(3, dtype=dtype)]
    plan = Plan(averaged, source, backend=backend)
    with pytest.raises(TypeError, match=r"pair 1: .* have no average.*copy_\(\) them"):
        plan.lerp_(0.5)
    assert averaged[0].tolist() == [0.0] * 3
    plan.copy_()
    assert torch.equal(averaged[1], source[1])


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_an_integer_source_of_a_float_average_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch.float32 \(averaged\) and torch.int64 \(source\)"):
        ema_fused.lerp_([torch.zeros(3)], [torch.ones(3, dtype=torch.int64)], 0.5)


def test_a_swap_of_two_dtypes_is_refused(backend: str) -> None:
    averaged, source = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2).double()]
    with pytest.raises(TypeError, match=r"pair 1: .*can't be swapped without losing bits"):
        Plan(averaged, source, backend=backend).swap_()
    assert averaged[0].tolist() == [0.0] * 3


def test_expanded_averages_cannot_be_written() -> None:
    with pytest.raises(ValueError, match=r"pair 0: several elements .*contiguous\(\)"):
        ema_fused.lerp_([torch.zeros(1).expand(3)], [torch.ones(3)], 0.5)


def test_lists_must_pair_up() -> None:
    with pytest.raises(ValueError, match="averaged has 1 tensors and source has 2: pair 1 is"):
        ema_fused.lerp_([torch.zeros(3)], [torch.ones(3)] * 2, 0.5)
    with pytest.raises(TypeError, match=r"averaged is one tensor; a list .* expected"):
        ema_fused.lerp_(torch.zeros(3), [torch.ones(3)], 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names has 2 items for 1 pairs"):
        Plan([torch.zeros(3)], [torch.ones(3)], names=["a", "b"])
    with pytest.raises(ValueError, match="only_copy has 0 items for 1 pairs"):
        Plan([torch.zeros(3)], [torch.ones(3)], only_copy=[])


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([0.5], ValueError, "1 weights for 2 pairs"),
        ([0.5, 0.5, 0.5], ValueError, "3 weights for 2 pairs"),
        ("0.5", TypeError, "a real number is expected"),
        (0.5j, TypeError, "a real number is expected"),
        (torch.ones(2), ValueError, r"a tensor of shape \(2,\)"),
        ([torch.ones(3)], ValueError, "1 weights for 2 pairs"),
        ([torch.ones(3), torch.ones(4)], ValueError, "pair 1: a weight of shape"),
        ([torch.ones(3), torch.ones(3).double()], TypeError, "pair 1: dtypes"),
        ([torch.ones(3), 0.5], TypeError, "pair 1: the weight is 0.5"),
        (None, TypeError, "the weight is None; a real number"),
        ([0.5, None], TypeError, "the weight of pair 1 is None; a real number"),
        ([0.5, "1"], TypeError, "the weight of pair 1 is '1'; a real number"),
    ],
    ids=str,
)
def test_bad_weights_are_refused(weight: Any, error: type[Exception], message: str) -> None:
    averaged = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(error, match=message):
        ema_fused.lerp_(averaged, [torch.ones(3), torch.ones(3)], weight)
    assert averaged[0].tolist() == [0.0] * 3


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"arithmetic 'ema' is none of lerp, axpby, delta, products$"
    ):
        Plan([], [], arithmetic="ema")
    with pytest.raises(ValueError, match="backend 'gpu' is none of cuda, cpu, foreach"):
        Plan([], [], backend="gpu")


@pytest.mark.parametrize("weight", [-0.5, 1.5, float("nan"), float("inf")])
def test_any_number_is_a_weight_of_a_list(backend: str, weight: float) -> None:
    averaged, expected = [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0])]
    Plan(averaged, [torch.zeros(2)], backend=backend).lerp_(weight)
    torch._foreach_lerp_(expected, [torch.zeros(2)], weight)
    torch.testing.assert_close(averaged, expected, rtol=0, atol=0, equal_nan=True)
