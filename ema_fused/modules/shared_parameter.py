"""Averaged parameters in the model's memory, or of a class of their own."""

from __future__ import annotations

import copy
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.engine.dtensors import is_sharded
from ema_fused.engine.memory import is_wrapper

_Data: Any = Tensor.data
# The modules of torch.compile: they ask of what class the tensor of a parameter is, and write none.
_COMPILER = ("torch._functorch.", "torch._dynamo.", "torch._subclasses.", "torch.fx.")
# Of Tensor's own methods that end in an underscore these don't write elements.
_HARMLESS = {"requires_grad_", "rename_", "share_memory_", "retain_grad", "detach_"}


def _plain(tensor: Tensor) -> Tensor:
    """An alias of ``tensor`` of the plain class."""
    alias: Tensor = _Data.__get__(tensor)
    return alias.as_subclass(Tensor)


class SharedParameter(nn.Parameter):
    """A parameter of an average in the memory of the model's frozen one.

    Whoever writes to it by its methods or through ``.data`` (PEFT's ``merge_and_unload``,
    ``load_state_dict``) doesn't write to the model: the elements are copied first, and it becomes
    an ``nn.Parameter`` like any other. Reading costs what it costs elsewhere: no operation of torch
    passes through here. What writes by a function of torch (``torch.fill_``, ``out=``) or through
    another view (``detach()``, ``view()``) writes to the model, and the next update warns of it.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def own(self) -> None:
        """Gives it memory of its own, with the elements that it has now."""
        own = _plain(self).clone()
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.data = own

    @property
    def data(self) -> Tensor:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_COMPILER):
            return _plain(self)
        seen: _SharedData = _plain(self).as_subclass(_SharedData)
        seen.shared_by = self
        return seen

    @data.setter
    def data(self, other: Tensor) -> None:
        _Data.__set__(self, _plain(other))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(_plain(self).clone(), requires_grad=False)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(_plain(self), requires_grad=False).__reduce_ex__(protocol)


class _SharedData(Tensor):
    """``.data`` of a :class:`SharedParameter`: written to, it writes to what that owns then."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    shared_by: Tensor

    def own(self) -> None:
        parameter = self.shared_by
        if isinstance(parameter, SharedParameter):
            parameter.own()
        self.__class__ = Tensor  # type: ignore[assignment]
        _Data.__set__(self, _plain(parameter))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)


def _writes(name: str) -> bool:
    if name.endswith("__"):
        in_place = name.startswith("__i") and hasattr(Tensor, name.replace("__i", "__", 1))
        return in_place or name == "__setitem__"
    return name.endswith("_") and not name.startswith("_") and name not in _HARMLESS


def _after_owning(name: str) -> Callable[..., Any]:
    def write(self: Any, *arguments: Any, **options: Any) -> Any:
        if name == "copy_" and _is_there_already(self, *arguments):
            return self
        self.own()
        return getattr(self, name)(*arguments, **options)

    write.__name__ = name
    return write


def _is_there_already(tensor: Tensor, other: object, *_: object) -> bool:
    """Whether a copy would write what is there: then nothing needs memory of its own."""
    return (
        isinstance(other, Tensor)
        and (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, tensor.device)
        and torch.equal(_plain(tensor), other)
    )


for _name in filter(_writes, dir(Tensor)):
    for _kind in (SharedParameter, _SharedData):
        setattr(_kind, _name, _after_owning(_name))


def has_own_class(parameter: Tensor) -> bool:
    """Whether it is of a class of its own, which may know more than the elements."""
    return type(parameter) not in (nn.Parameter, SharedParameter) and not is_sharded(parameter)


def shared(parameter: Tensor, *, trains: bool = False) -> nn.Parameter:
    """A parameter for an average, in the memory of ``parameter``.

    One of a class of its own (bitsandbytes' ``Int8Params``) stays of that class, with the
    attributes that it has now; a wrapper (torchao's weights) that is frozen is returned itself.

    Args:
        trains: the model may write it: it has one version counter with ``parameter``, by which
            autograd refuses a backward pass through values that were written since.
    """
    assert isinstance(parameter, nn.Parameter)
    if is_sharded(parameter):
        return nn.Parameter(parameter.detach(), requires_grad=False)
    if not has_own_class(parameter):
        elements = parameter.detach() if trains else _plain(parameter)
        return SharedParameter(elements, requires_grad=False)
    if is_wrapper(parameter):
        # Not itself, whose requires_grad an average's is not.
        return nn.Parameter(parameter.detach(), requires_grad=False) if trains else parameter
    # Another object: bitsandbytes' layers take attributes away from their weight.
    alias: nn.Parameter = Tensor._make_subclass(type(parameter), _plain(parameter), False)
    vars(alias).update(vars(parameter))
    return alias


def copy_of_own_class(name: str, parameter: nn.Parameter, memo: dict[int, Any]) -> Tensor:
    """A deep copy of a parameter that :func:`has_own_class`, of that class, with its attributes.

    Raises:
        TypeError: the class can't be copied.
    """
    kind = type(parameter)
    standard = kind.__deepcopy__ in (nn.Parameter.__deepcopy__, Tensor.__deepcopy__)
    if standard and not is_wrapper(parameter):
        # Tensor's __deepcopy__ asks for a new_empty() of that class, and Parameter's calls a
        # constructor of its own arguments and leaves attributes out.
        copied = Tensor._make_subclass(kind, _plain(parameter).clone(), False)
        vars(copied).update(copy.deepcopy(vars(parameter), memo))
        return copied
    try:
        return copy.deepcopy(parameter, memo)
    except Exception as error:  # whatever a class raises
        raise TypeError(
            f"{name!r} is a {kind.__name__}, which can't be copied: "
            f"{textwrap.shorten(str(error), 200)}. Keep its average without a copy of the module: "
            f"ema_fused.AveragedWeights(model, ...); frozen parameters can be shared with the "
            f"model instead: share_frozen=True"
        ) from error


def writes_through(parameter: Tensor, before: int | None = -1) -> int | None:
    """How often a shared parameter was written where its elements are, in the model's memory.

    None, if it isn't one, or wasn't one when it was asked ``before``.
    """
    if before is None or type(parameter) is not SharedParameter:
        return None
    return parameter._version


def protect(parameter: Tensor) -> None:
    """Makes an ``nn.Parameter`` that has been put into another's memory a shared one."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = SharedParameter


def release(parameter: Tensor) -> None:
    """The reverse, of one that has been given memory of its own."""
    if type(parameter) is SharedParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
