"""Whether tensors of one name mean the same in all inputs, by the configurations beside them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_fused.merging.comparing import listed, some
from ema_fused.merging.recognising import Checkpoint

ADAPTER_CONFIGS = ("equal", "last")  # where the configuration of adapters may come from

_ADAPTER = "adapter_config.json"
_MODEL = "config.json"

# Of an adapter: how it was made, is used or begins, and nothing that its trained tensors need.
_HARMLESS = {
    *("auto_mapping", "inference_mode", "peft_version", "runtime_config", "megatron_core"),
    *("eva_config", "prompt_tuning_init", "prompt_tuning_init_text"),
}
# Values of these keys that are only what an adapter begins with. Others do more: "pissa" changes
# the base model, "bat" is another method.
_BEGINNINGS = {"init_lora_weights", "init_weights"}
_PLAIN_BEGINNINGS = (
    *(True, False, "gaussian", "eva", "orthogonal", "lycoris"),
    *("zero", "uniform", "kaiming_uniform", "xavier_uniform"),
)
# Lists without an order.
_SETS = {
    *("target_modules", "modules_to_save", "exclude_modules", "target_parameters"),
    *("layers_to_transform", "feedforward_modules"),
}
# Of a model: whatever they say, the tensors mean the same.
_OF_NO_MODEL = {
    *("dtype", "torch_dtype", "transformers_version", "_diffusers_version", "_name_or_path"),
    "optimization_step",  # diffusers counts its averages by it
}


def check_configurations(checkpoints: Sequence[Checkpoint], adapter_config: str) -> None:
    """Compares the configurations of adapters of PEFT, and of models.

    Adapters whose tensors have other meanings have no average: twice as large a ``lora_alpha``
    means half as large tensors. Of models, what differs is warned of.

    Args:
        checkpoints: what is merged.
        adapter_config: ``"last"`` takes that of the last adapter, whatever the others' are.

    Raises:
        ValueError: configurations of adapters differ, with each difference; or one is damaged.
    """
    adapters = _read(checkpoints, _ADAPTER)
    without = [str(one.path) for one in checkpoints if str(one.path) not in adapters]
    if adapters and without:
        warnings.warn(
            f"no adapter_config.json is beside the weights in {some(without)}, so whether "
            f"those tensors mean the same as the others' isn't known",
            stacklevel=3,
        )
    if adapter_config == "equal":
        differences = list(_differences(adapters, _of_adapter))
        if differences:
            raise ValueError(
                f"the configurations of the adapters differ in {len(differences)} keys that change "
                f"what the tensors mean, and nothing was written; adapter_config='last' "
                f"(--adapter-config last) takes the last adapter's:" + listed(differences)
            )
    differences = list(_differences(_read(checkpoints, _MODEL), _of_model))
    if differences:
        warnings.warn(
            f"config.json differs between the checkpoints in {len(differences)} keys, and only the "
            f"last's can go along; if these are different models, their average is of no use:"
            + listed(differences),
            stacklevel=3,
        )


def _read(checkpoints: Sequence[Checkpoint], name: str) -> dict[str, dict[str, Any]]:
    """The configurations of this name, by the paths of the checkpoints that have one."""
    found = {}
    for checkpoint in checkpoints:
        file = _folder_of(checkpoint, name) / name
        if file.is_file():
            found[str(checkpoint.path)] = _parsed(file)
    return found


def _folder_of(checkpoint: Checkpoint, name: str) -> Path:
    # The weights of an adapter may be named as a file. A config.json beside a file is often another
    # one's, and isn't carried over.
    is_beside = name == _ADAPTER and checkpoint.path.is_file()
    return checkpoint.path.parent if is_beside else checkpoint.path


def _parsed(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no dictionary in JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no dictionary in JSON ({type(found).__name__}); copy it again")
    return found


def _differences(
    configurations: Mapping[str, dict[str, Any]],
    meaning: Callable[[dict[str, Any]], dict[str, Any]],
) -> Iterator[str]:
    """Each key whose values differ, with the values and whose they are."""
    every = {path: meaning(one) for path, one in configurations.items()}
    for key in dict.fromkeys(key for one in every.values() for key in one):
        values: dict[str, list[str]] = {}
        for path, one in every.items():
            value = json.dumps(one[key], sort_keys=True) if key in one else "not set"
            values.setdefault(value, []).append(path)
        if len(values) > 1:
            told = "; ".join(f"{value} in {some(paths)}" for value, paths in values.items())
            yield f"{key!r}: {told}"


def _of_adapter(configuration: dict[str, Any]) -> dict[str, Any]:
    """What gives the tensors of an adapter their meaning; what is off or empty isn't in it.

    An older PEFT doesn't write the keys of a later one, whose usual values are such.
    """
    found = {}
    for key, value in configuration.items():
        if key in _HARMLESS or "dropout" in key:
            continue
        if key in _BEGINNINGS and value in _PLAIN_BEGINNINGS:
            continue
        if key == "qalora_group_size" and not configuration.get("use_qalora"):
            continue
        if (key, value) == ("revision", "main") or value is None or value is False:
            continue
        if value in ("none", [], {}):
            continue
        found[key] = _plain(key, value)
    return found


def _plain(key: str, value: Any) -> Any:
    if key in _SETS and not isinstance(value, str):
        return sorted(value, key=str) if isinstance(value, list) else [value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _of_model(configuration: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """What may change a model, by dotted names: parts of a model have configurations inside."""
    found: dict[str, Any] = {}
    for key, value in configuration.items():
        if key in _OF_NO_MODEL:
            continue
        if isinstance(value, dict) and value:
            found |= _of_model(value, f"{place}{key}.")
        elif value is not None:
            found[place + key] = value
    return found
