"""diffusers' EMAModel beside ours: the same to the bit with foreach, else within 2 ulp a step."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused.engine import backends
from tests.device import DEVICE, needs
from tests.frameworks.adapters.adapter_cases import (
    DTYPES,
    SLOW,
    assert_next_within_2_ulp,
    no_value_asked_of,
    values,
)
from tests.networks import conv_net, generator, train

theirs = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")

from ema_fused.adapters import diffusers as ours  # noqa: E402

KINDS = {
    "counted": {"decay": 0.97},
    "default": {},
    "bounded": {"decay": 0.5, "min_decay": 0.3, "update_after_step": 5},
    "warmup": {"use_ema_warmup": True, "decay": 0.9},
    "warmup options": {"use_ema_warmup": True, "inv_gamma": 3.0, "power": 0.5},
}


def both(parameters: Any, **arguments: Any) -> tuple[Any, Any]:
    parameters = list(parameters)
    return ours.EMAModel(parameters, **arguments), theirs.EMAModel(parameters, **arguments)


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_equal_for(steps: int, model: nn.Module, our: Any, their: Any, seed: int = 0) -> None:
    random = generator(seed)
    for step in range(steps):
        train(model, random)
        for ema in (our, their):
            ema.step(model.parameters())
        assert our.cur_decay_value == their.cur_decay_value
        assert our.optimization_step == their.optimization_step
        assert equal(our.shadow_params, their.shadow_params), f"after call {step}"


def assert_close_for(steps: int, model: nn.Module, our: Any, their: Any, seed: int = 0) -> None:
    random = generator(seed)
    for _ in range(steps):
        train(model, random)
        assert_next_within_2_ulp(model, our, their, lambda ema: ema.step(model.parameters()))
        assert our.cur_decay_value == their.cur_decay_value


@SLOW
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_a_hundred_steps_with_foreach_are_equal_to_the_bit(
    arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    if backends.pinned(None) == "cpu" and dtype == torch.bfloat16:
        pytest.skip("EMA_FUSED_BACKEND=cpu pins the kernel that differs in bfloat16's last bit")
    model = conv_net(dtype=dtype)
    assert_equal_for(100, model, *both(model.parameters(), foreach=True, **arguments))


@SLOW
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_each_of_a_hundred_steps_without_foreach_is_within_2_ulp(
    arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    model = conv_net(dtype=dtype)
    assert_close_for(100, model, *both(model.parameters(), **arguments))


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_parameters_without_gradients_are_copied(foreach: bool) -> None:
    model = conv_net()
    model.conv.requires_grad_(False)
    our, their = both(model.parameters(), foreach=foreach)
    assert_close_for(5, model, our, their)
    assert torch.equal(our.shadow_params[0], model.conv.weight)
    model.conv.requires_grad_(True)
    model.head.requires_grad_(False)
    assert_close_for(5, model, our, their)
    assert not torch.equal(our.shadow_params[0], model.conv.weight)
    assert torch.equal(our.shadow_params[-1], model.head.bias)


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_the_rest_is_theirs(foreach: bool) -> None:
    model = conv_net()
    our, their = both(model.parameters(), foreach=foreach)
    assert_close_for(3, model, our, their)
    weights = values(model.parameters())
    for ema in (our, their):
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        assert equal(model.parameters(), ema.shadow_params)
        ema.restore(model.parameters())
        assert equal(model.parameters(), weights)
        ema.to(dtype=torch.float64)
    assert_close_for(3, model, our, their)
    assert our.shadow_params[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="no `store"):
        our.restore(model.parameters())


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_state_is_loaded_both_ways(foreach: bool) -> None:
    model = conv_net()
    our, their = both(model.parameters(), decay=0.9, foreach=foreach)
    assert_close_for(5, model, our, their)
    assert list(our.state_dict()) == list(their.state_dict())
    our_next, their_next = both(conv_net(seed=1).parameters(), foreach=foreach)
    our_next.load_state_dict(their.state_dict())
    their_next.load_state_dict(our.state_dict())
    assert our_next.optimization_step == their_next.optimization_step == 5
    assert_close_for(5, model, our_next, their_next, seed=1)


def tiny_unet() -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained:FutureWarning")
@pytest.mark.parametrize("ours_saves", [False, True], ids=["theirs saves", "ours saves"])
def test_a_saved_model_goes_on_in_the_other(ours_saves: bool, tmp_path: Path) -> None:
    model = tiny_unet()
    about = {"model_cls": type(model), "model_config": model.config, "foreach": True}
    our, their = both(model.parameters(), decay=0.9, **about)
    assert_equal_for(3, model, our, their)
    (our if ours_saves else their).save_pretrained(tmp_path)
    ours_loaded, theirs_loaded = (
        module.EMAModel.from_pretrained(tmp_path, type(model), foreach=True)
        for module in (ours, theirs)
    )
    assert type(ours_loaded) is ours.EMAModel
    assert ours_loaded.optimization_step == 3
    assert equal(ours_loaded.shadow_params, our.shadow_params)
    assert_equal_for(3, model, ours_loaded, theirs_loaded, seed=1)


def test_pinned_memory_is_asked_for_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none without a GPU, so that the averages only change their place here."""
    model = conv_net()
    our, their = both(model.parameters(), foreach=True)
    assert_equal_for(2, model, our, their)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    held = our.shadow_params[0]
    for ema in (our, their):
        ema.pin_memory()
    assert our.shadow_params[0] is not held
    assert_equal_for(2, model, our, their)


@pytest.mark.gpu
def test_averages_in_pinned_memory_follow_a_model_on_the_gpu() -> None:
    model = conv_net()
    our, _ = both(model.parameters(), decay=0.9)
    expected, _ = both(model.parameters(), decay=0.9)
    on_gpu = copy.deepcopy(model).to(DEVICE)
    needs("pinned memory")
    our.pin_memory()
    for seed in range(3):
        train(model, generator(seed))
        on_gpu.load_state_dict(model.state_dict())
        our.step(on_gpu.parameters())
        expected.step(model.parameters())
    assert all(tensor.is_pinned() for tensor in our.shadow_params)
    for found, wanted in zip(our.shadow_params, expected.shadow_params, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_module_runs_the_originals_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_net()
    our, their = both(model.parameters())
    train(model, generator())
    for ema in (our, their):
        with pytest.warns(FutureWarning, match="deprecated"):
            ema.step(model)
    assert our.optimization_step == their.optimization_step == 1
    assert equal(our.shadow_params, their.shadow_params)


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_under_zero_3_the_parameters_are_gathered(
    foreach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    gathered: list[Any] = []

    class DeepSpeed:
        """Stands in for what is asked of deepspeed, which needs a cluster."""

        class zero:  # noqa: N801
            class GatheredParameters:
                def __init__(self, parameters: Any, modifier_rank: None) -> None:
                    gathered.append(parameters)

                def __enter__(self) -> None: ...

                def __exit__(self, *_: object) -> None: ...

    is_zero3 = "is_deepspeed_zero3_enabled"
    monkeypatch.setattr(transformers.integrations.deepspeed, is_zero3, lambda: True)
    monkeypatch.setattr(theirs, "deepspeed", DeepSpeed, raising=False)
    model = conv_net()
    our, their = both(model.parameters(), foreach=foreach)
    train(model, generator())
    our.step(model.parameters())
    assert len(gathered) == (1 if foreach else len(our.shadow_params))
    their.step(model.parameters())
    assert equal(our.shadow_params, their.shadow_params)
    monkeypatch.setattr(theirs, "is_transformers_available", lambda: False)
    our.step(model.parameters())
    assert len(gathered) == (2 if foreach else 2 * len(our.shadow_params))


def test_copies_and_pickles_go_on_equally() -> None:
    model = conv_net()
    our, their = both(model.parameters(), foreach=True)
    assert_equal_for(2, model, our, their)
    for made in (copy.deepcopy(our), pickle.loads(pickle.dumps(our))):
        assert vars(made).keys() == vars(their).keys()
        assert_equal_for(5, copy.deepcopy(model), made, copy.deepcopy(their))


def test_no_tensor_is_asked_for_its_value() -> None:
    model = conv_net()
    our, _ = both(model.parameters())
    with no_value_asked_of():
        our.step(model.parameters())
        our.step(model.parameters())


def test_what_does_not_match_raises_with_nothing_done() -> None:
    model = nn.Linear(2, 2)
    our, their = both(model.parameters())
    before = values(our.shadow_params)
    weight = nn.Parameter(torch.ones(2, 2))
    cases = [
        ([weight], "averaged has 2 tensors and source has 1"),
        ([weight, nn.Parameter(torch.ones(3))], r"pair 1: .* shape \(2,\) and the source \(3,\)"),
    ]
    for parameters, message in cases:
        with pytest.raises(ValueError, match=message):
            our.step(parameters)
        assert our.optimization_step == 0
        assert our.cur_decay_value is None
        assert equal(our.shadow_params, before)
    # Theirs takes what there is.
    their.step([weight])
    torch.testing.assert_close(their.shadow_params[0], weight.data)
    assert torch.equal(their.shadow_params[1], before[1])


def test_without_diffusers_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ema_fused.adapters.diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'ema_fused\[diffusers\]'"):
        import ema_fused.adapters.diffusers  # noqa: F401
