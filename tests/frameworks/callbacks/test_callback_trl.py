"""TRL's callbacks beside ours in runs of transformers' Trainer: the same numbers to the bit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ema_fused.callbacks import trl as ours
from ema_fused.engine import backends
from tests.frameworks.originals import original
from tests.frameworks.peft_models import TOKENS, adapted, base, logits, peft
from tests.networks import differences

TRL = "trl==1.16.0"
theirs = original(TRL, "trl.trainer.callbacks")
teachers = [
    original(TRL, f"trl.experimental.{trainer}.teacher_sync") for trainer in ("sdpo", "sdft")
]
of_reference = original(TRL, "trl.experimental.bema_for_ref_model.callback")


@dataclass
class Arguments(TrainingArguments):  # type: ignore[misc]
    """What TRL's configurations add."""

    ref_model_sync_steps: int = 2
    ref_model_mixup_alpha: float = 0.6
    teacher_sync_steps: int = 2
    teacher_update_rate: float = 0.3


class AtEachStep(TrainerCallback):  # type: ignore[misc]
    """Calls a function after each step, once the callbacks before this one have been called."""

    def __init__(self, look: Callable[[int], None]) -> None:
        self.look = look
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.steps += 1
        self.look(state.global_step)


def trainer_of(
    model: Any, folder: Path, *callbacks: Any, steps: int = 6, **arguments: Any
) -> Trainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "optim": "sgd",
        **arguments,
    }
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(6, 1).roll(1, 1)]
    for number, row in enumerate(rows):
        rotated = row["input_ids"].roll(number)
        row.update(input_ids=rotated, labels=rotated)
    return Trainer(model, Arguments(**options), train_dataset=rows, callbacks=list(callbacks))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# SyncRefModelCallback, SyncTeacherModelCallback


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["SyncRefModelCallback", "SyncTeacherModelCallback"])
def test_references_are_the_originals_to_the_bit(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = base().to(dtype)
    references = [base(seed=1).to(dtype) for _ in range(2)]
    start = values(references[0])
    beside = theirs if kind == "SyncRefModelCallback" else teachers[0]
    changes = []

    def look(step: int) -> None:
        assert differences(values(references[0]), values(references[1])) == []
        changes.append(differences(values(references[0]), start) != [])

    callbacks = [
        getattr(module, kind)(reference, None)
        for module, reference in zip((beside, ours), references, strict=True)
    ]
    trainer_of(model, tmp_path, *callbacks, AtEachStep(look)).train()
    assert changes == [False, True, True, True, True, True]


def test_a_reference_of_another_structure_is_refused_and_unchanged() -> None:
    model, reference = base(), base(seed=1)
    reference.extra = nn.Linear(2, 2)
    start = values(reference)
    with pytest.raises(ValueError, match="reference model has 23 parameters and the model 21; two"):
        ours.SyncRefModelCallback.sync_target_model(model, reference, 0.5)
    assert differences(values(reference), start) == []
    # TRL's raises when it has written all the others.
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        theirs.SyncRefModelCallback._sync_target_model(model, reference, 0.5)
    assert len(differences(values(reference), start)) > 10


def test_a_reference_is_unwrapped_and_may_be_none() -> None:
    model, reference = base(), base(seed=1)
    args = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    state = SimpleNamespace(global_step=1)
    wrapped = nn.DataParallel(model)
    accelerator = SimpleNamespace(unwrap_model=lambda wrapper: wrapper.module)
    ours.SyncRefModelCallback(None, None).on_step_end(args, state, None, model=wrapped)
    ours.SyncRefModelCallback(reference, accelerator).on_step_end(args, state, None, model=wrapped)
    assert differences(values(reference), values(model)) == []


# PEFTAdapterEMACallback


def teacher_of(model: Any, name: str) -> dict[str, Tensor]:
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    return {key: tensor.detach().clone() for key, tensor in state.items()}


@pytest.mark.parametrize("of", teachers, ids=["sdpo", "sdft"])
def test_teachers_are_the_originals_to_the_bit(tmp_path: Path, of: Any) -> None:
    model = adapted()
    options = {"update_rate": 0.3, "sync_steps": 2}
    beside = of.PEFTAdapterEMACallback(model, "beside", **options)
    callback = ours.PEFTAdapterEMACallback(model, "teacher", **options)
    seen = []

    def look(step: int) -> None:
        found = teacher_of(model, "teacher")
        assert differences(found, teacher_of(model, "beside")) == []
        assert differences(dict(callback.shadow_weights or {}), beside.shadow_weights) == []
        seen.append(max(float(tensor.abs().max()) for tensor in found.values()) > 0)

    trainer_of(model, tmp_path, beside, callback, AtEachStep(look)).train()
    assert seen == [False, True, True, True, True, True]
    assert callback.teacher_adapter_config is model.peft_config["default"]
    assert callback.average is not None
    teacher = dict(model.named_parameters())
    for name, average in callback.average.avg_parameters.items():
        if "default" in name:
            there = teacher[name.replace("default", "teacher")]
            assert there.data_ptr() == average.data_ptr() and not there.requires_grad


def test_what_the_user_froze_stays_frozen(tmp_path: Path) -> None:
    """TRL's makes all of the student trainable, by switching adapters at each step."""
    trains = {}
    for of in (teachers[0], ours):
        model = adapted()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad = False
        trainer_of(model, tmp_path, of.PEFTAdapterEMACallback(model), steps=2).train()
        trains[of] = {
            name.split(".")[-3]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    assert trains == {teachers[0]: {"lora_A", "lora_B"}, ours: {"lora_B"}}


def test_the_teacher_of_a_checkpoint_goes_on(tmp_path: Path) -> None:
    def run(of: Any, resume: str | None = None) -> dict[str, Tensor]:
        model = adapted()
        callback = of.PEFTAdapterEMACallback(model, update_rate=0.3)
        trainer = trainer_of(model, tmp_path, callback, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return teacher_of(model, "teacher")

    checkpoint = str(tmp_path / "checkpoint-3")
    whole = run(ours)
    assert differences(run(ours, checkpoint), whole) == []
    # TRL's can't resume at all.
    assert differences(run(teachers[0]), whole) == []
    with pytest.raises(ValueError, match="Adapter with name 'teacher' already exists"):
        run(teachers[0], checkpoint)


def test_an_adapter_that_is_there_is_refused_in_peft_s_words(tmp_path: Path) -> None:
    for of in (teachers[0], ours):
        model = adapted()
        model.add_adapter("teacher", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="Adapter with name 'teacher' already exists"):
            trainer_of(model, tmp_path, of.PEFTAdapterEMACallback(model)).train()
    plain = base()
    with pytest.raises(TypeError, match=r"a peft\.PeftModel is expected"):
        trainer_of(plain, tmp_path, ours.PEFTAdapterEMACallback(plain)).train()


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(backends.native() is None, reason="foreach runs torch's operations")
def test_updates_are_one_launch_and_no_operation_of_torch() -> None:
    model, reference, with_adapter = base(), base(seed=1), adapted()
    of_adapters = [
        of.PEFTAdapterEMACallback(with_adapter, name)
        for of, name in ((teachers[0], "beside"), (ours, "teacher"))
    ]
    args = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=0.3)
    state = SimpleNamespace(global_step=0)
    for callback in of_adapters:
        callback.on_train_begin(args, state, None)

    def asked(callback: Any, of: nn.Module) -> list[str]:
        for step in (1, 2):  # the first one plans
            with Operations() as counted:
                state.global_step = step
                callback.on_step_end(args, state, None, model=of)
        return counted.names

    assert asked(ours.SyncRefModelCallback(reference, None), model) == []
    with Operations() as counted:
        theirs.SyncRefModelCallback._sync_target_model(model, reference, 0.3)
    assert len(counted.names) >= 2 * 21
    assert asked(of_adapters[1], with_adapter) == []
    assert len(asked(of_adapters[0], with_adapter)) > 4 * 4


# BEMACallback

SCALES: dict[str, dict[str, Any]] = {
    "each step": {"update_freq": 1},
    "every second": {"update_freq": 2, "lag": 3, "multiplier": 0.5},
    "later": {"update_freq": 2, "update_after": 3, "ema_power": 0.3, "bias_power": 0.6},
    "from the first step": {"update_freq": 1, "update_after": 1, "min_ema_multiplier": 0.31},
    "no average": {"update_freq": 1, "ema_power": 0.0},
}


@pytest.mark.parametrize(
    "scales, dtype", [*((s, torch.float32) for s in SCALES), ("each step", torch.bfloat16)], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # 16 bits
def test_bema_is_the_original_to_the_bit(tmp_path: Path, scales: str, dtype: torch.dtype) -> None:
    model = base().to(dtype)
    beside, callback = (of.BEMACallback(**SCALES[scales]) for of in (theirs, ours))
    changes = []
    start = values(model)

    def look(step: int) -> None:
        found = values(callback.running_model)
        # TRL makes its copy in float32, whatever the model's dtype.
        expected = values(beside.running_model)
        assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
        singles = {name: tensor.float() for name, tensor in found.items()}
        assert differences(singles, expected) == []
        changes.append(differences(found, start) != [])

    trainer_of(model, tmp_path, beside, callback, AtEachStep(look)).train()
    first = {"each step": 1, "every second": 2, "later": 5, "from the first step": 2}
    assert changes == [step >= first.get(scales, 1) for step in range(1, 7)]
    written = LlamaForCausalLM.from_pretrained(tmp_path / "bema", dtype=dtype)
    assert differences(values(written), values(callback.running_model)) == []


def test_a_resumed_bema_goes_on_where_the_original_begins_again(tmp_path: Path) -> None:
    def run(of: Any, folder: Path, resume: str | None = None, **more: Any) -> dict[str, Tensor]:
        model = base()
        callback = of.BEMACallback(update_freq=2, update_after=1, **more)
        trainer = trainer_of(model, folder, callback, steps=8, save_strategy="steps", save_steps=4)
        trainer.train(resume_from_checkpoint=resume)
        return values(callback.running_model)

    whole = run(ours, tmp_path)
    checkpoint = tmp_path / "checkpoint-4"
    assert differences(run(ours, tmp_path, str(checkpoint)), whole) == []
    moved = tmp_path / "elsewhere" / "checkpoint-4"
    shutil.copytree(checkpoint, moved)
    found = run(ours, tmp_path / "other", str(moved), resume_from=str(moved))
    assert differences(found, whole) == []
    # TRL's takes the weights that it resumes from for the initial ones.
    assert differences(run(theirs, tmp_path), whole) == []
    resumed = run(theirs, tmp_path, str(checkpoint))
    assert len(differences(resumed, whole)) == len(whole)
    # So does ours of a checkpoint without its state, and says so.
    (checkpoint / "bema_state.pt").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match=r"checkpoint-4 has no bema_state\.pt.*begin with the mod"):
        assert differences(run(ours, tmp_path, str(checkpoint)), resumed) == []


def test_between_two_updates_a_resumed_bema_has_the_last_one(tmp_path: Path) -> None:
    models = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        callback = ours.BEMACallback(update_freq=3, update_after=1)  # at 4, and then at 7
        trainer = trainer_of(base(), tmp_path, callback, save_strategy="steps", save_steps=5)
        trainer.train(resume_from_checkpoint=resume)
        models.append(values(callback.running_model))
    assert differences(*models) == []


def test_bema_takes_models_that_the_original_refuses(tmp_path: Path) -> None:
    frozen = base()
    frozen.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        trainer_of(frozen, tmp_path, theirs.BEMACallback(update_freq=1)).train()
    frozen = base()
    frozen.lm_head.weight.requires_grad_(False)
    callback = ours.BEMACallback(update_freq=1)
    trainer = trainer_of(frozen, tmp_path, callback)
    trainer.train()
    assert callback.running_model.lm_head.weight.data_ptr() == frozen.lm_head.weight.data_ptr()
    trainer.train()  # once more, from here

    with pytest.raises(TypeError):
        trainer_of(adapted(), tmp_path, theirs.BEMACallback(update_freq=1)).train()
    model = adapted()
    callback = ours.BEMACallback(update_freq=1)
    trainer_of(model, tmp_path, callback).train()
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "bema")
    assert torch.equal(logits(loaded), logits(callback.running_model))
    assert not torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="update_ref_model=True with PEFT's adapters"):
        callback = ours.BEMACallback(1, update_ref_model=True, ref_model_update_freq=1)
        begun(callback, model)
        stepped(callback, model, 1, ref_model=None)


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    """TRL's keeps the lists of the first."""
    trainers = [
        trainer_of(base(), tmp_path, of.BEMACallback(update_freq=1)) for of in (theirs, ours)
    ]
    for trainer in trainers:
        trainer.train()
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        trainers[0].train()
    trainers[1].train()


def begun(callback: Any, model: Any) -> None:
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(SimpleNamespace(output_dir="none"), state, None, model=model)


def stepped(callback: Any, model: Any, step: int, **rest: Any) -> None:
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    callback.on_step_end(None, state, None, model=model, **rest)


def test_making_the_copy_takes_no_random_numbers() -> None:
    """TRL's makes a new model, and so changes what is drawn in the training afterwards."""
    for of, keeps in ((theirs, False), (ours, True)):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        begun(of.BEMACallback(), base())
        torch.manual_seed(7)
        model = base()
        before = torch.get_rng_state()
        begun(of.BEMACallback(), model)
        assert torch.equal(torch.get_rng_state(), before) is keeps


def test_a_reference_takes_the_averages() -> None:
    options = {"update_freq": 1, "update_ref_model": True, "ref_model_update_freq": 2}
    pairs = [
        (of.BEMACallback(**options, ref_model_update_after=1), base(seed=1))
        for of in (of_reference, ours)
    ]
    model = base()
    start = values(pairs[0][1])
    for callback, _ in pairs:
        begun(callback, model)
        with pytest.raises(ValueError, match="'ref_model' not found in kwargs"):
            stepped(callback, model, 1)
    for step in range(2, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for callback, reference in pairs:
            stepped(callback, model, step, ref_model=nn.DataParallel(reference))
        assert differences(*(values(reference) for _, reference in pairs)) == []
        assert (differences(values(pairs[0][1]), start) == []) is (step < 3)
    # Without a reference of its own, the model itself takes them; so it does in TRL.
    models = [copy.deepcopy(model) for _ in pairs]
    for (callback, _), one in zip(pairs, models, strict=True):
        callback.thetat_params = list(one.parameters())  # of TRL's
        stepped(callback, one, 7, ref_model=None)
    assert differences(*map(values, models)) == []
    assert differences(values(models[0]), values(model)) != []


def test_a_checkpoint_elsewhere_is_warned_of(tmp_path: Path) -> None:
    model, callback = base(), ours.BEMACallback()
    begun(callback, model)
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    with pytest.warns(UserWarning, match="found no checkpoint at .*checkpoint-3"):
        callback.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)


# use_fused_callbacks


def test_the_callbacks_of_a_trainer_are_replaced_in_their_places(tmp_path: Path) -> None:
    model, reference = adapted(), base(seed=1)
    before = [
        theirs.SyncRefModelCallback(reference, None),
        teachers[0].SyncTeacherModelCallback(reference),
        teachers[1].PEFTAdapterEMACallback(model, "taught", 0.2, 3),
        theirs.BEMACallback(3, device="cpu", lag=4),
        of_reference.BEMACallback(5, update_ref_model=True),
    ]
    trainer = trainer_of(model, tmp_path, *before)
    told = ours.use_fused_callbacks(trainer)
    assert len(told) == 5 and told[0] == (
        "trl.trainer.callbacks.SyncRefModelCallback is ema_fused.callbacks.trl's now"
    )
    callbacks = trainer.callback_handler.callbacks
    now = [one for one in callbacks if type(one).__module__.startswith("ema_fused.")]
    for callback, old in zip(now, before, strict=True):
        assert type(callback).__name__ == type(old).__name__
        for name in vars(callback).keys() & vars(old).keys() - {"thetat_params"}:
            assert getattr(callback, name) is getattr(old, name), name
    assert ours.use_fused_callbacks(trainer) == []
    with pytest.raises(TypeError, match=r"was given a int; a transformers.Trainer is expected"):
        ours.use_fused_callbacks(3)
    late = theirs.BEMACallback()
    begun(late, base())
    with pytest.raises(RuntimeError, match="BEMACallback of the trainer has averages already"):
        ours.use_fused_callbacks(trainer_of(model, tmp_path, late))
