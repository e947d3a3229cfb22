"""What an average takes of a training step of a sharded model, in processes of a CPU.

    python -m benchmarks.sharded_step [--ranks 2] [--layers 24] [--rounds 20] [--repeats 3] ...

A small transformer is trained under FSDP2 on gloo. After each step one of the averages is updated,
in turns, so all see the same training and the caches as it leaves them. Each process times its
forward, backward and optimizer step by the clock; an update, which waits for nobody, by the time
that its thread has the processor, so that a busy machine adds nothing to it. The slowest process
counts, as it is waited for. ``--write FILE`` puts the table into a page.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import marked
from benchmarks.large_models import above_0
from benchmarks.sharded import foreach_lerp, loop
from ema_fused import AveragedWeights
from ema_fused.bench.contenders import WEIGHT
from ema_fused.bench.environment import environment

PROGRAM = "sharded_step.py"  # in the markers of the page
OURS = "ema_fused `AveragedWeights`"
WALKED = "torchtitan's `EMA`: walks the model, looks the averages up, foreach lerp of DTensors"
LISTS = "... its foreach lerp alone, of lists that are kept"
LOOP = "NeMo Automodel's way: a loop, `mul_().add_()` of DTensors"

_WIDTH, _TOKENS, _BATCH, _WORDS = 64, 32, 4, 512
_WARM_UP = 3  # rounds that aren't counted

Update = Callable[[], object]


# ---- The training --------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of a transformer: 12 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_hidden = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.inputs = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.outputs = nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.inputs(self.before_attention(states)).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.outputs(attended)
        hidden: Tensor = self.down(nn.functional.gelu(self.up(self.before_hidden(states))))
        return states + hidden


class Transformer(nn.Module):
    """Predicts the next word of each word, all in one list."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, _WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _WORDS)

    def forward(self, words: Tensor) -> Tensor:
        states = self.words(words)
        for block in self.blocks:
            states = block(states)
        logits: Tensor = self.head(self.norm(states).flatten(0, 1))
        return logits


class Training:
    """A sharded model, and the averages of it that take turns."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(layers)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._random = torch.Generator().manual_seed(dist.get_rank())
        self.updates = self._averages()

    def step(self) -> None:
        words = torch.randint(_WORDS, (_BATCH, _TOKENS + 1), generator=self._random)
        logits = self.model(words[:, :-1])
        nn.functional.cross_entropy(logits, words[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _averages(self) -> dict[str, Update]:
        """The update of each average by its name; checked to give the same."""
        model = self.model
        sources: list[Any] = [parameter.detach() for parameter in model.parameters()]
        averaged = AveragedWeights(model, momentum=WEIGHT)
        averaged.update_parameters(model)  # the first call copies
        state = {p: {"ema_params": p.detach().clone()} for p in model.parameters()}
        kept, looped = ([source.clone() for source in sources] for _ in range(2))

        def walk() -> None:
            parameters = [p for p in model.parameters() if p.requires_grad]
            foreach_lerp([state[p]["ema_params"] for p in parameters], parameters)

        updates: dict[str, Update] = {
            OURS: lambda: averaged.update_parameters(model),
            WALKED: torch.no_grad()(walk),
            LISTS: torch.no_grad()(lambda: foreach_lerp(kept, sources)),
            LOOP: torch.no_grad()(lambda: loop(looped, sources)),
        }
        self.step()
        for update in updates.values():
            update()
        ours = list(averaged.weights.values())
        for others in ([*(one["ema_params"] for one in state.values())], kept, looped):
            for one, other in zip(ours, others, strict=True):
                torch.testing.assert_close(one.to_local(), other.to_local())  # type: ignore[attr-defined]
        return updates


def measure(rank: int, ranks: int, meeting: str, options: argparse.Namespace, answers: Any) -> None:
    """One process: sends the seconds of all its steps and updates."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    training = Training(options.layers)
    parameters = list(training.model.parameters())
    counts = len(parameters), sum(parameter.numel() for parameter in parameters)
    passes = []
    for _ in range(options.repeats):
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in training.updates}
        for number in range(-_WARM_UP, options.rounds):
            for name, update in training.updates.items():
                start = time.perf_counter()
                training.step()
                trained = time.perf_counter() - start
                start = time.thread_time()
                update()
                if number >= 0:
                    samples[name].append((trained, time.thread_time() - start))
        passes.append(samples)
    answers.put((rank, counts, passes))
    dist.barrier()
    dist.destroy_process_group()


# ---- The result ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Medians in seconds, one for each repetition."""

    steps: list[float]  # without an update
    updates: dict[str, list[float]]
    tensors: int
    elements: int

    def update(self, name: str) -> float:
        return statistics.median(self.updates[name])

    def share(self, name: str) -> float:
        """Of a step with its update."""
        return self.update(name) / (statistics.median(self.steps) + self.update(name))

    def ratios(self, name: str) -> list[float]:
        """Of the times of an update and of ours, in each repetition."""
        pairs = zip(self.updates[name], self.updates[OURS], strict=True)
        return [theirs / ours for theirs, ours in pairs]


def run(options: argparse.Namespace) -> Result:
    """Starts the processes and gathers what they measure."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.ranks, f"file://{folder}/meeting", options, answers)
        processes = [
            context.Process(target=measure, args=(rank, *arguments), daemon=True)
            for rank in range(options.ranks)
        ]
        for process in processes:
            process.start()
        found = sorted(_answers(processes, answers), key=lambda answer: int(answer[0]))
        for process in processes:
            process.join()
    return _result([passes for _, _, passes in found], *found[0][1])


def _answers(processes: Sequence[Any], answers: Any) -> list[Any]:
    found: list[Any] = []
    while len(found) < len(processes):
        if any(process.exitcode for process in processes):
            raise SystemExit("a process failed; its message is above")
        if not answers.empty():
            found.append(answers.get())
        time.sleep(0.05)
    return found


def _result(by_rank: list[list[dict[str, list[tuple[float, float]]]]], *counts: int) -> Result:
    steps, updates = [], {name: list[float]() for name in by_rank[0][0]}
    for repetition in zip(*by_rank, strict=True):
        slowest: list[float] = []
        for name, medians in updates.items():
            rounds = list(zip(*(samples[name] for samples in repetition), strict=True))
            slowest += [max(trained for trained, _ in samples) for samples in rounds]
            medians.append(statistics.median(max(u for _, u in samples) for samples in rounds))
        steps.append(statistics.median(slowest))
    return Result(steps, updates, *counts)


def table(result: Result, options: argparse.Namespace) -> str:
    """The report, in Markdown."""
    about = environment(torch.device("cpu"))
    step = statistics.median(result.steps)
    lines = [
        f"{result.tensors} tensors, {result.elements / 1e6:.2f} M elements, {options.ranks} "
        f"processes of one thread on {about['cores']} cores ({about['device']}), gloo, float32, "
        f"torch {about['torch']}, {about['date']}. Medians of {options.repeats} repetitions, each "
        f"of {options.rounds} steps a row; in brackets the least and the most of them. A step "
        f"without an update takes {step * 1e3:.3g} ms.",
        "",
        "| update | share of the step | times ours |",
        "| --- | ---: | ---: |",
    ]
    for name in result.updates:
        ratios = result.ratios(name)
        times = f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
        lines.append(
            f"| {name} | {100 * result.share(name):.2g} % | {'1' if name == OURS else times} |"
        )
    return "\n".join(lines)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time averages in the step of a sharded model.")
    for name, default, about in (
        ("ranks", 2, "processes"),
        ("layers", 24, "of the transformer, 12 tensors each"),
        ("rounds", 20, "steps with each update, in turns"),
        ("repeats", 3, "repetitions of all rounds"),
    ):
        parser.add_argument(f"--{name}", type=above_0(int), default=default, help=about)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page with the two markers")
    found = parser.parse_args(arguments)
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    text = table(run(options), options)
    if options.write is not None:
        marked.write(options.write, PROGRAM, text)
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
