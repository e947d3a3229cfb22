"""transformers' Trainer with averages that aren't copies of its model, and with PEFT's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from ema_fused import (
    AveragedWeights,
    BaseAveragedModel,
    EmaDecaySqrt,
    ExponentialMovingAverage,
    LatestWeightAverage,
    PowerFunctionEMA,
    StochasticWeightAverage,
)
from ema_fused.callbacks.huggingface import EMACallback
from tests.frameworks.callbacks.huggingface_cases import (
    MOMENTUM,
    ByHand,
    Tensors,
    assert_measured_with,
)
from tests.frameworks.callbacks.huggingface_run import Digits, DigitsModel, digits_trainer
from tests.networks import differences, own

WIDTHS = (0.05, 0.10)


class Beside(TrainerCallback):  # type: ignore[misc]
    """Another average of the same training, and what its widths were at each evaluation."""

    def __init__(self) -> None:
        self.average: PowerFunctionEMA | None = None
        self.at_evaluations: list[tuple[dict[float, Tensors], dict[str, float]]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.average is None:
            self.average = PowerFunctionEMA(rest["model"], WIDTHS)
        self.average.update_parameters(rest["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        assert self.average is not None
        held = {w: {n: t.clone() for n, t in self.average.average(w).items()} for w in WIDTHS}
        self.at_evaluations.append((held, rest["metrics"]))


def state_of(average: Any) -> dict[str, Any]:
    assert average is not None
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in average.state_dict().items()
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_the_width_that_is_named_is_evaluated_and_written(tmp_path: Path, width: float) -> None:
    beside = Beside()
    trainer = digits_trainer(
        tmp_path,
        callbacks=[beside],
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="steps",
        save_steps=6,
        load_best_model_at_end=True,
    )
    callback = EMACallback(PowerFunctionEMA, sigma_rel=WIDTHS, evaluated_sigma_rel=width)
    callback.attach(trainer)
    trainer.train()
    assert len(beside.at_evaluations) == 2
    for step, (held, metrics) in zip((6, 12), beside.at_evaluations, strict=True):
        assert_measured_with(held[width], metrics)
        folder = tmp_path / f"checkpoint-{step}" / "averaged"
        loaded = DigitsModel.from_pretrained(folder)
        assert differences(own(loaded), held[width]) == []
        assert differences(held[0.05], held[0.10]) != []
    # That of the best checkpoint is in the callback again, with all its widths.
    best = min(beside.at_evaluations, key=lambda seen: seen[1]["eval_loss"])[0]
    assert isinstance(callback.average, PowerFunctionEMA)
    for one in WIDTHS:
        assert differences(dict(callback.average.average(one)), best[one]) == []
    present = own(trainer.model)
    with callback.swapped() as model:
        assert differences(own_of_swapped(model), best[width]) == []
    assert differences(own(trainer.model), present) == []


def own_of_swapped(model: nn.Module) -> Tensors:
    """Its tensors; ``state_dict()`` is refused while averages are swapped in."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights])
def test_weights_that_are_left_out_are_the_model_s_own(tmp_path: Path, kind: Any) -> None:
    def trained(resume: bool) -> tuple[dict[str, Any], Tensors]:
        trainer = digits_trainer(tmp_path, save_strategy="steps", save_steps=4)
        callback = EMACallback(kind, momentum=MOMENTUM, exclude="head").attach(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        assert callback.average is not None
        assert callback.average.left_out_names == ["head.weight", "head.bias"]
        return state_of(callback.average), own(trainer.model)

    whole, weights = trained(resume=False)
    assert ("module.head.weight" in whole) == (kind is ExponentialMovingAverage)
    again, resumed = trained(resume=True)
    assert differences(whole, again) == []
    assert differences(weights, resumed) == []
    written = DigitsModel.from_pretrained(tmp_path / "checkpoint-12" / "averaged")
    own_model = DigitsModel.from_pretrained(tmp_path / "checkpoint-12")
    assert torch.equal(written.head.weight, own_model.head.weight)
    assert not torch.equal(written.conv.weight, own_model.conv.weight)


@pytest.mark.parametrize("width", [None, 0.2])
def test_a_single_width_needs_no_name(tmp_path: Path, width: float | None) -> None:
    trainer = digits_trainer(tmp_path, max_steps=3)
    callback = EMACallback(PowerFunctionEMA, sigma_rel=0.2, evaluated_sigma_rel=width)
    callback.attach(trainer)
    trainer.train()
    assert isinstance(callback.average, PowerFunctionEMA)
    assert callback.average.steps == callback.average.time == 3
    assert_measured_with(callback.average.average(), trainer.evaluate())


def test_several_widths_are_resumed_to_the_bit(tmp_path: Path) -> None:
    def trained(folder: Path, resume: bool) -> dict[str, Any]:
        trainer = digits_trainer(folder, save_strategy="steps", save_steps=4)
        callback = EMACallback(PowerFunctionEMA, sigma_rel=WIDTHS, evaluated_sigma_rel=0.1)
        callback.attach(trainer)
        checkpoint = str(folder / "checkpoint-4") if resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
        return state_of(callback.average)

    whole = trained(tmp_path, resume=False)
    again = trained(tmp_path, resume=True)
    assert again.pop("_extra_state") == whole.pop("_extra_state")
    assert differences(again, whole) == []


def test_a_folder_of_other_widths_is_refused(tmp_path: Path) -> None:
    for widths, resume in ((WIDTHS, False), ((0.05, 0.2), True)):
        trainer = digits_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        EMACallback(PowerFunctionEMA, sigma_rel=widths, evaluated_sigma_rel=0.05).attach(trainer)
        if resume:
            with pytest.raises(RuntimeError, match=r"doesn't match.*sigma_rel \(0\.05, 0\.1\)"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        else:
            trainer.train()


def test_without_a_folder_all_widths_start_from_the_model(tmp_path: Path) -> None:
    digits_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    beside = Beside()
    trainer = digits_trainer(tmp_path, max_steps=4, callbacks=[beside])
    callback = EMACallback(PowerFunctionEMA, sigma_rel=WIDTHS, evaluated_sigma_rel=0.1)
    callback.attach(trainer)
    with pytest.warns(UserWarning, match="no folder 'averaged'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert isinstance(callback.average, PowerFunctionEMA) and beside.average is not None
    for width in WIDTHS:
        expected = beside.average.average(width)
        assert differences(callback.average.average(width), expected) == []


@pytest.mark.parametrize(
    "average, arguments, error, message",
    [
        (PowerFunctionEMA, {}, ValueError, r"is None, and averages of 0\.05, 0\.1 are kept; say"),
        (PowerFunctionEMA, {"evaluated_sigma_rel": 0.2}, ValueError, r"is 0\.2, and averages of"),
        (
            PowerFunctionEMA,
            {"sigma_rel": 0.1, "evaluated_sigma_rel": 0.2},
            ValueError,
            r"is 0\.2, and averages of 0\.1 are kept",
        ),
        (PowerFunctionEMA, {"sigma_rel": 0.4}, ValueError, r"sigma_rel is 0\.4"),
        (
            ExponentialMovingAverage,
            {"evaluated_sigma_rel": 0.1},
            TypeError,
            "goes with PowerFunctionEMA.*ExponentialMovingAverage keeps one: leave it out",
        ),
    ],
)
def test_a_width_that_is_not_there_is_refused_when_the_callback_is_made(
    average: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EMACallback(average, **arguments)


def test_a_function_that_makes_several_widths_is_asked_when_training_begins(
    tmp_path: Path,
) -> None:
    trainer = digits_trainer(tmp_path)
    EMACallback(lambda model: PowerFunctionEMA(model)).attach(trainer)
    with pytest.raises(ValueError, match=r"averages of 0\.05, 0\.1 are kept"):
        trainer.train()


def test_averaged_weights_are_written_for_from_pretrained_and_resumed(tmp_path: Path) -> None:
    """They hold no model: the trainer's writes them."""
    by_hand = ByHand()
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-6")):
        trainer = digits_trainer(tmp_path, callbacks=[by_hand], save_strategy="steps", save_steps=6)
        callback = EMACallback(AveragedWeights, momentum=MOMENTUM, update_buffers=True)
        callback.attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append(state_of(callback.average))
        if checkpoint is None:
            loaded = DigitsModel.from_pretrained(tmp_path / "checkpoint-12" / "averaged")
            assert differences(own(loaded), by_hand.average) == []
    assert differences(*states) == []


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (LatestWeightAverage, {"k": 3, "interval": 2}),
        (EmaDecaySqrt, {"beta": 0.9, "switch_step": 3, "decay_steps": 6}),
    ],
)
def test_averages_in_the_place_of_a_decay_are_evaluated_and_resumed(
    tmp_path: Path, kind: Any, arguments: dict[str, Any]
) -> None:
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-6")):
        trainer = digits_trainer(tmp_path, save_strategy="steps", save_steps=6)
        callback = EMACallback(kind, **arguments).attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append(state_of(callback.average))
        assert isinstance(callback.average, BaseAveragedModel)
        averages = own(callback.average.module)
        assert_measured_with(averages, trainer.evaluate())
        loaded = DigitsModel.from_pretrained(tmp_path / "checkpoint-12" / "averaged")
        assert differences(own(loaded), averages) == []
    assert differences(*states) == []


# PEFT


def base(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 17}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Digits as texts: each pixel of the first rows is a token."""

    def __init__(self) -> None:
        self.tokens = (Digits(range(0, 64)).images.flatten(1)[:, :24] * 16).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.tokens[row]}


def adapted(**config: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(1)
    return peft.get_peft_model(base(), peft.LoraConfig(r=2, **config))


CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "a layer beside": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "magnitudes": {"target_modules": ["q_proj"], "use_dora": True},
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "copy": (ExponentialMovingAverage, {"momentum": MOMENTUM}),
    "shared base": (ExponentialMovingAverage, {"momentum": MOMENTUM, "share_frozen": True}),
    "mean": (StochasticWeightAverage, {}),
    "weights": (AveragedWeights, {"momentum": MOMENTUM}),
    "widths": (PowerFunctionEMA, {"sigma_rel": WIDTHS, "evaluated_sigma_rel": 0.1}),
}


def averaged_outputs(callback: EMACallback) -> Tensor:
    with callback.swapped() as model, torch.no_grad():
        logits: Tensor = model.eval()(input_ids=Texts().tokens[:2]).logits
    return logits


def train_adapters(
    folder: Path, model: Any, kind: Any, arguments: dict[str, Any], resume: str | None = None
) -> EMACallback:
    trainer = digits_trainer(
        folder, model=model, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1.0
    )
    trainer.train_dataset = Texts()
    trainer.compute_metrics = None
    callback = EMACallback(kind, **arguments).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return callback


@pytest.mark.parametrize(
    "kind, config",
    [*((kind, "attention") for kind in KINDS), ("copy", "a layer beside"), ("copy", "magnitudes")],
)
def test_adapters_are_written_as_peft_writes_them(tmp_path: Path, kind: str, config: str) -> None:
    model = adapted(**CONFIGS[config])
    import peft

    made, arguments = KINDS[kind]
    callback = train_adapters(tmp_path, model, made, arguments)
    folder = tmp_path / "checkpoint-4" / "averaged"
    raw = tmp_path / "checkpoint-4"
    assert (folder / "adapter_config.json").is_file()
    assert not list(folder.glob("model*"))
    # What PEFT writes of the model itself: the same names, with other values.
    written = load_file(folder / "adapter_model.safetensors")
    assert list(written) == list(load_file(raw / "adapter_model.safetensors"))
    assert differences(written, load_file(raw / "adapter_model.safetensors")) != []
    loaded = peft.PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        found = loaded(input_ids=Texts().tokens[:2]).logits
    torch.testing.assert_close(found, averaged_outputs(callback), rtol=0, atol=0)
    # The frozen base isn't there once more.
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    rest = load_file(folder / "average_state.safetensors")
    assert not [name for name in rest if name.endswith(tuple(frozen))]
    assert [name for name in rest if "lora_A" in name]
    state = state_of(callback.average)
    resumed = train_adapters(
        tmp_path, adapted(**CONFIGS[config]), made, arguments, str(tmp_path / "checkpoint-2")
    )
    assert list(resumed._trainer.model.peft_config) == ["default"]
    again = state_of(resumed.average)
    assert again.pop("_extra_state", None) == state.pop("_extra_state", None)
    assert differences(again, state) == []


def test_adapters_in_a_model_of_transformers_are_written_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")

    def model() -> LlamaForCausalLM:
        plain = base()
        plain.save_pretrained(tmp_path / "base")
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        loaded.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        return loaded

    made, arguments = KINDS["copy"]
    callback = train_adapters(tmp_path, model(), made, arguments)
    folder = tmp_path / "checkpoint-4" / "averaged"
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "adapter_model.safetensors",
        "average_state.safetensors",
    }
    loaded = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found = loaded(input_ids=Texts().tokens[:2]).logits
    torch.testing.assert_close(found, averaged_outputs(callback), rtol=0, atol=0)


def test_an_adapter_of_the_folder_s_name_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = adapted(**CONFIGS["attention"])
    model.add_adapter("averaged", peft.LoraConfig(r=2, **CONFIGS["attention"]))
    with pytest.raises(RuntimeError, match="has an adapter called 'averaged'"):
        train_adapters(tmp_path, model, *KINDS["copy"])


def test_a_parameter_that_was_trained_and_frozen_again_is_kept(tmp_path: Path) -> None:
    """Its average isn't the model's value: PEFT doesn't write it, so the state has to."""
    model = adapted(**CONFIGS["attention"])
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad_(True)

    class Freeze(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 3:
                norm.requires_grad_(False)

    trainer = digits_trainer(
        tmp_path,
        model=model,
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
        learning_rate=1.0,
        callbacks=[Freeze()],
    )
    trainer.train_dataset = Texts()
    trainer.compute_metrics = None
    callback = EMACallback(momentum=MOMENTUM).attach(trainer)
    trainer.train()
    assert isinstance(callback.average, BaseAveragedModel)
    name = "module.base_model.model.model.norm.weight"
    rest = load_file(tmp_path / "checkpoint-4" / "averaged" / "average_state.safetensors")
    assert torch.equal(rest[name], callback.average.state_dict()[name])
    assert not torch.equal(rest[name], norm)


@pytest.mark.parametrize("is_function", [False, True])
def test_sources_are_asked_of_the_trainer_s_model_alone(tmp_path: Path, is_function: bool) -> None:
    trainer = digits_trainer(tmp_path, max_steps=3)
    parameters = dict(trainer.model.named_parameters())
    masters = {name: one.detach().double() + 1 for name, one in parameters.items()}
    asked: list[nn.Module] = []

    def given(model: nn.Module) -> dict[str, Tensor]:
        asked.append(model)
        return masters

    source = given if is_function else masters
    callback = EMACallback(momentum=MOMENTUM, source=source).attach(trainer)
    trainer.train()
    assert isinstance(callback.average, AveragedWeights)
    for name, master in masters.items():
        assert torch.equal(callback.average.weights[name], master)
    assert {type(model) for model in asked} == ({DigitsModel} if is_function else set())
