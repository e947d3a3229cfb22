"""Averages of PEFT's adapters: written as adapters, and active in the model beside the trained one.

averaged = AveragedWeights(model, momentum=0.001, share_frozen=True)  # the adapter alone
add_averaged_adapter(averaged, model, "teacher")
...
with torch.no_grad(), using_adapter(model, "teacher"):
    targets = model(**batch).logits
...
save_adapter(averaged, model, "averaged")  # for PeftModel.from_pretrained(base, "averaged")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.averages.base import BaseAveragedModel
from ema_fused.engine.dtensors import is_sharded
from ema_fused.frameworks import missing
from ema_fused.modules.module_pairs import Kind, Slot, slots_of
from ema_fused.modules.naming import common_names
from ema_fused.modules.skeleton import wrapped_by
from ema_fused.modules.swapping import refuse_while_swapped

try:
    from peft import PeftModel
except ImportError as error:
    raise missing("peft", "peft", error) from error

__all__ = ["add_averaged_adapter", "save_adapter", "using_adapter"]


def save_adapter(
    averaged: BaseAveragedModel | Mapping[str, Tensor],
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter: str | None = None,
) -> Path:
    """Writes the average of an adapter as PEFT writes adapters: its tensors and its configuration.

    ``PeftModel.from_pretrained(base, folder)`` and ``load_adapter`` load it. Like PEFT's own
    ``save_pretrained`` it puts an adapter of another name than ``default`` into a folder of this
    name inside of ``folder``. Tensors have the dtype of the average. The frozen base isn't written.
    Call it in one process.

    Args:
        averaged: the average of ``model``; or averaged tensors by name, say
            ``PowerFunctionEMA.average(0.1)``.
        model: the ``PeftModel`` that is trained, wrapped or not.
        folder: made if it isn't there.
        adapter: its name; None: the active one.

    Returns:
        The folder in which the files are.

    Raises:
        TypeError: ``model`` isn't a ``PeftModel``, or the average is sharded.
        ValueError: there is no such adapter, several are active and none is named, or it isn't
            averaged.
        RuntimeError: inside of a ``swapped()`` block.
    """
    adapted = _adapted("save_adapter()", model)
    adapter = _chosen(adapted, adapter)
    averages = _averages("save_adapter()", averaged, adapted)
    _of_adapter(averages, adapter)
    slots = slots_of(adapted)
    trained = [(slots[name].tensor, slots[name]) for name in averages]
    try:
        # All in their places: PEFT writes other tensors too (biases), and computes prompts.
        for name, tensor in averages.items():
            _place(tensor, slots[name])
        adapted.save_pretrained(str(folder), selected_adapters=[adapter])
    finally:
        for tensor, slot in trained:
            _place(tensor, slot)
    return Path(folder) / adapter if adapter != "default" else Path(folder)


def add_averaged_adapter(
    averaged: BaseAveragedModel,
    model: nn.Module,
    name: str = "teacher",
    *,
    adapter: str | None = None,
) -> None:
    """Adds an adapter to ``model`` whose tensors are the averaged ones themselves.

    It takes no memory and is never copied: each update of ``averaged`` is at once an update of the
    adapter. Make it active by :func:`using_adapter`; it is frozen, and no optimizer's. What isn't
    averaged of the adapter (frozen parts, random projections) is that of the trained one.
    ``model.delete_adapter(name)`` removes it.

    Updates, ``swapped()`` and checkpoints of ``averaged`` go on as before: they leave the new
    adapter out. Inside of a ``swapped()`` block it holds the trained weights. An average in another
    dtype than the trained adapter's is computed with in this dtype, as PEFT does with adapters.

    Args:
        averaged: an average of ``model`` on the model's device, without ``offload`` or ``overlap``.
        model: the ``PeftModel`` that is trained, wrapped or not.
        name: of the new adapter.
        adapter: the name of the adapter whose average it is; None: the active one.

    Raises:
        TypeError: ``model`` isn't a ``PeftModel``, ``averaged`` no average, or it is sharded.
        ValueError: there is no such adapter, several are active and none is named, it isn't
            averaged, it is averaged elsewhere, or ``name`` is taken or no name of an adapter; or
            PEFT can't add another adapter of this kind.
        RuntimeError: inside of a ``swapped()`` block.

    If an error is raised, the model has no new adapter.
    """
    adapted = _adapted("add_averaged_adapter()", model)
    adapter = _chosen(adapted, adapter)
    _check_name(name, adapted)
    if not isinstance(averaged, BaseAveragedModel):
        raise TypeError(
            f"add_averaged_adapter() was given a {type(averaged).__name__} as the average; an "
            f"averaged model is expected, say ema_fused.AveragedWeights(model, share_frozen=True)"
        )
    if averaged.runs_beside:
        raise ValueError(
            "the average is updated beside the training (offload= or overlap=), and an adapter is "
            "read without waiting for it; make the average without them"
        )
    own = _of_adapter(_averages("add_averaged_adapter()", averaged, adapted), adapter)
    trained = slots_of(adapted)
    _check_places(own, trained)
    parts = set(adapted.modules())
    config = copy.deepcopy(adapted.peft_config[adapter])
    # Without their encoders, which train alone, prompts would have no place for some averages.
    config.inference_mode = not config.is_prompt_learning
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # some others change the base weights
    try:
        # On meta where PEFT can; what it makes at random elsewhere is no number of the training.
        with torch.random.fork_rng(devices=[]):
            adapted.add_adapter(name, config, low_cpu_mem_usage=True)
        added = {key: slot for key, slot in slots_of(adapted).items() if key not in trained}
        places = {key: _partner(key, name, adapter, trained) for key in added}
        lacking = sorted(own.keys() - places.values())
        if lacking:
            raise ValueError(
                f"PEFT has no place in adapter {name!r} for averaged tensors of {adapter!r}: "
                f"{', '.join(lacking[:6])}. Evaluate such an adapter by averaged.swapped(model)"
            )
    except Exception:
        if name in adapted.peft_config:
            adapted.delete_adapter(name)
        raise
    for key, slot in added.items():
        _place(own.get(places[key], trained[places[key]].tensor), slot)
    for part in adapted.modules():
        if part not in parts:
            part.training = adapted.training
    # A graph of autograd may hold these tensors from now on.
    if averaged.version_counters is None:
        averaged.version_counters = True
    averaged._give_away()


@contextmanager
def using_adapter(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """``with using_adapter(model, "teacher"):`` runs ``model`` with this adapter alone.

    Afterwards the adapters of before are active again, also if the block raises. Unlike
    ``model.set_adapter`` it makes no parameter trainable: which parameters need a gradient is after
    the block as it was before, and inside of it none of an adapter does.

    Args:
        model: a ``PeftModel``, wrapped or not.
        name: of one of its adapters.

    Raises:
        TypeError: ``model`` isn't a ``PeftModel``.
        ValueError: there is no such adapter.
    """
    adapted = _adapted("using_adapter()", model)
    _chosen(adapted, name)
    trains = [(parameter, parameter.requires_grad) for parameter in adapted.parameters()]
    before, active = adapted.active_adapter, list(adapted.active_adapters)
    try:
        adapted.set_adapter(name, inference_mode=True)
        yield model
    finally:
        adapted.active_adapter = before
        if not adapted.peft_config[active[0]].is_prompt_learning:
            adapted.base_model.set_adapter(active, inference_mode=True)
        else:
            adapted.set_adapter(active[0], inference_mode=True)
        for parameter, trained in trains:
            parameter.requires_grad = trained


def _adapted(what: str, model: Any) -> Any:
    """The PeftModel that ``model`` is, or wraps."""
    inside: Any = model
    while isinstance(inside, nn.Module) and not isinstance(inside, PeftModel):
        inside = wrapped_by(inside)
    if inside is None or not isinstance(inside, nn.Module):
        raise TypeError(
            f"{what} was given a {type(model).__name__} as the model; a peft.PeftModel is "
            f"expected, wrapped or not: peft.get_peft_model(model, config)"
        )
    return inside


def _chosen(adapted: Any, adapter: str | None) -> str:
    names = list(adapted.peft_config)
    if adapter is None:
        active = list(adapted.active_adapters)
        if len(active) == 1:
            return str(active[0])
        raise ValueError(
            f"{len(active)} adapters are active ({', '.join(active) or 'none'}); say by adapter= "
            f"which one is meant"
        )
    if adapter not in names:
        raise ValueError(f"the model has no adapter {adapter!r}; it has {', '.join(names)}")
    return adapter


def _check_name(name: object, adapted: Any) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name is {name!r}; the name of an adapter, without dots, is expected")
    if name in adapted.peft_config:
        raise ValueError(
            f"the model has an adapter {name!r} already; delete_adapter({name!r}) that one, or "
            f"take another name"
        )


def _averages(
    what: str, averaged: BaseAveragedModel | Mapping[str, Tensor], adapted: Any
) -> dict[str, Tensor]:
    """The averaged tensors by the model's names, without those that are the model's own.

    Raises:
        TypeError: they are sharded.
    """
    shared: set[str] = set()
    if isinstance(averaged, BaseAveragedModel):
        refuse_while_swapped(f"{what} was called", averaged, adapted)
        averaged.settle()
        shared = averaged.shared_names
        slots = slots_of(averaged._averages(), leave=(Kind.CACHE,))
        tensors: Mapping[str, Tensor] = {name: slot.tensor for name, slot in slots.items()}
    else:
        tensors = averaged
    names = common_names(tensors, slots_of(adapted))
    averages = {names[name]: tensors[name] for name in names if name not in shared}
    sharded = [name for name, tensor in averages.items() if is_sharded(tensor)]
    if sharded:
        raise TypeError(
            f"{sharded[0]!r} is a DTensor, and {what} takes whole tensors; write the averages by "
            f"ema_fused.checkpoints, and load them into an average of a model that isn't sharded"
        )
    return averages


def _of_adapter(averages: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Those with the name of an adapter in theirs.

    Raises:
        ValueError: there are none.
    """
    own = {name: tensor for name, tensor in averages.items() if adapter in name.split(".")}
    if not own:
        raise ValueError(
            f"adapter {adapter!r} isn't averaged: it has no tensors under its name that are, or "
            f"they needed no gradient and are shared with the model (share_frozen). Make the "
            f"average while the adapter is active, or name another one by adapter="
        )
    return own


def _check_places(own: Mapping[str, Tensor], trained: Mapping[str, Slot]) -> None:
    for name, tensor in own.items():
        device = trained[name].tensor.device
        if tensor.device != device:
            raise ValueError(
                f"the average of {name!r} is on {tensor.device} and the adapter on {device}, where "
                f"its average is needed too: make the average without device="
            )


def _partner(key: str, name: str, adapter: str, trained: Mapping[str, Slot]) -> str:
    """The name that a tensor of adapter ``name`` has in adapter ``adapter``."""
    path = key.split(".")
    for number in reversed([number for number, part in enumerate(path) if part == name]):
        other = ".".join([*path[:number], adapter, *path[number + 1 :]])
        if other in trained:
            return other
    raise ValueError(
        f"adapter {name!r} has a tensor {key!r}, and {adapter!r} has none of this kind; evaluate "
        f"such an adapter by averaged.swapped(model)"
    )


def _place(tensor: Tensor, slot: Slot) -> None:
    if slot.kind is not Kind.PARAMETER:
        slot.owner._buffers[slot.key] = tensor
        return
    is_parameter = isinstance(tensor, nn.Parameter)
    placed = tensor if is_parameter else nn.Parameter(tensor.detach(), requires_grad=False)
    slot.owner._parameters[slot.key] = placed  # type: ignore[assignment]
