"""Train a language model of GPT-2 small's shape under FSDP2 and keep the average of its weights.

    torchrun --nproc-per-node 2 examples/fsdp2_language_model.py --output run
    torchrun --nproc-per-node 2 examples/fsdp2_language_model.py --output run --steps 60
    python examples/fsdp2_language_model.py --evaluate run

The first command trains and saves; the second goes on from there, on this or any other number of
processes; the third loads what was saved into a plain model, in one process without a group.

It runs on CPUs, or on CUDA devices where each process has one. The text is Python's own reference,
as ``help()`` shows it. It is read byte by byte, so there is no tokenizer to download; that makes
the vocabulary 256 and the model 86 million parameters, where GPT-2 small has 124.

Four places are ours, marked (1) to (4). The rest is an ordinary training under FSDP2.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from tqdm import tqdm

from ema_fused import AveragedWeights, attach
from ema_fused.saving import checkpoints

VOCABULARY = 256  # bytes
HELD_OUT = 8 * 1024  # bytes at the end of the text, which are never trained on
WARM_UP = 10  # steps in which the learning rate rises
SAVE_EVERY = 50  # steps; and after the last one
KINDS = {"raw": ("model", ""), "averaged": ("averaged", "module.")}  # where a checkpoint has them


@dataclass
class Shape:
    """Of the model. The defaults are GPT-2 small's, which has a context of 1024 as well."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024


class Block(nn.Module):
    """Attention to what comes before, then a perceptron; each added to what it is given."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.queries_keys_values = nn.Linear(shape.width, 3 * shape.width)
        self.attention_output = nn.Linear(shape.width, shape.width)
        self.perceptron_norm = nn.LayerNorm(shape.width)
        self.inner = nn.Linear(shape.width, 4 * shape.width)
        self.outer = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        mixed = self.queries_keys_values(self.attention_norm(x))
        parts = mixed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind()
        attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attention_output(attended.transpose(1, 2).reshape(batch, length, width))
        hidden = nn.functional.gelu(self.inner(self.perceptron_norm(x)))
        added: Tensor = self.outer(hidden)
        return x + added


class LanguageModel(nn.Module):
    """From bytes to the logits of the bytes that follow them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # As GPT-2: what is added to the stream is smaller, the more layers add to it.
                adds = name.endswith(("attention_output.weight", "outer.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers if adds else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, text: Tensor) -> Tensor:
        """Text of shape (batch, length), int64; logits of shape (batch, length, 256)."""
        places = torch.arange(text.shape[1], device=text.device)
        x = self.bytes(text) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return linear(self.norm(x), self.bytes.weight)  # tied: the embedding is the head too

    def loss(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats of each byte after the ones before it."""
        logits = self(windows[:, :-1])
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def load_text() -> tuple[Tensor, Tensor]:
    """What is trained on and what is held out, as bytes; some 460,000 in Python 3.11."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return values[:-HELD_OUT], values[-HELD_OUT:]


def windows_at(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Pieces of the text: ``context`` bytes and the one that follows."""
    return text[starts[:, None] + torch.arange(context + 1)]


class Training:
    """The model, spread over all processes; its optimizer; and its average."""

    def __init__(self, shape: Shape, device: torch.device, options: argparse.Namespace) -> None:
        self.shape, self.device, self.batch = shape, device, int(options.batch)
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.lr = float(options.lr)
        self.training, self.held_out = load_text()
        self.steps = 0

        torch.manual_seed(0)  # every process makes the same model, and keeps its shards of it
        self.model = LanguageModel(shape).to(device)
        mesh = init_device_mesh(device.type, (self.processes,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        # (1) Each process averages its own shards; float32 whatever the model is trained in.
        self.averaged = AveragedWeights(
            self.model, momentum=options.momentum, averaged_dtype=torch.float32
        )

    def windows(self) -> Tensor:
        """What this process trains on at this step: a resumed training sees what it would have."""
        random = torch.Generator().manual_seed(self.steps * 65536 + self.rank)
        last = len(self.training) - self.shape.context
        starts = torch.randint(last, (self.batch,), generator=random)
        return windows_at(self.training, starts, self.shape.context).to(self.device)

    def step(self) -> float:
        """One optimizer step; the loss of this process before it."""
        loss = self.model.loss(self.windows())
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (self.steps + 1) / WARM_UP)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        return float(loss.detach())

    def train(self, steps: int, output: Path) -> None:
        """Go on until there are so many steps in all."""
        bar = tqdm(initial=self.steps, total=steps, unit="step", disable=self.rank > 0)
        with bar, attach(self.optimizer, self.model, self.averaged):  # (2)
            while self.steps < steps:
                bar.set_postfix(loss=f"{self.step():.3f}")
                bar.update()
                if self.steps % SAVE_EVERY == 0 or self.steps == steps:
                    checkpoints.save(self.state(), output)

    def losses(self) -> dict[str, float]:
        """Of the held-out text, by the kind of weights."""
        raw = held_out_loss(self.model, self.held_out, self.shape, self.batch)
        with self.averaged.swapped(self.model):  # (3)
            averaged = held_out_loss(self.model, self.held_out, self.shape, self.batch)
        return {"raw": raw, "averaged": averaged}

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds; sharded tensors, so that each process writes its own."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        averaged = checkpoints.averaged_state_dict(self.averaged, self.model)  # (4)
        tensors = {"model": model, "optimizer": optimizer, "averaged": averaged}
        return {**tensors, "steps": self.steps, "shape": asdict(self.shape)}

    def resume(self, output: Path) -> None:
        """Take over a checkpoint, written by any number of processes.

        Before ``attach``: asked for the state of an optimizer that has made no step yet, torch lets
        it make an empty one.
        """
        state = self.state()
        checkpoints.load(state, output)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        checkpoints.load_averaged_state_dict(self.averaged, self.model, state["averaged"])  # (4)
        self.steps = state["steps"]


@torch.no_grad()
def held_out_loss(model: LanguageModel, text: Tensor, shape: Shape, batch: int) -> float:
    """Mean cross entropy in nats a byte; in a process group, each process takes a part of it."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    starts = torch.arange(0, len(text) - shape.context, shape.context)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, len(starts), batch * processes):
        mine = starts[first + rank * batch :][:batch]
        # Every process takes part in every forward pass: FSDP gathers the weights for all.
        windows = windows_at(text, mine if len(mine) else starts[:1], shape.context).to(device)
        loss = model.loss(windows, reduction="sum")
        total += loss if len(mine) else 0
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / (len(starts) * shape.context)


def shape_of(output: Path) -> Shape:
    """The shape of the model in a checkpoint."""
    saved = {"shape": asdict(Shape())}
    checkpoints.load(saved, output)
    return Shape(**saved["shape"])


def evaluate(output: Path, batch: int) -> tuple[int, dict[str, float]]:
    """The steps and losses of a checkpoint, by a plain model; no process group is needed."""
    shape = shape_of(output)
    model = LanguageModel(shape)
    losses = {}
    for kind, (key, prefix) in KINDS.items():
        # Loading writes into the tensors it is given: the model's own, under the names in the file.
        state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        saved: dict[str, Any] = {key: state, "steps": 0}
        checkpoints.load(saved, output)
        losses[kind] = held_out_loss(model, load_text()[1], shape, batch)
    return int(saved["steps"]), losses


def report(steps: int, losses: dict[str, float], output: Path) -> None:
    print(f"\nHeld-out text after {steps} steps:\n\nweights       loss   bits a byte")
    for kind, loss in losses.items():
        print(f"{kind:<8}  {loss:8.5f}   {loss / math.log(2):11.5f}")
    print(f"\nCheckpoint: {output}")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A language model and its average under FSDP2.")
    shape = Shape()
    counts = {
        "steps": (30, "of the whole training"),
        "layers": (shape.layers, "blocks"),
        "heads": (shape.heads, "of each block's attention"),
        "width": (shape.width, "of the stream, a multiple of the heads"),
        "context": (256, "bytes that the model sees; GPT-2 has 1024"),
        "batch": (2, "windows of text, of each process at each step"),
    }
    for name, (default, meaning) in counts.items():
        text = f"{meaning} (default: {default})"
        parser.add_argument(f"--{name}", type=_at_least_one, default=default, help=text)
    parser.add_argument("--momentum", type=float, default=0.1, help="of the average (default: 0.1)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate (default: 3e-4)")
    parser.add_argument("--output", type=Path, default=Path("fsdp2_run"), help="the checkpoint")
    parser.add_argument("--evaluate", type=Path, metavar="OUTPUT", help="a checkpoint; no training")
    options = parser.parse_args()
    if options.evaluate is None and "RANK" not in os.environ:
        parser.error("start a training by torchrun --nproc-per-node 2, or give --evaluate OUTPUT")
    if options.width % options.heads:
        parser.error(f"--width {options.width} is no multiple of --heads {options.heads}")
    return options


def main() -> None:
    """Train, or go on with it, and evaluate; or evaluate a checkpoint alone."""
    options = parsed_options()
    if options.evaluate is not None:
        report(*evaluate(options.evaluate, options.batch), options.evaluate)
        return
    dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on CUDA devices
    place = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    shape = Shape(options.layers, options.heads, options.width, options.context)
    training = Training(shape, device, options)
    if checkpoints.exists(options.output):
        if shape_of(options.output) != shape:
            raise SystemExit(f"{options.output} is of another model: {shape_of(options.output)}")
        training.resume(options.output)
    training.train(options.steps, options.output)
    losses = training.losses()
    if training.rank == 0:
        report(training.steps, losses, options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
