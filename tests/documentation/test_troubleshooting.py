"""docs/troubleshooting.md explains every message there is, and none that there isn't."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ema_fused
from tests import ROOT
from tests.documentation import messages

PAGE = ROOT / "docs" / "troubleshooting.md"

# What isn't on the page, by the reason why not. Everything else must be.
EXEMPT = {
    "what Python itself says of a name that a module lacks": ["module ... has no attribute ..."],
    "what a checkpoint's averaged.json says": [
        "This folder holds AVERAGED weights. Those of the training itself are in the folder around "
        "it.",
        "nothing: EMACallback.save_pretrained() writes them",
    ],
    "the help of the command line, and what its commands print when all is well": [
        "python -m ema_fused",
        "what is installed, compiled and used: for a bug report",
        "an average of any width from the snapshots of PowerFunctionEMA",
        "Makes the power-function average of any width from the snapshots of a run.",
        "the folder with the snapshots",
        "the width wanted, in (0, 0.2887)",
        "the safetensors file to write",
        "that of a snapshot; without it the last",
        "a PNG to draw the profiles asked for and reached in",
        "...: sigma_rel ... at step ... from ... snapshots, ... bytes",
        "the profile reached is off by ... of the one asked for",
        "... parameters that weren't averaged aren't in it: ...",
        "which checkpoints, and how much each counts",
        "reading and writing",
        "the given weights",
        "...: ... bytes from ... checkpoints by ..., weights sum to ...",
        "the weighted average of checkpoints",
        "Averages checkpoints of any format in one pass and in bounded memory. Give the "
        "oldest first. A folder of a run stands for the checkpoints in it, by the numbers in "
        "their names.",
        "checkpoints, all with a weight or none; or the folder of a run",
        "the file or folder to write",
        "instead of weights: mean (default), linear, minus-sqrt, ema:DECAY, power:SIGMA",
        "only the latest N",
        "only every N-th, counted back from the latest",
        "of each, for the schedule power",
        "take weights as they are, whatever their sum is",
        "which tensors, and how they are summed",
        "default: by the name of the output",
        "of safetensors files in a folder",
        "that may be resident; default: 2GiB",
        "of the inputs, kept in the metadata",
        "where the weights are in nested dictionaries: model, ema.1",
        "leave out tensors with such names",
        "leave out tensors that are not alike in all",
        "of adapters of PEFT: where it changes what tensors mean, equal in all (default), or the "
        "last's",
        "sum inf and NaN too",
        "from the last checkpoint; or equal in all; default: single numbers from the last, "
        "others equal in all",
        "sum everything in float64",
        "of floating-point tensors; default: their own",
        "of stochastic rounding",
        "carried over from the last: ...",
        "...; this processor gets ...",
        "..., torch uses ... threads",
        "missing in torch",
        "how fast updates are on this machine, beside torch's",
        "Times our updates beside torch's, in turns, after checking that both give the same; "
        "prints ratios of medians. Takes about a minute.",
        "default: CUDA if there is one",
        "your own model, as my.package:build: a model, or a function that makes one",
        "write all results here too",
        "ours beside foreach while other processes take all cores, and nothing else",
    ],
    "the help of convert and inspect": [
        "the average in a checkpoint, in the format of another package",
        "Finds the average in a checkpoint and writes it as another package keeps its own; "
        "prints what that format has no place for.",
        "a file or folder",
        "the format to write",
        "the file or folder to write",
        "updates so far, if IN doesn't keep them",
        "1 - momentum, if IN doesn't keep it",
        "a checkpoint with the model's own weights",
        "the names of the parameters, for lists: one a line, or a state_dict of the model",
        "with the config.json of the model",
        "what a checkpoint holds, and how far its average is from the weights",
        "Looks at all tensors of a checkpoint: whose average it is, its distance to the "
        "weights by layer, and tensors that are NaN, infinite, 0 or were never updated.",
        "take the distance to this one",
        "a PNG to draw the distances in",
        "a row for every layer",
        "where the average is in nested dictionaries, as ema.state",
        "the format, if it isn't to be found; weights: plain weights that are averages",
        "of mmcv 1.x, whose checkpoints don't tell",
    ],
    "whose a format is, what it is recognised by, and where parts of a folder are put": [
        "ema_fused, and mmengine's averaged models",
        "steps and module.* and nothing else",
        "n_averaged and module.* and nothing else",
        "ema-pytorch's EMA",
        "initted, step and ema_model.*",
        "config.json of the folder",
        "average_state.safetensors of the folder",
        "the model beside the folder",
        "the folder of diffusers' EMAModel",
        "a config.json with optimization_step",
        "our callback for the Trainer of transformers",
        "a folder with average_state.safetensors",
        "a folder of diffusers",
        "none was passed",
        "the weights of the model",
        "torch-ema's ExponentialMovingAverage",
        "shadow_params, decay and num_updates",
        "the state_dict of diffusers' EMAModel",
        "shadow_params and optimization_step",
        "EMAModel.state_dict() of diffusers",
        "weights, no average of a known format",
        "ema_fused: a snapshot of PowerFunctionEMA, sigma_rel ...",
        "Lightning's WeightAveraging and EMAWeightAveraging, and ours",
        "state_dict, current_model_state and averaging_state",
        "state_dict and ema_state_dict",
        "EMAHook of mmcv 1.x",
        "ema_* buffers named after parameters",
    ],
    "what convert and inspect print when all is well: docs/converting.md says what is lost": [
        "frozen parameters that the average shares with the model have other values in the "
        "state, and keep the model's: ...",
        "... doesn't keep the number of updates: steps is 1, as of one value, so that "
        "warm-ups and means begin anew; pass steps=",
        "precision: ... in the state, rounded to the ... of the average; averaged_dtype= keeps it",
        "the warm-up of the decay (...): pass one of ema_fused.schedules as momentum=",
        "the number of updates isn't in the source: it is 1, as of one value, so that "
        "warm-ups and means begin anew; --steps (steps=) sets it",
        "the decay ... (momentum ...): set it anew",
        "the warm-up of the decay (...): set it anew",
        "ema-pytorch copies the model over the average as long as step (...) is at most "
        "update_after_step (100 unless it is given), and averages at every update_every-th "
        "step (10): pass EMA(update_after_step=..., update_every=...) as it was done so far",
        "the seed of stochastic rounding isn't carried",
        "the checkpoints of a window: the average counts as one",
        "the checkpoints of LatestWeightAverage, of which the average is the mean",
        "the weights that BiasCorrectedEMA has begun with, by which it corrects the average",
        "the weights that BiasCorrectedEMA corrects by aren't in the state: they stay those "
        "that this average has begun with",
        "that the average is the mean of all values so far: it goes on as the other package "
        "is set up. Its count is of calls; with interval or every above 1 pass the number of "
        "averages by --steps (steps=)",
        "the profile of its width (...), by which only PowerFunctionEMA goes on",
        "of unknown width",
        "that it is no mean of all values: AveragedModel goes on as one, unless it gets "
        "multi_avg_fn=get_ema_multi_avg_fn(decay)",
        "mean of all values",
        "the weights of the model, which stay in the source",
        "the weights of the model aren't in the source: load it into "
        "EMA(include_online_model=False), or pass them by --raw (raw=)",
        "not in the average, and as in the weights: ...",
        "buffers, if the model has any: ... has averages of parameters alone; --raw PATH (raw=) "
        "takes them from the model",
        "config.json, which from_pretrained needs: --model FOLDER (folder=) copies it",
        "the number of updates (...): torchtitan derives it from the trainer's step",
        "... tensors that are no parameters, which torchtitan takes from the model",
        "the names of the tensors",
        "what is no parameter, if it was averaged: ...",
        "whether the decay warms up isn't in the source: num_updates is kept, and so it is "
        "at most (1 + n) / (10 + n)",
        "the decay isn't in the source: it is diffusers' own, ...; --decay (decay=) sets it",
        "whether the decay warms up isn't in the source: it doesn't, as min_decay is the decay",
        "the warm-up of the decay (...); it is (1 + n) / (10 + n)",
        "the number of updates (...), which would make the decay warm up",
        "...: ... tensors from ... to ..., ...",
        "lost or made up: ...",
        "distance over norm",
        "... and ... layers more: --all-layers shows them",
        "equal, while others differ (frozen, copied, or never updated)",
        "only here, or of another shape there",
        "nothing: the weights of the model aren't here",
        "the rest of a checkpoint of a training (loops, optimizers): fit(ckpt_path=...) "
        "needs it; put these three keys into one of this model, or pass it to the callback's "
        "on_load_checkpoint",
        "epoch and iter of the training, which are 0, its optimizer and its messages",
        "the epoch of the training, which is 0, and its optimizer; resume it with an "
        "EpochBasedRunner, as the averages are in the parameters",
        "averages of buffers, which mmcv copies from the model: ... are as in the average",
        "the number of updates (...), which timm doesn't keep",
        "the weights of the model (state_dict) aren't in the source",
    ],
    "titles, names and notes in the tables of a benchmark": [
        "the model itself",
        "bfloat16 into float32",
        "torch AveragedModel, foreach",
        "....lerp_, its plan found again",
        "loop: mul_().add_()",
        "torch._foreach_copy_ to a kept copy, ...",
        "loop: lerp_ of float()",
        "... Plan of ... averages",
        "Times as long as `Plan.lerp_` takes: prepared lists",
        "Times as long as `Plan.lerp_` takes: prepared lists, beside torch.compile",
        "Times as long as ours takes: DTensors in one process",
        "Times as long as ours takes: apex",
        "Times as long as one pass takes: several averages of one source",
        "Times as long as ours takes: `update_parameters` of whole models",
        "Times as long as `Plan.lerp_` takes of the host alone, the device being busy",
        "Times as long as ours takes: ...",
        "Median over ours (the median, and half the distance of the quartiles).",
        "The original's median over ours (the original's, ours).",
        "Fraction of the limit that `... Plan.lerp_` reaches...",
        "Between two samples ... MiB of memory and ... small Python objects are touched; a sample "
        "is one call.",
        "Calls of one contender follow each other.",
        "all cores taken",
        "All cores taken: `Plan.lerp_` over foreach",
        "Ours over foreach (ours, foreach), of single calls while ... other processes compute, one "
        "for each core.",
        "The limit: the same bytes in one flat buffer (CPU), a copy within the device (GPU).",
    ],
    "titles and labels of the picture of a reconstruction": [
        "time (steps or samples)",
        "weight in the average, mean 1",
        "sigma_rel ... at step ... from ... snapshots (grey): off by ...",
    ],
    "what assert and static_assert say: wrong here, whatever a user does": [
        "routing asks for this part only where the extension is",
        "it is at hand wherever it is used",
        "on_train_begin comes before",
        "a swap would lose bits between two types",
        "the table is copied to a device as bytes",
        "no entry in more than two 32-byte sectors of a cache",
    ],
    "a part of '... is ...; ... is expected', which is there with every value it takes": [
        "a number in [0, 1]",
        "a number in (0, 1)",
        "a finite number, 0 or more,",
        "mean, linear, minus-sqrt, ema:DECAY or power:SIGMA",
    ],
    "what other code reads: a representation, a mark in files, a kind, a pattern, a pragma": [
        "Plan(devices=..., backends=..., arithmetic=..., rounding=..., averages=..., tensors=..., "
        "elements=..., chunks=..., launches=...)",
        "FlatShard(..., shape=..., piece ... of ...)",
        "ema_fused power-function average 1",
        "non-persistent buffer",
        "torch.distributed is disabled",
        "averages are kept in 16 bits",
        "clang loop vectorize(assume_safety)",
        "import os, sys print(flush=True) while os.getppid() == int(sys.argv[1]): "
        "for _ in range(1_000_000): pass",
        "lerp_(Tensor(a!)[] averaged, Tensor[] source, float weight) -> ()",
        "lerp_.Tensor(Tensor(a!)[] averaged, Tensor[] source, Tensor weight) -> ()",
        "lerp_.ScalarList(Tensor(a!)[] averaged, Tensor[] source, float[] weight) -> ()",
        "lerp_.TensorList(Tensor(a!)[] averaged, Tensor[] source, Tensor[] weight) -> ()",
        "copy_(Tensor(a!)[] averaged, Tensor[] source) -> ()",
        "swap_(Tensor(a!)[] averaged, Tensor(b!)[] source) -> ()",
        "prefetch.global.L1 [%0];",
    ],
    "a part of the names in ema-pytorch's own message about a missing tensor": [
        "into the model",
        "into the average",
    ],
    "what is told or logged of something done, some of it in TRL's words": [
        ".... is ema_fused.callbacks.trl's now",
        "BEMACallback: Updated reference model with BEMA weights",
        "Saved BEMA model to ...",
        "Updated BEMA weights at step ...",
    ],
    "between an error of CUDA and its number": ["(CUDA error"],
    "never reaches anybody: pairs of two shapes are refused before, by name": ["the shapes differ"],
    "caught where it is raised: another counter is counted by torch": [
        "a counter is one int64 in host memory"
    ],
}


def quotes(page: str) -> list[str]:
    """The messages that a page quotes: its list items that are code and nothing else."""
    items = re.findall(r"(?m)^- (`+)((?:[^`]|(?!\1)`)+)\1$", page)
    return [messages.plain(text) for _, text in items]


@pytest.fixture(scope="module")
def quoted() -> list[str]:
    return quotes(PAGE.read_text(encoding="utf-8"))


def test_every_message_is_on_the_page(quoted: list[str]) -> None:
    exempt = {text for texts in EXEMPT.values() for text in texts}
    known = exempt.union(quoted)
    lacking = [f"{where}: - `{text}`" for text, where in messages.everywhere() if text not in known]
    assert not lacking, "docs/troubleshooting.md lacks:\n" + "\n".join(lacking)


def test_every_quote_is_a_message(quoted: list[str]) -> None:
    texts = {text for text, _ in messages.everywhere()}
    stale = [text for text in quoted if text not in texts]
    assert not stale, "docs/troubleshooting.md has what the source doesn't say:\n" + "\n".join(
        stale
    )
    assert len(quoted) > 250
    assert [text for text, times in Counter(quoted).items() if times > 1] == []


def test_what_is_exempt_exists_and_is_not_quoted_too(quoted: list[str]) -> None:
    texts = {text for text, _ in messages.everywhere()}
    for text in [text for part in EXEMPT.values() for text in part]:
        assert text in texts, text
        assert text not in quoted, text


def test_every_group_of_quotes_is_explained() -> None:
    """Under each run of quotes there is text: why, and what to do."""
    blocks = re.split(r"\n{2,}", PAGE.read_text(encoding="utf-8"))
    groups = [i for i, block in enumerate(blocks) if quotes(block)]
    assert len(groups) > 80
    for i in groups:
        after = blocks[i + 1]
        assert not quotes(after) and not after.startswith("#"), blocks[i]
        assert messages.words(after) >= 8, blocks[i]


# ---- Reading the source --------------------------------------------------------------------------

PYTHON = '''
"""A docstring with many words of its own."""

def wanted(value):
    """Another docstring with many words."""
    why = f"{value!r} is what " f"was found here"
    if value:
        raise KeyError("short one")
    return ValueError(why)

LABEL = "two words"
NAME = "a.dotted.name.of.many.words"
warnings.warn("also warned")
'''


def test_messages_are_found_wherever_they_are_written() -> None:
    found = [text for text, _ in messages.in_python(PYTHON)]
    assert sorted(found) == ["... is what was found here", "also warned", "short one"]


def test_literals_of_cpp_are_found() -> None:
    source = """
    // "a comment with a literal"
    throw std::invalid_argument("too few");
    return "joined of "
           "several literals";
    fail("two words");
    """
    found = [text for text, _ in messages.in_cpp(source)]
    assert found[:2] == ["too few", "joined of several literals"]
    assert "two words" not in found
    assert not any("comment" in text for text in found)
    assert [text for text, _ in messages.in_cpp('x = "one two" " three";')] == ["one two three"]


def test_messages_of_builds_are_found() -> None:
    cmake = 'message(STATUS "all is well")\nmessage(FATAL_ERROR "no ${thing} "\n  "is here")'
    assert list(messages.in_cmake(cmake)) == ["no ... is here"]
    make = '\t@test -n "x" || { echo "nothing is" \\\n\t\t"found"; exit 1; }\n\techo "all is well"'
    assert list(messages.in_make(make)) == ["nothing is found"]


# ---- As a user sees them -------------------------------------------------------------------------


def network(width: int = 3) -> nn.Module:
    return nn.Linear(width, 3)


def trained() -> tuple[nn.Module, Any]:
    model = network()
    return model, ema_fused.ExponentialMovingAverage(model)


def update_of_another_model() -> None:
    trained()[1].update_parameters(nn.Sequential(network()))


def update_of_another_shape() -> None:
    trained()[1].update_parameters(network(4))


def update_while_swapped() -> None:
    model, averaged = trained()
    averaged.update_parameters(model)
    with averaged.swapped(model):
        averaged.update_parameters(model)


def lists_of_two_lengths() -> None:
    ema_fused.lerp_([torch.zeros(2)], [], 0.5)


def average_of_integers() -> None:
    ema_fused.Plan([torch.zeros(2, dtype=torch.int64)], [torch.zeros(2)]).lerp_(0.5)


def generator_for_a_list() -> None:
    ema_fused.lerp_(network().parameters(), [torch.zeros(2)], 0.5)  # type: ignore[arg-type]


def overlapping_averages() -> None:
    memory = torch.zeros(4)
    ema_fused.Plan([memory[:3], memory[1:]], [torch.ones(3), torch.ones(3)]).lerp_(0.5)


def optimizer_of_another_model() -> None:
    model, averaged = trained()
    ema_fused.attach(torch.optim.SGD(network().parameters(), 0.1), model, averaged)


def momentum_of_two() -> None:
    ema_fused.ExponentialMovingAverage(network(), momentum=2)


def options_that_exclude_each_other() -> None:
    ema_fused.ExponentialMovingAverage(network(), every=2, interval=2)


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
@pytest.mark.parametrize(
    ("mistake", "heading"),
    [
        (update_of_another_model, "Names don't match"),
        (update_of_another_shape, "Shapes or dtypes don't match"),
        (update_while_swapped, "Something is refused inside `swapped()`"),
        (lists_of_two_lengths, "The lists don't pair up"),
        (average_of_integers, "A pair is of a kind that can't be averaged"),
        (generator_for_a_list, "The lists don't pair up"),
        (overlapping_averages, "Shapes or memory don't fit"),
        (optimizer_of_another_model, "`attach`"),
        (momentum_of_two, "`momentum`"),
        (options_that_exclude_each_other, "Options that exclude each other"),
    ],
)
def test_a_message_leads_to_its_section(mistake: Callable[[], None], heading: str) -> None:
    with pytest.raises((KeyError, RuntimeError, TypeError, ValueError)) as caught:
        mistake()
    message = messages.plain(str(caught.value.args[0]))
    sections = re.split(r"(?m)^### ", PAGE.read_text(encoding="utf-8"))
    fitting = [
        (messages.words(quote), section.partition("\n")[0])
        for section in sections
        for quote in quotes(section)
        if re.search(re.escape(quote).replace(r"\.\.\.", ".*"), message)
    ]
    assert fitting, message
    assert max(fitting)[1] == heading
