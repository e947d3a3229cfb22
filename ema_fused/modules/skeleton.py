"""The tensors of a model under their names, in bare modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ema_fused.engine.dtensors import class_if_imported
from ema_fused.modules.kept_elsewhere import KeptElsewhere
from ema_fused.modules.sources import Sources

# The child of a wrapper that is the wrapped module itself. The wrapper may be removed later.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# Wrappers of frameworks: module, class, and the child that is the wrapped module. Told by
# their classes, as other modules have children of these names.
_OF_FRAMEWORKS = (
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_original_module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_original_module"),
    ("opacus.grad_sample.gsm_base", "AbstractGradSampleModule", "_module"),
    ("opacus.distributed", "DifferentiallyPrivateDistributedDataParallel", "module"),
)

Copy = Callable[[str, Tensor], Tensor]


def skeleton_of(
    model: nn.Module,
    copy: Copy,
    *,
    sources: Sources | None = None,
    left_out: Iterable[str] = (),
) -> nn.Module:
    """A tree of bare modules with copies of the parameters and buffers of ``model``.

    Nothing else of the model is copied, so it works for models that can't be deep-copied. Tied
    tensors stay tied, and wrappers are left out: the names are those of the plain model. Of tensors
    that accelerate keeps elsewhere, the kept ones are copied.

    Args:
        copy: makes the copy of a tensor, given its name and the tensor; for a parameter, an
            ``nn.Parameter``.
        sources: what is copied in place of the model's own tensors.
        left_out: names of parameters that aren't averaged: of them, what passes read is copied.
    """
    return _Copier(copy, KeptElsewhere(model, sources=sources, left_out=left_out)).module(model, "")


class _Copier:
    """Copies each module and tensor once; one that occurs again gets the same copy."""

    def __init__(self, copy: Copy, kept: KeptElsewhere) -> None:
        self._copy = copy
        self._kept = kept
        self._modules: dict[nn.Module, nn.Module] = {}
        self._tensors: dict[Tensor, Tensor] = {}

    def module(self, original: nn.Module, path: str) -> nn.Module:
        known = self._modules.get(original)
        if known is not None:
            return known
        inside = wrapped_by(original)
        if inside is not None:
            bare = self._modules[original] = self.module(inside, path)
            return bare
        bare = self._modules[original] = nn.Module()
        for name, parameter in original._parameters.items():
            copied = None if parameter is None else self._tensor(original, name, parameter, path)
            assert copied is None or isinstance(copied, nn.Parameter)
            bare.register_parameter(name, copied)
        for name, buffer in original._buffers.items():
            persistent = name not in original._non_persistent_buffers_set
            copy = None if buffer is None else self._tensor(original, name, buffer, path)
            bare.register_buffer(name, copy, persistent=persistent)
        for name, child in original._modules.items():
            part = None if child is None else self.module(child, f"{path}{name}.")
            bare.add_module(name, part)
        return bare

    def _tensor(self, owner: nn.Module, name: str, held: Tensor, path: str) -> Tensor:
        tensor = self._kept.find(owner, name, held, path + name)
        if tensor not in self._tensors:
            self._tensors[tensor] = self._copy(path + name, tensor)
        return self._tensors[tensor]


def without_frameworks(model: nn.Module) -> nn.Module:
    """What Lightning Fabric or opacus have wrapped; ``model`` itself if they haven't.

    They keep their machinery (strategies, hooks for gradients) beside it, which no copy needs, and
    Fabric's wrapper can't load what it saves.
    """
    found, part = model, model
    while (inside := wrapped_by(part)) is not None:
        if _wrapped_by_framework(part) is not None:
            found = inside
        part = inside
    return found


def _wrapped_by_framework(module: nn.Module) -> nn.Module | None:
    for where, name, child in _OF_FRAMEWORKS:
        cls = class_if_imported(where, name)
        if cls is not None and isinstance(module, cls):
            inside: nn.Module | None = module._modules[child]
            return inside
    return None


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """The module that ``module`` wraps, if it is a wrapper."""
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        inside: nn.Module = module.module
        return inside
    wrapped = _wrapped_by_framework(module)
    if wrapped is not None:
        return wrapped
    if any(
        tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())
    ):
        return None
    return next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
