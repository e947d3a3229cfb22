"""What the benchmark checks before it times, and how it takes turns. No test looks at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.peers.side import Match, Side
from ema_fused.bench import contenders
from ema_fused.bench.contenders import DTYPES, Group, random_tensors, rotating, sets_needed
from ema_fused.bench.timing import (
    NO_EFFORT,
    CpuClock,
    Effort,
    summary,
    time_host,
    time_in_turns,
)

CPU = torch.device("cpu")
SHAPES = [(5,), (3, 7)]


# ---- The check -----------------------------------------------------------------------------------


def sources(dtype: torch.dtype, sets: int = 2) -> list[list[torch.Tensor]]:
    return [random_tensors(SHAPES, dtype, CPU, seed) for seed in range(sets)]


def group_of(kind: str) -> Group:
    if kind == "several":
        return contenders.several_group(sources(torch.float32), 4)
    if kind == "models":
        models: list[nn.Module] = [contenders.module_of(s) for s in sources(torch.float32)]
        return contenders.model_group(models)
    return contenders.list_group(sources(DTYPES[kind].source), DTYPES[kind])


@pytest.mark.parametrize("kind", [*DTYPES, "several", "models"])
def test_a_wrong_bit_in_any_contender_and_set_is_found(kind: str) -> None:
    with torch.no_grad():
        group = group_of(kind)
        group.check()
        for contender, place in itertools.product(group.contenders, range(2)):
            right = contender.calls[place]
            averaged = contender.buffers[place].averaged[1]

            def wrong(call: Callable[[], object] = right, found: Any = averaged) -> None:
                call()
                if contender.exact:  # noqa: B023
                    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
                    found.view(bits).view(-1)[20] += 1
                else:
                    found.view(-1)[20] += 0.1

            contender.calls[place] = wrong
            with pytest.raises(AssertionError, match=r"differs from torch at tensor 1 of shape"):
                group.check()
            contender.calls[place] = right
        group.check()


def test_another_weight_is_found() -> None:
    group = group_of("float32")
    buffers = group.contenders[0].buffers
    almost = contenders.Contender(
        "almost",
        [lambda b=b: torch._foreach_lerp_(b.averaged, b.source, 0.0010001) for b in buffers],
        buffers,
    )
    with pytest.raises(AssertionError, match="almost differs from torch at tensor 0"):
        contenders.check([almost])


def test_every_peer_that_gives_another_result_is_found() -> None:
    for package in ("mmengine", "mmcv", "diffusers", "ema_pytorch", "torch_ema"):
        pytest.importorskip(package)
    values = random_tensors(SHAPES, torch.float32, CPU, seed=0)
    found = [match for peer in peers.NAMES for match in peers.matches(peer)]
    assert len(found) == len({match.title for match in found}) == 20
    with torch.no_grad():
        for match in found:
            ours, original = (side(values) for side in (match.ours, match.original))
            peers.check(match, ours, original)
            with pytest.raises(AssertionError, match="differs from the original's after update 1"):
                peers.check(match, _off(ours), original)


def _off(side: Side) -> Side:
    """The same, but for an element of what it holds after each call."""

    def state() -> dict[str, torch.Tensor]:
        held = dict(side.state())
        name = next(name for name, tensor in held.items() if tensor.numel() > 3)
        held[name] = held[name].detach().clone()
        held[name].view(-1)[3] += 0.01
        return held

    return Side(side.calls, side.trained, state, side.next_step)


def test_other_names_are_found() -> None:
    match = Match("a match", lambda values: side, lambda values: side)
    side = Side((lambda: None,), [], lambda: {"a": torch.ones(1)})
    other = Side((lambda: None,), [], lambda: {"b": torch.ones(1)})
    with pytest.raises(AssertionError, match=r"a match: not the same names: \['a', 'b'\]"):
        peers.check(match, side, other)


def test_random_tensors_go_on_where_the_last_one_ended() -> None:
    length = contenders._BLOCK
    small, large, scalar = random_tensors([(3, 5), (2 * length,), ()], torch.float32, CPU, seed=1)
    (block,) = random_tensors([(length,)], torch.float32, CPU, seed=1)
    assert torch.equal(small.view(-1), block[:15])
    assert torch.equal(large, block.repeat(3)[15 : 15 + 2 * length])
    assert scalar == block[15]
    assert 0.99 < float(block.std()) < 1.01


# ---- Turns ---------------------------------------------------------------------------------------


def test_buffer_sets_take_turns_over_all_contenders() -> None:
    assert sets_needed(100, 50) == 2  # 150 bytes are to be touched in between
    assert sets_needed(150, 50) == sets_needed(10, 0) == sets_needed(0, 0) == 1
    touched: list[int] = []
    calls = [lambda i=i: touched.append(i) for i in range(3)]
    ours, theirs = rotating(
        [contenders.Contender(name, calls) for name in ("ours", "theirs")]
    ).values()
    for call in (ours, ours, theirs, ours, theirs, theirs, theirs):
        call()
    assert touched == list(itertools.islice(itertools.cycle(range(3)), 7))


def test_contenders_take_turns_and_the_order_rotates() -> None:
    called: list[str] = []
    timings = time_in_turns(
        CpuClock(), {name: lambda name=name: called.append(name) for name in "ab"}, NO_EFFORT
    )
    for found in timings.values():
        assert found.rounds == 5 and found.calls_per_round == 1
        assert 0 < found.lower_quartile <= found.median <= found.upper_quartile
    # The five rounds are the end of the record: a warming and a timed call each.
    assert "".join(called[-20:]) == "aabb" + "bbaa" + "aabb" + "bbaa" + "aabb"


def test_rounds_end_with_the_time_of_a_case() -> None:
    calls = {"a": lambda: None}
    assert time_in_turns(CpuClock(), calls, Effort(9, 0.0, 60.0))["a"].rounds == 9
    assert time_in_turns(CpuClock(), calls, Effort(9, 0.0, 0.0))["a"].rounds == 5


def test_a_batch_that_outlasts_the_device_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CpuClock()
    busy = itertools.cycle([False, True])
    monkeypatch.setattr(clock, "occupy", lambda seconds: lambda: next(busy))
    timings, thrown_away = time_host(clock, {"call": lambda: None}, batches=6, calls=5)
    assert thrown_away == 3
    assert timings["call"].rounds == 15
    monkeypatch.setattr(clock, "occupy", lambda seconds: lambda: False)
    with pytest.raises(RuntimeError, match="0 samples are no measurement"):
        time_host(clock, {"call": lambda: None}, batches=2, calls=5)


def test_a_summary_has_the_quartiles() -> None:
    found = summary([5.0, 1.0, 4.0, 2.0, 3.0], calls=7)
    assert (found.lower_quartile, found.median, found.upper_quartile) == (2.0, 3.0, 4.0)
    assert (found.rounds, found.calls_per_round) == (5, 7)
