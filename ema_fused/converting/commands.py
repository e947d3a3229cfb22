"""The commands ``python -m ema_fused convert`` and ``inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ema_fused.converting.conversion import convert
from ema_fused.converting.inspecting import inspect
from ema_fused.converting.recognising_averages import FORMATS, TARGETS, WEIGHTS
from ema_fused.converting.telling import draw, of_conversion, of_inspection


def add_commands(commands: Any) -> None:
    """Adds both to the subparsers of the command line."""
    converting = commands.add_parser(
        "convert",
        help="the average in a checkpoint, in the format of another package",
        description="Finds the average in a checkpoint and writes it as another package keeps its "
        "own; prints what that format has no place for.",
    )
    converting.add_argument("input", type=Path, metavar="IN", help="a file or folder")
    converting.add_argument("--to", required=True, choices=TARGETS, help="the format to write")
    converting.add_argument(
        "-o", "--output", type=Path, required=True, help="the file or folder to write"
    )
    converting.add_argument("--steps", type=int, help="updates so far, if IN doesn't keep them")
    converting.add_argument("--decay", type=float, help="1 - momentum, if IN doesn't keep it")
    converting.add_argument(
        "--raw", type=Path, metavar="PATH", help="a checkpoint with the model's own weights"
    )
    converting.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="the names of the parameters, for lists: one a line, or a state_dict of the model",
    )
    converting.add_argument(
        "--model", type=Path, metavar="FOLDER", help="with the config.json of the model"
    )
    _add_finding(converting)
    inspecting = commands.add_parser(
        "inspect",
        help="what a checkpoint holds, and how far its average is from the weights",
        description="Looks at all tensors of a checkpoint: whose average it is, its distance to "
        "the weights by layer, and tensors that are NaN, infinite, 0 or were never updated.",
    )
    inspecting.add_argument("input", type=Path, metavar="PATH", help="a file or folder")
    inspecting.add_argument(
        "other", type=Path, nargs="?", metavar="PATH2", help="take the distance to this one"
    )
    inspecting.add_argument(
        "--picture", type=Path, metavar="FILE", help="a PNG to draw the distances in"
    )
    inspecting.add_argument("--all-layers", action="store_true", help="a row for every layer")
    _add_finding(inspecting)


def _add_finding(command: argparse.ArgumentParser) -> None:
    command.add_argument("--key", help="where the average is in nested dictionaries, as ema.state")
    command.add_argument(
        "--from",
        dest="source",
        choices=[*FORMATS, WEIGHTS],
        help="the format, if it isn't to be found; weights: plain weights that are averages",
    )
    command.add_argument(
        "--averages-in",
        choices=("parameters", "buffers"),
        help="of mmcv 1.x, whose checkpoints don't tell",
    )


def run_convert(given: argparse.Namespace) -> str:
    """Converts; returns the lines to print."""
    done = convert(
        given.input,
        given.to,
        given.output,
        key=given.key,
        source=given.source,
        steps=given.steps,
        decay=given.decay,
        raw=given.raw,
        names=given.names,
        folder=given.model,
        averages_in=given.averages_in,
    )
    return of_conversion(done)


def run_inspect(given: argparse.Namespace) -> str:
    """Inspects; returns the lines to print."""
    found = inspect(
        given.input,
        given.other,
        key=given.key,
        source=given.source,
        averages_in=given.averages_in,
    )
    text = of_inspection(found, all_layers=given.all_layers)
    if given.picture is not None:
        draw(found, given.picture)
        text += f"\n\n{given.picture}: the distances"
    return text
