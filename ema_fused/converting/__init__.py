"""States of averages in the formats of other packages: read, converted, inspected.

:mod:`.recognising_averages` says whose format a state is in, by its content; each family of formats
has a file, which reads it into an :class:`~.average_state.AverageState` and builds it from one. All
of them are plain dictionaries here: no package is imported to read or write its format.
May import ``engine``, ``merging`` and ``saving``.
"""

from __future__ import annotations

from ema_fused.converting.average_state import AverageState
from ema_fused.converting.conversion import Conversion, convert
from ema_fused.converting.inspecting import Inspection, inspect
from ema_fused.converting.reading import read_average

__all__ = ["AverageState", "Conversion", "Inspection", "convert", "inspect", "read_average"]
