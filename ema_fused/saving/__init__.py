"""Files of averages: sharded checkpoints, and safetensors for inference; all written atomically.

Users call :mod:`.checkpoints` and :mod:`.export`, which use :mod:`.whole_files`,
:mod:`.safetensors_files`, :mod:`.replicas` and :mod:`.first_process`. May import ``engine`` and
``modules``. Public names are loaded when they are first used, because
``torch.distributed.checkpoint`` takes most of a second to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ema_fused.saving.checkpoints import averaged_state_dict, load_averaged_state_dict
    from ema_fused.saving.export import export_safetensors, model_state_dict

__all__ = [
    "averaged_state_dict",
    "export_safetensors",
    "load_averaged_state_dict",
    "model_state_dict",
]

_MODULE_OF = {
    "averaged_state_dict": "checkpoints",
    "export_safetensors": "export",
    "load_averaged_state_dict": "checkpoints",
    "model_state_dict": "export",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
