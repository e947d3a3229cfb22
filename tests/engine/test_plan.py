"""A plan follows its tensors, refuses what has changed, and holds next to nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ema_fused import Plan
from ema_fused.engine import backends
from tests import processes


def make(count: int = 3) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    averaged = [nn.Parameter(torch.zeros(4, 3), requires_grad=False) for _ in range(count)]
    return averaged, [nn.Parameter(torch.ones(4, 3)) for _ in range(count)]


def test_replaced_storage_is_followed(backend: str) -> None:
    averaged, source = make()
    plan = Plan(averaged, source, backend=backend)
    plan.lerp_(0.5)
    source[1].data = torch.full((4, 3), 3.0)
    averaged[2].data = torch.full((4, 3), -1.0)
    plan.lerp_(0.5)
    assert torch.equal(averaged[0], torch.full((4, 3), 0.75))
    assert torch.equal(averaged[1], torch.full((4, 3), 1.75))
    assert torch.equal(averaged[2], torch.full((4, 3), 0.0))


def test_storage_replaced_at_every_step_is_followed(backend: str) -> None:
    """As MMSelfSup's momentum updates do, with the old memory freed and used again at once."""
    averaged, source = make(20)
    plan = Plan(averaged, source, backend=backend)
    expected = torch.zeros(4, 3)
    for step in range(30):
        for parameter in averaged:
            parameter.data = parameter.data * 0.9 + 0.05
        for parameter in source:
            parameter.data = torch.full((4, 3), float(step))
        garbage = [torch.full((4, 3), float("nan")) for _ in range(40)]
        expected = (expected * 0.9 + 0.05).lerp(torch.full((4, 3), float(step)), 0.1)
        plan.lerp_(0.1)
        del garbage
    for parameter in averaged:
        assert torch.equal(parameter.data, expected)


def _to_double(source: Tensor) -> None:
    source.data = torch.ones(4, 3, dtype=torch.float64)


def _reshape(source: Tensor) -> None:
    source.data = torch.ones(3, 4)


def _narrow(source: Tensor) -> None:
    source.data = source.data[:2]


def _view(source: Tensor) -> None:
    source.data = source.data.view(12)


CHANGES = [_to_double, _reshape, _narrow, _view]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("operation", ["lerp_", "copy_", "swap_"])
def test_a_changed_tensor_is_refused_and_nothing_is_lost(
    backend: str, operation: str, change: Callable[[Tensor], None]
) -> None:
    averaged, source = make()
    plan = Plan(averaged, source, backend=backend, names=["a", "b", "c"])
    before, raw = source[2].data, [tensor.detach().clone() for tensor in source[:2]]
    source[0].data = torch.full((4, 3), 5.0)  # one that has only moved comes first
    change(source[2])
    run = (lambda: plan.lerp_(0.5)) if operation == "lerp_" else getattr(plan, operation)
    with pytest.raises(
        ValueError, match=r"'c': the source was planned as float32 of shape \(4, 3\)"
    ):
        run()
    assert all(torch.equal(tensor, torch.zeros(4, 3)) for tensor in averaged)
    assert torch.equal(source[1], raw[1])

    source[2].data = before  # as it was: the plan works again, on the memory that has moved too
    plan.lerp_(0.5)
    assert torch.equal(averaged[0], torch.full((4, 3), 2.5))
    assert torch.equal(averaged[1], torch.full((4, 3), 0.5))
    assert torch.equal(averaged[2], torch.full((4, 3), 0.5))


def test_a_tensor_resized_in_place_is_refused(backend: str) -> None:
    averaged, source = [torch.zeros(4, 3)], [torch.ones(4, 3)]
    plan = Plan(averaged, source, backend=backend)
    source[0].resize_(2, 3)
    with pytest.raises(ValueError, match="pair 0: the source was planned as"):
        plan.lerp_(0.5)
    assert torch.equal(averaged[0], torch.zeros(4, 3))


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_new_strides_at_the_same_address_are_seen() -> None:
    square = torch.arange(9.0).view(3, 3)
    averaged = [torch.zeros(3, 3)]
    plan = Plan(averaged, [square])
    square.t_()
    plan.lerp_(1.0)
    assert torch.equal(averaged[0], torch.arange(9.0).view(3, 3).t())
    line, flat = torch.arange(8.0), torch.zeros(4)
    head = line[:4]
    plan = Plan([flat], [head])
    head.set_(line.untyped_storage(), 0, (4,), (2,))
    plan.lerp_(1.0)
    assert torch.equal(flat, line[::2])


def test_plans_survive_deepcopy_and_pickle(backend: str) -> None:
    plan = Plan([torch.zeros(3)], [torch.ones(3)], arithmetic="axpby", backend=backend)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        other.lerp_(0.5)
        assert other.arithmetic == "axpby"
        assert torch.equal(other.averaged[0], torch.full((3,), 0.5))
        assert torch.equal(plan.averaged[0], torch.zeros(3))


def test_a_deep_copy_beside_its_tensors_updates_the_copies(backend: str) -> None:
    averaged, source = [torch.zeros(3)], [torch.ones(3)]
    plan = Plan(averaged, source, backend=backend)
    tensors, other = copy.deepcopy((averaged, plan))
    other.lerp_(0.5)
    assert torch.equal(tensors[0], torch.full((3,), 0.5))
    assert torch.equal(averaged[0], torch.zeros(3))


def test_the_representation_tells_what_is_launched() -> None:
    plan = Plan([torch.zeros(9000), torch.zeros(2)], [torch.ones(9000), torch.ones(2)])
    if plan.backends == ("cpu",):
        assert repr(plan) == (
            "Plan(devices=['cpu'], backends=['cpu'], arithmetic='lerp', "
            "rounding='nearest', averages=1, tensors=2, elements=9,002, chunks=3, launches=1)"
        )
    assert (plan.tensors, plan.elements) == (2, 9002)


def test_a_plan_has_as_many_chunks_as_its_tensors_need() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the extension is not built")
    tensors = [torch.zeros(100_000)], [torch.zeros(100_000)]
    part = native.Plan(*tensors, [(False, 0, 0)], native.Arithmetic.LERP)
    assert part.chunks == -(-100_000 // native.CHUNK_ELEMENTS_CPU)


def test_a_plan_keeps_no_module_alive(backend: str) -> None:
    averaged, source = make(1)
    plan = Plan(averaged, source, backend=backend)
    references = sys.getrefcount(source[0])
    del plan
    gc.collect()
    assert sys.getrefcount(source[0]) < references


def test_two_threads_update_two_plans_at_once() -> None:
    plans = [Plan([torch.zeros(200_000)], [torch.ones(200_000)]) for _ in range(2)]

    def work(plan: Plan) -> None:
        for _ in range(50):
            plan.lerp_(0.1)

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.zeros(200_000)
    for _ in range(50):
        expected.lerp_(torch.ones(200_000), 0.1)
    for plan in plans:
        assert torch.equal(plan.averaged[0], expected)


WATCHED_THROUGH_DLPACK = """
import torch
from ema_fused import _C
_C.connect(torch.Tensor, torch.nn.Parameter, "libnowhere.so", None)
assert "DLPack" in _C.missing_doors() and "one thread" in _C.missing_doors()
a, s = [torch.zeros(3), torch.zeros(2, 2)], [torch.ones(3), torch.ones(2, 2)]
plan = _C.Plan(a, s, [(False, 0, 0), (False, 0, 1)], _C.Arithmetic.LERP)
average = lambda weight: plan.run(_C.Operation.AVERAGE, weight)
assert average(0.5)
s[0].data = torch.full((3,), 2.0)
assert average(0.5) and torch.equal(a[0], torch.full((3,), 1.25))
s[1].data = torch.ones(4)
assert not average(0.5) and torch.equal(a[0], torch.full((3,), 1.25))
assert plan.changed() == (1, True, "float32 of shape (2, 2)")
import ema_fused
one, other = [torch.zeros(4)], [torch.ones(4)]
for _ in range(2):  # the second finds the plan of the first
    ema_fused.lerp_(one, other, 0.5)
assert torch.equal(one[0], torch.full((4,), 0.75))
"""


@pytest.mark.slow
def test_without_the_c_shim_tensors_are_watched_all_the_same() -> None:
    if backends.native() is None:
        pytest.skip("the extension is not built")
    processes.run("-c", WATCHED_THROUGH_DLPACK)


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["ema_fused._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, ema_fused
    a, s = [torch.zeros(3), torch.zeros(2).bfloat16()], [torch.ones(3), torch.ones(2)]
    for _ in range(2):
        ema_fused.lerp_(a, s, 0.5)
assert torch.equal(a[0], torch.full((3,), 0.75)) and a[1].tolist() == [0.75, 0.75]
(warning,) = caught
assert issubclass(warning.category, ema_fused.SlowPathWarning)
assert "the compiled extension is missing" in str(warning.message), warning.message
assert ema_fused.Plan(a, s).backends == ("foreach",)
"""


def test_without_the_extension_all_runs_on_foreach_with_one_warning() -> None:
    processes.run("-c", WITHOUT_EXTENSION)


@pytest.mark.slow
def test_the_environment_pins_a_backend() -> None:
    code = "import torch; from ema_fused import Plan; t = torch.ones(2); print(Plan([t], [t + 1]))"
    done = processes.run("-c", code, EMA_FUSED_BACKEND="foreach")
    assert "backends=['foreach']" in done.stdout, done.stderr
    assert "SlowPathWarning" not in done.stderr
    done = processes.run("-c", code, status=1, EMA_FUSED_BACKEND="quick")
    assert "backend 'quick' is none of cuda, cpu, foreach" in done.stderr


def test_a_pinned_backend_that_cannot_serve_is_an_error() -> None:
    if backends.native() is None:
        pytest.skip("the extension is not built")
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for and can't serve 'w': the aver"):
        Plan([torch.ones(4)[::2]], [torch.ones(2)], backend="cpu", names=["w"])
    if backends.why_not("cuda") is not None:
        with pytest.raises(RuntimeError, match="'cuda' was asked for and can't be used"):
            Plan([torch.ones(1)], [torch.ones(1)], backend="cuda")
