"""Averages of PEFT's adapters: as a second adapter of the same base, and in PEFT's own files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema_fused import (
    AveragedWeights,
    BiasCorrectedEMA,
    ExponentialMovingAverage,
    PowerFunctionEMA,
)
from ema_fused.modules.module_pairs import slots_of
from tests.frameworks.peft_models import TOKENS, Training, adapted, base, logits, peft
from tests.networks import differences

from ema_fused.adapters.peft import (  # isort: skip  (where peft is installed)
    add_averaged_adapter,
    save_adapter,
    using_adapter,
)

MOMENTUM = 0.25
TIED = {"tie_word_embeddings": True}


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "LoRA": (lambda: lora(lora_dropout=0.5), {}),
    "rsLoRA": (lambda: lora(use_rslora=True), {}),
    "DoRA": (lambda: lora(use_dora=True), {}),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), {}),
    "of an embedding": (lambda: lora(target_modules=["embed_tokens", "q_proj"]), {}),
    "a layer beside": (lambda: lora(modules_to_save=["lm_head"]), {}),
    "tied layers beside": (
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        TIED,
    ),
    "tokens": (lambda: lora(trainable_token_indices=[1, 2]), {}),
    "tokens of tied embeddings": (lambda: lora(trainable_token_indices=[1, 2]), TIED),
    "IA3": (
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
        {},
    ),
    "VeRA": (lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]), {}),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), {}),
    "prompts": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        {},
    ),
    "prompts with an encoder": (
        lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
        ),
        {},
    ),
}


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def of_adapter(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter, without its name in theirs."""
    return {
        ".".join(part for part in key.split(".") if part != name): slot.tensor
        for key, slot in slots_of(model).items()
        if name in key.split(".") and isinstance(slot.tensor, nn.Parameter)
    }


def lora_average(model: Any, **options: Any) -> AveragedWeights:
    return AveragedWeights(model, momentum=MOMENTUM, share_frozen=True, **options)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # of the second one
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_an_adapter_of_the_model_and_of_files(tmp_path: Path, kind: str) -> None:
    config, of_base = KINDS[kind]
    model = adapted(config(), **of_base)
    average: Any = lora_average(model)
    if kind in ("DoRA", "tied layers beside"):  # a copy of the model, too
        average = ExponentialMovingAverage(model, momentum=MOMENTUM, share_frozen=True)
    training = Training(model)
    by_hand: dict[str, Tensor] = {}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}

    def step() -> None:
        training.step()
        average.update_parameters(model)
        for name, now in trained_of(model).items():
            by_hand[name] = torch.lerp(by_hand[name], now, MOMENTUM) if name in by_hand else now

    step()
    model.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state, names = torch.get_rng_state(), set(average.state_dict())
    add_averaged_adapter(average, model, "teacher")
    assert torch.equal(torch.get_rng_state(), state)
    now = dict(model.named_parameters())
    assert differences({name: now[name] for name in before}, before) == []
    assert model.active_adapters == ["default"]
    assert not any(module.training for module in model.modules())
    step()  # the adapter gets no gradient, and each update is seen in it
    step()
    assert set(average.state_dict()) == names
    averages = dict(average.module.named_parameters())
    assert differences({name: averages[name] for name in by_hand}, by_hand) == []
    expected = of_adapter(average.module, "default")
    for name, tensor in of_adapter(model, "teacher").items():
        assert tensor.data_ptr() == expected[name].data_ptr(), name
        assert not tensor.requires_grad
    raw = logits(model)
    with using_adapter(model, "teacher"):
        taught = logits(model)
    with average.swapped(model):
        evaluated = logits(model)
    assert torch.equal(taught, evaluated) and not torch.equal(taught, raw)
    assert torch.equal(logits(model), raw)
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in needs} == needs

    folder = save_adapter(average, model, tmp_path / "averaged")
    assert folder == tmp_path / "averaged"
    assert torch.equal(logits(model), raw)  # its own tensors are back
    loaded = peft.PeftModel.from_pretrained(base(**of_base), folder).eval()
    assert torch.equal(logits(loaded), evaluated)
    model.save_pretrained(tmp_path / "raw", selected_adapters=["default"])
    written = [load_file(tmp_path / of / "adapter_model.safetensors") for of in ("averaged", "raw")]
    assert written[0].keys() == written[1].keys()
    assert differences(*written) != []

    model.delete_adapter("teacher")
    step()
    assert differences({name: averages[name] for name in by_hand}, by_hand) == []


@pytest.mark.parametrize("kind", [AveragedWeights, ExponentialMovingAverage])
def test_the_adapter_alone_may_be_chosen_by_name(tmp_path: Path, kind: Any) -> None:
    model = adapted()
    chosen, shared = (
        kind(model, momentum=MOMENTUM, **options)
        for options in ({"include": "lora_"}, {"share_frozen": True})
    )
    training = Training(model)
    for _ in range(3):
        training.step()
        for average in (chosen, shared):
            average.update_parameters(model)
    if kind is AveragedWeights:  # a copy's state has all
        names = [name for name in chosen.state_dict() if name != "steps"]
        assert len(names) == 4 and all("lora_" in name for name in names)
    written = [
        load_file(save_adapter(average, model, tmp_path / of) / "adapter_model.safetensors")
        for of, average in (("chosen", chosen), ("shared", shared))
    ]
    assert len(written[0]) == 4 and differences(*written) == []
    add_averaged_adapter(chosen, model)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "chosen").eval()
    with using_adapter(model, "teacher"):
        assert torch.equal(logits(model), logits(loaded))
    training.step()
    chosen.update_parameters(model)
    with using_adapter(model, "teacher"):
        assert not torch.equal(logits(model), logits(loaded))


def bytes_of(*modules: nn.Module) -> int:
    held = {
        slot.tensor.untyped_storage().data_ptr(): slot.tensor.untyped_storage().nbytes()
        for module in modules
        for slot in slots_of(module).values()
    }
    return sum(held.values())


def test_neither_base_nor_adapter_is_there_twice() -> None:
    model = adapted(lora(modules_to_save=["lm_head"]))
    average = lora_average(model)
    of_adapter = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    caches = sum(buffer.nbytes for buffer in model.buffers())  # of the rotations, by each module
    before = bytes_of(model, average)
    assert before == bytes_of(model) + of_adapter + caches + 8  # and the number of steps
    add_averaged_adapter(average, model)
    assert bytes_of(model, average) == before


def test_an_average_of_another_dtype_is_computed_with_in_that_dtype(tmp_path: Path) -> None:
    model = adapted(lora(), autocast=False, dtype=torch.bfloat16).to(torch.bfloat16)
    average = lora_average(model, averaged_dtype=torch.float32)
    training = Training(model)
    add_averaged_adapter(average, model)
    for _ in range(3):
        training.step()
        average.update_parameters(model)
    taught = of_adapter(model, "teacher")
    assert {tensor.dtype for tensor in taught.values()} == {torch.float32}
    folder = save_adapter(average, model, tmp_path)
    written = load_file(folder / "adapter_model.safetensors")
    assert differences(written, dict(taught)) == []
    loaded = peft.PeftModel.from_pretrained(base().to(torch.bfloat16), folder)
    with using_adapter(model, "teacher"):
        assert torch.equal(logits(model), logits(loaded))


def test_of_several_adapters_the_active_one_is_averaged(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", lora(target_modules=["v_proj"]))
    average = lora_average(model)
    training = Training(model)
    for _ in range(2):
        training.step()
        average.update_parameters(model)
    assert not any("other" in name for name in average.state_dict())
    with pytest.raises(ValueError, match="adapter 'other' isn't averaged: it has no tensors"):
        save_adapter(average, model, tmp_path, adapter="other")
    with pytest.raises(ValueError, match="adapter 'other' isn't averaged"):
        add_averaged_adapter(average, model, adapter="other")
    with pytest.raises(ValueError, match="the model has no adapter 'third'; it has default, other"):
        save_adapter(average, model, tmp_path, adapter="third")
    add_averaged_adapter(average, model)
    assert set(of_adapter(model, "teacher")) == set(of_adapter(model, "default"))

    model.set_adapter("other")
    second = lora_average(model)
    Training(model).step()
    second.update_parameters(model)
    folder = save_adapter(second, model, tmp_path)
    assert folder == tmp_path / "other"  # as PEFT does
    averages = {name: p for name, p in second.module.named_parameters() if "v_proj.lora" in name}
    written = load_file(folder / "adapter_model.safetensors")
    assert (
        differences(written, {name.replace(".other", ""): p for name, p in averages.items()}) == []
    )

    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(default, other\); say by"):
        save_adapter(second, model, tmp_path)
    active = logits(model)
    with using_adapter(model, "teacher"):
        assert model.active_adapters == ["teacher"]
    assert model.active_adapters == ["default", "other"]
    assert torch.equal(logits(model), active)


def test_averages_by_name_are_written_too(tmp_path: Path) -> None:
    model = adapted()
    widths = PowerFunctionEMA(model, (0.05, 0.1))
    training = Training(model)
    for _ in range(3):
        training.step()
        widths.update_parameters(model)
    folder = save_adapter(widths.average(0.1), model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
    with widths.swapped(model, sigma_rel=0.1):
        assert torch.equal(logits(loaded), logits(model))


def test_what_needs_a_gradient_is_after_the_block_as_before() -> None:
    model = adapted()
    average = lora_average(model)
    add_averaged_adapter(average, model)
    for name, parameter in model.named_parameters():
        if "lora_A.default" in name:
            parameter.requires_grad = False  # by the user: LoRA-FA and the like
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="from the block"), using_adapter(model, "teacher"):
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError("from the block")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
    assert model.active_adapters == ["default"]
    # PEFT's own way makes the teacher trainable, and then everything of the student.
    model.set_adapter("teacher")
    assert all(p.requires_grad for p in of_adapter(model, "teacher").values())
    model.set_adapter("default")
    assert all(p.requires_grad for p in of_adapter(model, "default").values())


def test_a_graph_through_the_adapter_knows_of_updates() -> None:
    model = adapted()
    average = lora_average(model)
    average.update_parameters(model)
    add_averaged_adapter(average, model)
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    with using_adapter(model, "teacher"):
        loss = model(inputs_embeds=inputs).logits.sum()
    Training(model).step()
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merged_adapters_are_refused_until_they_are_unmerged() -> None:
    model = adapted()
    average, copied = lora_average(model), ExponentialMovingAverage(model, share_frozen=True)
    training = Training(model)
    for _ in range(2):
        training.step()
        average.update_parameters(model)
        copied.update_parameters(model)
    before = {name: t.clone() for name, t in average.state_dict().items()}
    model.merge_adapter()
    uses: list[Callable[[], object]] = [
        lambda: average.update_parameters(model),
        lambda: copied.update_parameters(model),
        lambda: average.swapped(model).__enter__(),
        lambda: average.copy_to(model),
        lambda: lora_average(model).update_parameters(model),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"are merged into its weights \(default\).*unmerge"):
            use()
    assert differences(dict(average.state_dict()), before) == []
    model.unmerge_adapter()
    training.step()
    average.update_parameters(model)
    assert int(average.steps) == 3


def test_an_update_after_merge_and_unload_says_what_to_do() -> None:
    model = adapted()
    average = lora_average(model)
    average.update_parameters(model)
    before = {name: t.clone() for name, t in average.state_dict().items()}
    copied = copy.deepcopy(model)
    merged = model.merge_and_unload()
    for other in (merged, model):
        with pytest.raises(KeyError, match=r"merged and unloaded.*merge a copy of it instead"):
            average.update_parameters(other)
    assert differences(dict(average.state_dict()), before) == []
    average.copy_to(copied)  # the way that it says
    copied.merge_and_unload()


def test_adapters_may_come_and_go() -> None:
    model = adapted()
    average = lora_average(model)
    training = Training(model)
    training.step()
    average.update_parameters(model)
    kept = {name: p.clone() for name, p in of_adapter(average.module, "default").items()}
    model.add_adapter("other", lora(target_modules=["v_proj"]))
    with pytest.raises(KeyError, match=r"unexpected in the model: .*other.*averaged.adopt\(model"):
        average.update_parameters(model)
    average.adopt(model)
    assert differences(of_adapter(average.module, "default"), kept) == []
    add_averaged_adapter(average, model)
    with pytest.raises(ValueError, match=r"is a tensor of the average itself.*delete_adapter\(\)"):
        average.adopt(model)
    for gone in ("teacher", "other"):
        model.delete_adapter(gone)
    average.adopt(model)
    training.step()
    average.update_parameters(model)
    assert int(average.steps) == 2
    assert differences(of_adapter(average.module, "default"), kept) != []


def test_corrected_values_have_no_place_in_an_averaged_adapter() -> None:
    model = adapted()
    average = BiasCorrectedEMA(model, share_frozen=True)
    add_averaged_adapter(average, model)
    with (
        pytest.raises(ValueError, match=r"which has no corrected values; delete_adapter\(\)"),
        average.swapped_corrected(model),
    ):
        pass
    model.delete_adapter("teacher")
    with average.swapped_corrected(model):
        pass


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    def run(steps: range, *, load: bool) -> tuple[Any, AveragedWeights, Training]:
        model = adapted()
        average = lora_average(model)
        training = Training(model)
        add_averaged_adapter(average, model)
        if load:
            # PEFT loads all adapters that it has written, and so the averages; then the count.
            for name, folder in (("default", tmp_path), ("teacher", tmp_path / "teacher")):
                model.load_adapter(folder, name, is_trainable=name == "default")
            average.load_state_dict(torch.load(tmp_path / "average.pt"))
        for number in range(steps.stop):
            if number in steps:
                training.step()
                average.update_parameters(model)
            else:
                torch.randn(1)
                for group in training.optimizer.param_groups:  # the noise of the steps before
                    for parameter in group["params"]:
                        torch.randn(parameter.shape, generator=training._noise)
        return model, average, training

    model, average, _ = run(range(0, 2), load=False)
    model.save_pretrained(tmp_path)
    torch.save(average.state_dict(), tmp_path / "average.pt")
    written = load_file(tmp_path / "teacher" / "adapter_model.safetensors")
    assert differences(written, dict(of_adapter(average.module, "default"))) == []
    whole = run(range(0, 4), load=False)[1].state_dict()
    resumed_model, resumed, _ = run(range(2, 4), load=True)
    assert differences(dict(resumed.state_dict()), dict(whole)) == []
    expected = of_adapter(resumed.module, "default")
    for name, tensor in of_adapter(resumed_model, "teacher").items():
        assert tensor.data_ptr() == expected[name].data_ptr()


def test_what_wraps_the_model_is_seen_through(tmp_path: Path) -> None:
    model = adapted()
    average = lora_average(nn.DataParallel(model))
    Training(model).step()
    average.update_parameters(model)
    wrapped = nn.DataParallel(model)
    add_averaged_adapter(average, wrapped)
    with using_adapter(wrapped, "teacher") as inside:
        assert inside is wrapped and model.active_adapters == ["teacher"]
    save_adapter(average, wrapped, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


def elsewhere(model: Any) -> Any:
    return lora_average(model, device="meta")


def taken(model: Any) -> Any:
    model.add_adapter("teacher", lora())
    return lora_average(model)


REFUSED: dict[str, tuple[Callable[[Any], Any], str, type[Exception], str]] = {
    "no average": (lambda _: {}, "teacher", TypeError, "was given a dict as the average"),
    "offload": (
        lambda model: lora_average(model, offload="cpu"),
        "teacher",
        ValueError,
        r"updated beside the training \(offload= or overlap=\)",
    ),
    "elsewhere": (elsewhere, "teacher", ValueError, "is on meta and the adapter on cpu"),
    "taken": (taken, "teacher", ValueError, "has an adapter 'teacher' already; delete_adapter"),
    "a dot": (lora_average, "a.b", ValueError, "name is 'a.b'; the name of an adapter, without"),
    "frozen": (
        lambda model: lora_average(model.requires_grad_(False)),
        "teacher",
        ValueError,
        "adapter 'default' isn't averaged: .*they needed no gradient",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_an_adapter_is_refused_in_words(case: str) -> None:
    make, name, error, message = REFUSED[case]
    model = adapted()
    average = make(model)
    before = set(slots_of(model))
    with pytest.raises(error, match=message):
        add_averaged_adapter(average, model, name)
    assert set(slots_of(model)) == before


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "config, of_base, message",
    [
        # PEFT puts a second adapter on one of the two tied layers only.
        (
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            TIED,
            "has no place in adapter 'teacher' for averaged tensors of 'default': .*lm_head",
        ),
        ({"bias": "lora_only"}, {"attention_bias": True}, "supports only 1 adapter with bias"),
    ],
)
def test_where_peft_takes_no_second_adapter_nothing_is_added(
    tmp_path: Path, config: dict[str, Any], of_base: dict[str, Any], message: str
) -> None:
    model = adapted(lora(**config), **of_base)
    average = lora_average(model)
    before = set(slots_of(model))
    with pytest.raises(ValueError, match=message):
        add_averaged_adapter(average, model)
    assert set(slots_of(model)) == before and list(model.peft_config) == ["default"]
    training = Training(model)
    for _ in range(2):
        training.step()
        average.update_parameters(model)
    loaded = peft.PeftModel.from_pretrained(base(**of_base), save_adapter(average, model, tmp_path))
    with average.swapped(model):
        assert torch.equal(logits(loaded), logits(model))


def test_other_models_and_swapped_averages_are_refused(tmp_path: Path) -> None:
    model = adapted()
    average = lora_average(model)
    plain = base()
    with pytest.raises(TypeError, match=r"was given a LlamaForCausalLM as the model; a peft.Peft"):
        add_averaged_adapter(average, plain)
    with pytest.raises(TypeError, match=r"save_adapter\(\) was given a int as the model"):
        save_adapter(average, 3, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has no adapter 'teacher'; it has default"):
        using_adapter(model, "teacher").__enter__()
    with average.swapped(model):
        for use in (add_averaged_adapter, save_adapter):
            with pytest.raises(RuntimeError, match="while averaged weights are swapped in"):
                use(average, model, "teacher")  # type: ignore[operator]
    assert not (Path.cwd() / "teacher").exists()
