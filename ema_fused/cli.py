"""The commands ``python -m ema_fused ...``.

``info`` prints the facts that a bug report needs; ``bench`` measures; ``reconstruct`` makes an
average from snapshots; ``merge`` averages checkpoints; ``convert`` and ``inspect`` read averages in
checkpoints.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import ema_fused
from ema_fused.converting import commands as converting
from ema_fused.engine import backends
from ema_fused.merging import command as merging
from ema_fused.posthoc.reconstruction import Reconstruction

Line = tuple[str, str]


def _versions() -> Iterator[Line]:
    yield "ema_fused", ema_fused.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        kind = f"ROCm {torch.version.hip}"
    yield "torch", f"{torch.__version__} ({kind})"


def _compiled() -> Iterator[Line]:
    native = backends.native()
    if native is None:
        yield "compiled", f"no: {backends.why_not('cpu')}"
        return
    built = native.build_info()
    yield "compiled", f"{built['version']}, {built['compiler']}, {built['build_type']}"
    isas = built["cpu_isas"].replace(";", ", ")
    yield "cpu kernels", f"{isas}; this processor gets {native.cpu_isa()}"
    architectures = built["cuda_architectures"].replace(";", ", ")
    architectures = architectures.replace("-real", "").replace("-virtual", " as PTX")
    compiler = built["cuda_compiler"]
    yield "cuda kernels", f"{compiler}: {architectures}" if compiler else "not compiled"
    if native.missing_doors():
        yield "missing in torch", native.missing_doors()


def _devices() -> Iterator[Line]:
    yield "cpu", f"{platform.machine()}, torch uses {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            yield f"cuda:{index}", f"{properties.name}, compute capability {capability}"
    else:
        yield "cuda", "no device that torch can use"


def _served() -> Iterator[Line]:
    """Which backend serves tensors on each device; where it isn't the native one, the reason."""
    devices = [torch.device("cpu")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices += [torch.device("cuda", index) for index in range(count)]
    for device in devices:
        reason = backends.why_not_on(device)
        yield (
            f"{device} tensors",
            f"{device.type} (native kernel)" if reason is None else f"foreach, because {reason}",
        )
    if not count:
        yield "cuda tensors", f"none can exist here: {backends.why_not('cuda')}"
    try:
        pinned = backends.pinned(None)
    except (RuntimeError, ValueError) as error:
        yield "EMA_FUSED_BACKEND", str(error)
    else:
        if pinned is not None:
            yield "EMA_FUSED_BACKEND", f"{pinned} for everything"


def info() -> str:
    """Versions, what was compiled, the devices seen, and which backend serves which tensors."""
    sections = (_versions(), _compiled(), _devices(), _served())
    blocks = [list(section) for section in sections]
    width = max(len(name) for block in blocks for name, _ in block)
    return "\n\n".join(
        "\n".join(f"{name:<{width}}  {value}" for name, value in block) for block in blocks
    )


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], object] | None]:
    """A bar on the terminal, if there is one and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    # disable=None: only where stderr is a terminal.
    with tqdm(total=total, unit="B", unit_scale=True, desc="averaging", disable=None) as bar:
        yield bar.update


def reconstruct(
    run_dir: Path, sigma_rel: float, output: Path, step: int | None, picture: Path | None
) -> str:
    """Writes the average of width ``sigma_rel``; returns the lines to print."""
    made = Reconstruction(run_dir, sigma_rel, step)
    with _progress_bar(made.bytes) as progress:
        made.save(output, progress)
    lines = [
        f"{output}: sigma_rel {sigma_rel:g} at step {made.steps} from {len(made.snapshots)} "
        f"snapshots, {made.bytes:,} bytes",
        f"the profile reached is off by {made.error:.2g} of the one asked for",
    ]
    if made.left_out:
        more = ", ..." if len(made.left_out) > 6 else ""
        lines.append(
            f"{len(made.left_out)} parameters that weren't averaged aren't in it: "
            f"{', '.join(made.left_out[:6])}{more}"
        )
    if picture is not None:
        made.picture(picture)
        lines.append(f"{picture}: both profiles")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ema_fused", description=ema_fused.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, compiled and used: for a bug report")
    making = commands.add_parser(
        "reconstruct",
        help="an average of any width from the snapshots of PowerFunctionEMA",
        description="Makes the power-function average of any width from the snapshots of a run.",
    )
    making.add_argument("run_dir", type=Path, help="the folder with the snapshots")
    making.add_argument(
        "--sigma-rel", type=float, required=True, help="the width wanted, in (0, 0.2887)"
    )
    making.add_argument(
        "-o", "--output", type=Path, required=True, help="the safetensors file to write"
    )
    making.add_argument("--step", type=int, help="that of a snapshot; without it the last")
    making.add_argument(
        "--picture", type=Path, help="a PNG to draw the profiles asked for and reached in"
    )
    merging.add_to(commands)
    measuring = commands.add_parser(
        "bench",
        help="how fast updates are on this machine, beside torch's",
        description="Times our updates beside torch's, in turns, after checking that both give the "
        "same; prints ratios of medians. Takes about a minute.",
    )
    measuring.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: CUDA if there is one"
    )
    measuring.add_argument(
        "--model",
        metavar="MODULE:NAME",
        help="your own model, as my.package:build: a model, or a function that makes one",
    )
    measuring.add_argument(
        "--busy",
        action="store_true",
        help="ours beside foreach while other processes take all cores, and nothing else",
    )
    measuring.add_argument("--json", type=Path, metavar="FILE", help="write all results here too")
    converting.add_commands(commands)
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _run(given: argparse.Namespace) -> int:
    if given.command == "bench":
        from ema_fused.bench.short import bench  # imported here: only this command needs it

        return bench(given.device, given.model, given.json, busy=given.busy)
    if given.command == "reconstruct":
        done = reconstruct(given.run_dir, given.sigma_rel, given.output, given.step, given.picture)
    elif given.command == "merge":
        done = merging.run(given)
    elif given.command == "convert":
        done = converting.run_convert(given)
    elif given.command == "inspect":
        done = converting.run_inspect(given)
    else:
        done = info()
    sys.stdout.write(done + "\n")
    return 0
