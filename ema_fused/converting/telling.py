"""Conversions and inspections in words, in tables and in a picture."""

from __future__ import annotations

from pathlib import Path

from ema_fused.converting.average_state import AverageState, listed, told
from ema_fused.converting.conversion import Conversion
from ema_fused.converting.inspecting import Inspection, Layer
from ema_fused.converting.own_parts import MEAN, names_of
from ema_fused.converting.recognising_averages import FORMATS
from ema_fused.saving.whole_files import written_whole

_ROWS = 60


def of_conversion(done: Conversion) -> str:
    """What was converted, and what was lost."""
    steps = "steps unknown" if done.steps is None else f"steps {done.steps}"
    lines = [f"{done.output}: {done.tensors} tensors from {done.source} to {done.target}, {steps}"]
    lines += [f"  lost or made up: {one}" for one in done.lost]
    return "\n".join(lines)


def of_inspection(found: Inspection, *, all_layers: bool = False) -> str:
    """All that was found, as text."""
    blocks = [_facts(found), _table(found, all_layers=all_layers), _findings(found)]
    return "\n\n".join(block for block in blocks if block)


def _facts(found: Inspection) -> str:
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in found.dtypes.items())
    lines = [
        ("format", _format(found)),
        ("tensors", f"{len(found.tensors):,}"),
        ("elements", f"{found.elements:,} ({dtypes})"),
        ("bytes", f"{found.bytes:,}"),
        *_numbers(found.state),
        ("compared with", found.compared_with or "nothing: the weights of the model aren't here"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _format(found: Inspection) -> str:
    if found.state.title:
        return found.state.title
    if found.format not in FORMATS:
        return "weights, no average of a known format"
    where = f" at key {found.state.key!r}" if found.state.key else ""
    return f"{found.format}: {FORMATS[found.format].title}{where}"


def _numbers(state: AverageState) -> list[tuple[str, str]]:
    if state.format not in FORMATS:
        return [] if state.steps is None else [("steps", f"{state.steps:,}")]
    decay = "not kept"
    if state.decay is not None:
        decay = f"{state.decay:g} (momentum {1 - state.decay:.6g})"
    lines = [
        ("steps", "not kept" if state.steps is None else f"{state.steps:,}"),
        ("decay", decay),
    ]
    if state.warm_up is not None:
        lines.append(("warm-up", told(state.warm_up)))
    if state.kind == MEAN:
        lines.append(("kind", "mean of all values"))
    if state.more:
        lines.append(("beside it", ", ".join(names_of(state.more))))
    return lines


def _table(found: Inspection, *, all_layers: bool) -> str:
    layers = found.layers
    shown = layers if all_layers or len(layers) <= _ROWS else layers[:_ROWS]
    rows = [*shown, found.total] if layers else []
    width = max((len(layer.name) for layer in rows), default=0)
    heading = (
        f"{'layer':<{width}}  {'elements':>14}  {'norm':>11}  {'distance':>11}  {'relative':>11}"
    )
    lines = [heading, *(_row(layer, width) for layer in rows)]
    if len(shown) < len(layers):
        lines.insert(-1, f"... and {len(layers) - len(shown)} layers more: --all-layers shows them")
    return "\n".join(lines) if rows else ""


def _row(layer: Layer, width: int) -> str:
    distance = "" if layer.distance is None else f"{layer.distance:.4g}"
    relative = "" if layer.relative is None else f"{layer.relative:.3g}"
    return (
        f"{layer.name:<{width}}  {layer.elements:>14,}  {layer.norm:>11.4g}  {distance:>11}  "
        f"{relative:>11}"
    )


def _findings(found: Inspection) -> str:
    named = [
        ("NaN in", found.with_nan),
        ("infinity in", found.with_infinity),
        ("all 0", found.zero),
        (
            "equal, while others differ (frozen, copied, or never updated)",
            found.never_updated,
        ),
        ("only here, or of another shape there", list(found.only_here)),
        ("only there", list(found.only_there)),
    ]
    lines = [f"{what}: {listed(names)}" for what, names in named if names]
    return "\n".join([*lines, *found.state.notes])


def draw(found: Inspection, path: Path) -> None:
    """Draws the relative distances by layer, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to take a distance to.
        FileExistsError: there is something else than a PNG at ``path``.
    """
    if path.exists() and not _is_png(path):
        raise FileExistsError(
            f"{path} exists and is no PNG, and the picture isn't drawn over it; name another file"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the picture needs matplotlib, which can't be imported ({error}): "
            f"pip install 'ema_fused[posthoc]'"
        ) from error
    layers = [layer for layer in found.layers if layer.relative is not None]
    if not layers:
        raise ValueError(
            f"{found.path} has no weights beside an average, so there is no distance to draw; pass "
            f"a second checkpoint"
        )
    figure = Figure(figsize=(8, max(2.5, min(60, 1 + 0.22 * len(layers)))), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(layers)), [layer.relative or 0.0 for layer in layers], color="C0")
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    axes.invert_yaxis()
    if any(layer.relative for layer in layers):
        axes.set_xscale("log")
    axes.set_xlabel("distance over norm")
    axes.set_title(f"{found.path.name}: distance to {found.compared_with}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def _is_png(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"
