"""Deep copies of models, of those too that hold results of computations; errors name the part."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_logger = logging.getLogger("ema_fused")

# The classes whose plain tensors a line in the log has named.
_told: weakref.WeakSet[type[nn.Module]] = weakref.WeakSet()

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` of a model, which is unchanged whatever happens.

    A tensor with a gradient history, which deepcopy refuses, is copied without the history: the
    weight that the old ``torch.nn.utils.weight_norm``, ``spectral_norm`` and pruning compute in
    each forward pass and keep in a plain attribute, the last output, the state of a recurrence.

    Args:
        memo: as of ``copy.deepcopy``: what is to be taken as the copy of an object, by its id.

    Raises:
        Exception: of the class that deepcopy raised; the message names module and attribute.
    """
    known = dict(memo)
    try:
        # Copies of TorchScript's parameters would have a history otherwise.
        with torch.no_grad(), _WithoutHistory():
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        _explain(model, known, error)
    _tell_of_plain_tensors(model)
    return copied


class _WithoutHistory(TorchFunctionMode):
    """Lets ``Tensor.__deepcopy__`` copy what it refuses: tensors with a gradient history, and
    compressed sparse ones (of CSR and its like), which have no storage.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__deepcopy__ and (
            args[0].grad_fn is not None or args[0].layout in _COMPRESSED
        ):
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))


def _own_attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Path, module, name and value of what modules keep beside parameters, buffers, children."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield f"{path}.{name}" if path else name, module, name, value


def _explain(model: nn.Module, memo: dict[int, Any], error: Exception) -> NoReturn:
    """Raises an error of the same class that names the tensor or attribute that can't be copied."""
    where = f"a {type(model).__name__}"
    # Modules and tensors count as copied: an attribute that refers to one is not the reason.
    for held in (*model.modules(), *model.parameters(), *model.buffers()):
        memo[id(held)] = held
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_copied(tensor, {}):
            where = f"{path!r} of the model ({type(tensor).__name__})"
            break
    else:
        for path, module, _, value in _own_attributes(model):
            if not _is_copied(value, dict(memo)):
                where = (
                    f"{path!r} of the model ({type(value).__name__} in a {type(module).__name__})"
                )
                break
    message = (
        f"{where} can't be deep-copied: {error}. Keep the average without a copy of the module: "
        f"ema_fused.AveragedWeights(model, ...)"
    )
    try:
        explained = type(error)(message)
    except Exception:  # a class with other arguments
        explained = RuntimeError(message)
    raise explained from error


def _is_copied(value: object, memo: dict[int, Any]) -> bool:
    try:
        with torch.no_grad(), _WithoutHistory():
            copy.deepcopy(value, memo)
    except Exception:
        return False
    return True


def _tell_of_plain_tensors(model: nn.Module) -> None:
    """Logs, once for each class, which tensors of its modules an average doesn't follow."""
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[type[nn.Module], dict[str, None]] = {}
    for _, module, name, value in _own_attributes(model):
        if not isinstance(value, Tensor) or id(value) in registered or type(module) in _told:
            continue
        # Those that a forward pass computes: the old norms, pruning, stored outputs.
        computed = {f"{name}_orig", f"{name}_g"} & module._parameters.keys()
        if value.is_floating_point() and value.grad_fn is None and not computed:
            found.setdefault(type(module), {})[name] = None
    for cls, names in found.items():
        _told.add(cls)
        _logger.warning(
            f"{cls.__name__} keeps {', '.join(names)} as plain tensors: their copies in the "
            f"average stay as they are now. Tensors that change in training are followed if they "
            f"are registered by register_buffer()"
        )
