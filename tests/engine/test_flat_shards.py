"""A process's flat piece of a tensor, as ZeRO-3 cuts it; without DeepSpeed and without others."""

from __future__ import annotations

import copy
import io
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ema_fused.engine.dtensors import is_sharded, local, placed_as
from ema_fused.engine.flat_shards import Cut, FlatShard, boxes

WHOLE = torch.arange(10.0).view(2, 5)
CUT = Cut((0, 1, 2), piece=1)  # elements 4 to 7


def piece(values: Tensor = WHOLE, cut: Cut = CUT) -> FlatShard:
    start, stop = cut.bounds(values.numel())
    return FlatShard(values.flatten()[start:stop].clone(), values.shape, cut)


@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_boxes_are_the_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole = torch.arange(count).view(shape)
    found = boxes(tuple(shape), start, stop)
    if count:
        parts = []
        for offsets, sizes in found:
            assert len(offsets) == len(sizes) == len(shape)
            part = whole
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, offset, size)
            parts.append(part.flatten())
        elements = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        assert torch.equal(elements, torch.arange(start, stop))
        assert len(found) < max(2, 2 * len(shape))
    else:
        assert found == [((0,) * len(shape), tuple(shape))]


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 10, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_pieces_are_cut_as_torch_chunk_cuts(numel: int, ranks: int) -> None:
    whole = torch.arange(numel)
    chunks = [chunk for chunk in whole.chunk(ranks) if len(chunk)]
    for number in range(ranks):
        start, stop = Cut(tuple(range(ranks)), number).bounds(numel)
        expected = chunks[number] if number < len(chunks) else whole[:0]
        assert torch.equal(whole[start:stop], expected)


def test_it_has_the_shape_of_the_whole_and_is_a_parameter() -> None:
    shard = nn.Parameter(piece(), requires_grad=True)
    assert isinstance(shard, FlatShard) and isinstance(shard, nn.Parameter)
    assert shard.requires_grad and shard.shape == WHOLE.shape and is_sharded(shard)
    assert torch.equal(local(shard), torch.tensor([4.0, 5.0, 6.0, 7.0]))
    assert re.match(r"FlatShard\(tensor\(.*shape=\(2, 5\), piece 1 of 3\)", repr(shard))
    moved = placed_as(shard, local(shard).double())
    assert isinstance(moved, FlatShard) and moved.dtype == torch.float64


def test_copies_pickles_and_conversions_keep_the_place() -> None:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(piece(), requires_grad=False))
    copied = copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)["weight"]
    converted = copy.deepcopy(module).double()
    assert isinstance(converted.weight, nn.Parameter)
    for one in (copied.weight, loaded, converted.weight):
        assert isinstance(one, FlatShard)
        assert one.cut == CUT and one.shape == WHOLE.shape
        assert torch.equal(one.to_local(), piece().to_local().to(one.dtype))
    local(copied.weight).zero_()
    assert torch.equal(local(module.weight), piece().to_local())
    copied.load_state_dict(module.state_dict())
    assert torch.equal(local(copied.weight), piece().to_local())


def test_of_a_whole_tensor_its_piece_is_copied() -> None:
    shard = piece(torch.zeros(2, 5))
    shard.copy_(WHOLE)
    assert torch.equal(shard.to_local(), piece().to_local())
    shard.copy_(torch.tensor(3.0))
    assert torch.equal(shard.to_local(), torch.full((4,), 3.0))


def test_what_cannot_be_is_told() -> None:
    shard, other = piece(), piece(cut=Cut((0, 1, 2), piece=0))
    with pytest.raises(ValueError, match=r"piece 0 of 3 .* is copied into piece 1 of 3"):
        shard.copy_(other)
    with pytest.raises(ValueError, match=r"a piece of shape \(3,\).*flat one of 4 elements"):
        FlatShard(torch.zeros(3), (2, 5), CUT)
    with pytest.raises(NotImplementedError, match=r"of a FlatShard.*full_tensor\(\)"):
        torch.add(shard, 1)
    with pytest.raises(NotImplementedError, match="of a FlatShard"):
        torch.zeros(2, 5).copy_(shard)
    with pytest.raises(RuntimeError, match=r"piece 1 of 3 can't be put together.*no process group"):
        shard.full_tensor()
    alone = piece(cut=Cut((0,), piece=0))
    assert torch.equal(alone.full_tensor(), WHOLE)
