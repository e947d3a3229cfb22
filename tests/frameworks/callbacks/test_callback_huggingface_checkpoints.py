"""What our callback leaves in checkpoints of transformers' Trainer, and how a run is resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

from ema_fused.callbacks.huggingface import EMACallback
from tests import processes
from tests.frameworks.callbacks import huggingface_run
from tests.frameworks.callbacks.huggingface_cases import (
    MOMENTUM,
    ByHand,
    Tensors,
    attached,
    averages,
)
from tests.frameworks.callbacks.huggingface_run import (
    Digits,
    DigitsConfig,
    DigitsModel,
    digits_trainer,
)
from tests.networks import differences, own


def test_checkpoints_hold_the_model_and_its_average(tmp_path: Path) -> None:
    by_hand = ByHand()
    callback, trainer = attached(
        tmp_path, by_hand, save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer.save_model()
    found = {folder.name for folder in tmp_path.glob("*/averaged")}
    assert found == {"averaged"} and (tmp_path / "averaged").is_dir()
    for folder, at in [("checkpoint-6", 0), ("checkpoint-12", 1), ("final", 1), (".", 1)]:
        model, average, _ = by_hand.at_evaluations[at]
        loaded = DigitsModel.from_pretrained(tmp_path / folder)
        assert differences(own(loaded), model) == []
        loaded = DigitsModel.from_pretrained(tmp_path / folder / "averaged")
        assert differences(own(loaded), average) == []
        assert (
            differences(load_file(tmp_path / folder / "averaged/model.safetensors"), average) == []
        )
    assert differences(averages(callback), by_hand.average) == []


def assert_same_end(one: Path, other: Path) -> None:
    end, expected = torch.load(one), torch.load(other)
    assert expected["average"]["steps"] == 15
    for part in ("model", "average"):
        assert differences(end[part], expected[part]) == []
    assert list(expected["losses"]) == [5, 10, 15]
    assert end["losses"] == expected["losses"]


def test_a_killed_run_is_resumed_to_the_bit(tmp_path: Path) -> None:
    killed = processes.fork(
        "transformers.trainer", huggingface_run.__file__, tmp_path / "killed", "--kill-at", 10
    )
    whole = huggingface_run.run(tmp_path / "whole")
    processes.finish(killed, -signal.SIGKILL)
    saved = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert saved == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    processes.run_fork(
        "transformers.trainer", huggingface_run.__file__, tmp_path / "killed", "--resume"
    )
    assert_same_end(tmp_path / "killed" / "end.pt", whole)


def test_a_stochastically_rounded_average_is_resumed_to_the_bit(tmp_path: Path) -> None:
    arguments = {"averaged_dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3}
    whole = huggingface_run.run(tmp_path / "whole", **arguments)
    resumed = huggingface_run.run(
        tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-9"), **arguments
    )
    assert torch.load(whole)["average"]["rounding_seed"] == 3
    assert_same_end(resumed, whole)


class Tied(DigitsModel):
    """Two layers with one weight, and a buffer that the model's files leave out."""

    _tied_weights_keys = {"decoder.weight": "encoder.weight"}  # noqa: RUF012
    _keys_to_ignore_on_save = ("seen",)

    def __init__(self, config: DigitsConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.encoder = nn.Linear(64, 10, bias=False)
        self.decoder = nn.Linear(64, 10, bias=False)
        self.register_buffer("seen", torch.zeros(3))
        self.post_init()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen += 0.1
        pixels = images.flatten(1)
        logits = self.encoder(pixels) + self.decoder(pixels.square())
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Plain(nn.Module):
    """Not of transformers' kind: it has no config."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(72, 10)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.conv(images).relu().flatten(1)) * self.scale
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Pixels(Dataset[dict[str, Tensor]]):
    """Digits as texts: each pixel is a token."""

    def __init__(self) -> None:
        self.tokens = (Digits(range(0, 64)).images.flatten(1) * 16).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.tokens[row]}


def mixture() -> MixtralForCausalLM:
    """Of an architecture whose files have other names and shapes than the model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 17}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied(DigitsConfig(tie_word_embeddings=True))


class AtStart(TrainerCallback):  # type: ignore[misc]
    """Sees the state of an average when it has just been loaded."""

    def __init__(self, callback: EMACallback) -> None:
        self.callback = callback
        self.state: Tensors = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert self.callback.average is not None
        self.state = own(self.callback.average)


@pytest.mark.parametrize("build", [tied, Plain, mixture])
def test_any_model_is_saved_and_resumed_to_the_bit(tmp_path: Path, build: Any) -> None:
    def trained(resume: bool) -> tuple[EMACallback, Tensors]:
        trainer = digits_trainer(tmp_path, model=build(), max_steps=3, save_strategy="steps")
        if build is mixture:
            trainer.train_dataset = Pixels()
        callback = EMACallback(momentum=MOMENTUM).attach(trainer)
        at_start = AtStart(callback)
        trainer.add_callback(at_start)
        trainer.train(resume_from_checkpoint=resume)
        return callback, at_start.state

    first, _ = trained(resume=False)
    _, resumed = trained(resume=True)
    assert first.average is not None
    assert first.average.steps == 3
    assert differences(resumed, own(first.average)) == []
    folder = tmp_path / "checkpoint-3" / "averaged"
    rest = load_file(folder / "average_state.safetensors")
    assert set(rest) == ({"steps", "module.seen"} if build is tied else {"steps"})
    if build is Plain:
        loaded: nn.Module = Plain()
        loaded.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        loaded = type(build()).from_pretrained(folder)
    assert set(differences(own(loaded), averages(first))) <= {"seen"}


def test_resuming_a_run_that_had_no_average_warns(tmp_path: Path) -> None:
    digits_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    by_hand = ByHand()
    callback, trainer = attached(tmp_path, by_hand, max_steps=4)
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no average \(no folder 'averaged'\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.average is not None and callback.average.steps == 2
    assert differences(averages(callback), by_hand.average) == []


def test_an_average_that_does_not_match_is_refused(tmp_path: Path) -> None:
    _, trainer = attached(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1" / "averaged"
    state = folder / "average_state.safetensors"
    kept = state.read_bytes()
    state.unlink()
    _, again = attached(tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match=r"has no average_state.safetensors: it is incomplete"):
        again.train(resume_from_checkpoint=str(folder.parent))
    state.write_bytes(kept)
    (folder / "model.safetensors").unlink()
    _, again = attached(tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match=r"doesn't match the model in training[^$]*conv\.weight"):
        again.train(resume_from_checkpoint=str(folder.parent))
