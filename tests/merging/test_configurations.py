"""Adapters whose tensors mean something else are refused; models that differ are warned of."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ema_fused import cli
from ema_fused.merging import merge
from tests.merging.checkpoint_files import save, state

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft: Any = pytest.importorskip("peft", reason="needs peft")

SAME = {"r": 2, "lora_alpha": 4, "target_modules": ["q", "k"]}


def base() -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(q=nn.Linear(4, 4), k=nn.Linear(4, 4), head=nn.Linear(4, 2))
    return nn.Sequential(layers)


def adapter(path: Path, seed: int, **config: Any) -> Path:
    """An adapter of PEFT, as it saves it, with random values."""
    model = peft.get_peft_model(base(), peft.LoraConfig(**{**SAME, **config}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(path)
    return path


def edit(folder: Path, **keys: Any) -> None:
    """Writes keys into the configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def merged(folder: Path, *inputs: Path, **given: Any) -> dict[str, Any]:
    """The configuration that is carried over; no warning is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(inputs, output=folder / "out", **given)
    found: dict[str, Any] = json.loads((folder / "out" / "adapter_config.json").read_text())
    return found


# What changes the meaning of the tensors while their names and shapes stay the same.
DIFFERENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "lora_alpha": ({"lora_alpha": 8}, "4", "8"),
    "use_rslora": ({"use_rslora": True}, "not set", "true"),
    "alpha_pattern": ({"alpha_pattern": {"q": 16}}, "not set", '{"q": 16}'),
    "revision": ({"revision": "v2"}, "not set", '"v2"'),
    "task_type": ({"task_type": "FEATURE_EXTRACTION"}, "not set", '"FEATURE_EXTRACTION"'),
    "init_lora_weights": ({"init_lora_weights": "pissa"}, "not set", '"pissa"'),
}  # fmt: skip


@pytest.mark.parametrize("key", DIFFERENT)
def test_adapters_of_different_meaning_are_refused(tmp_path: Path, key: str) -> None:
    config, before, after = DIFFERENT[key]
    one, other = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, **config)
    with pytest.raises(ValueError, match="adapters differ in 1 keys") as caught:
        merge([one, other], output=tmp_path / "out")
    assert str(caught.value).splitlines()[1:] == [
        f"  '{key}': {before} in {one}; {after} in {other}"
    ]
    assert sorted(tmp_path.iterdir()) == [one, other]


def test_every_difference_is_listed_and_the_last_is_taken_when_asked(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2), adapter(tmp_path / "c", 3)]
    for path in paths[:2]:
        edit(path, base_model_name_or_path="one/model")
    edit(paths[1], bias="all", layers_to_transform=1)
    edit(paths[2], lora_alpha=8, target_modules=["q", "head"], peft_type="LOHA", init_weights="bat")
    with pytest.raises(ValueError, match=r"differ in 7 keys.*nothing was written") as found:
        merge(paths, output=tmp_path / "out")
    a, b, c = paths
    assert sorted(str(found.value).splitlines()[1:]) == [
        f"  'base_model_name_or_path': \"one/model\" in {a}, {b}; not set in {c}",
        f"  'bias': not set in {a}, {c}; \"all\" in {b}",
        f"  'init_weights': not set in {a}, {b}; \"bat\" in {c}",
        f"  'layers_to_transform': not set in {a}, {c}; [1] in {b}",
        f"  'lora_alpha': 4 in {a}, {b}; 8 in {c}",
        f'  \'peft_type\': "LORA" in {a}, {b}; "LOHA" in {c}',
        f'  \'target_modules\': ["k", "q"] in {a}, {b}; ["head", "q"] in {c}',
    ]
    assert merged(tmp_path, *paths, adapter_config="last")["lora_alpha"] == 8
    with pytest.raises(ValueError, match="adapter_config 'first' is none of equal, last"):
        merge(paths, output=tmp_path / "out", adapter_config="first")


def test_the_command_has_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, lora_alpha=8)]
    command = ["merge", *map(str, paths), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 1
    assert "(--adapter-config last)" in capsys.readouterr().err
    assert cli.main([*command, "--adapter-config", "last"]) == 0


def test_files_of_adapters_have_their_configuration_beside_them(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, lora_alpha=8)]
    files = [path / "adapter_model.safetensors" for path in paths]
    with pytest.raises(ValueError, match="'lora_alpha': 4 in "):
        merge(files, output=tmp_path / "out.safetensors")


def test_what_does_not_change_the_meaning_is_the_last_s(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, lora_dropout=0.1)
    edit(
        other,
        inference_mode=False,
        peft_version="0.1",
        init_lora_weights="gaussian",
        init_weights="uniform",
        target_modules=["q", "k"],
        revision="main",
        lora_alpha=4.0,
    )
    edit(one, target_modules=["k", "q"])
    older = json.loads((other / "adapter_config.json").read_text())
    for key in ("use_dora", "alpha_pattern", "lora_bias", "qalora_group_size", "megatron_core"):
        older.pop(key, None)  # what an older PEFT doesn't know
    (other / "adapter_config.json").write_text(json.dumps(older))
    assert merged(tmp_path, one, other) == older


def test_the_merged_adapter_is_loaded_by_peft(tmp_path: Path) -> None:
    """And it is what docs/merging.md says: the average of factors, not of their product."""
    paths = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    merged(tmp_path, *paths)
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    [a, b] = [load_file(path / "adapter_model.safetensors") for path in paths]
    up, down = ("base_model.model.q.lora_B.weight", "base_model.model.q.lora_A.weight")
    found = model.base_model.model.q.get_delta_weight("default")
    of_factors = 2 * ((a[up] + b[up]) / 2) @ ((a[down] + b[down]) / 2)
    torch.testing.assert_close(found, of_factors)
    of_products = 2 * (a[up] @ a[down] + b[up] @ b[down]) / 2
    assert not torch.allclose(found, of_products, atol=0.01)


def test_an_adapter_without_a_configuration_is_told(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    (paths[1] / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match=f"no adapter_config.json is beside .* in {paths[1]}, so"):
        merge(paths, output=tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: str) -> None:
    paths = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    file = paths[0] / "adapter_config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} is no dictionary in JSON .*copy it again"):
        merge(paths, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Models --------------------------------------------------------------------------------------


def models(folder: Path, *configs: dict[str, Any]) -> list[Path]:
    paths = []
    for number, config in enumerate(configs):
        paths.append(save(state(number), folder / f"model-{number}", "folder"))
        (paths[-1] / "config.json").write_text(json.dumps(config))
    return paths


def test_models_that_differ_are_warned_of_once(tmp_path: Path) -> None:
    config = {"model_type": "llama", "rope_theta": 1e4, "text_config": {"layers": 2, "dtype": "a"}}
    other = config | {"rope_theta": 5e5, "text_config": {"layers": 3, "dtype": "b"}, "bos": 1}
    paths = models(tmp_path, config, other)
    with pytest.warns(UserWarning) as told:
        merge(paths, output=tmp_path / "out")
    [warning] = told
    assert warning.filename == __file__
    first, *lines = str(warning.message).splitlines()
    assert first.startswith("config.json differs between the checkpoints in 3 keys, and only the l")
    assert lines == [
        f"  'rope_theta': 10000.0 in {paths[0]}; 500000.0 in {paths[1]}",
        f"  'text_config.layers': 2 in {paths[0]}; 3 in {paths[1]}",
        f"  'bos': not set in {paths[0]}; 1 in {paths[1]}",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == other


def test_dtypes_and_versions_of_models_may_differ(tmp_path: Path) -> None:
    told = {"dtype": "float32", "transformers_version": "4.1", "_name_or_path": "a"}
    other = {"torch_dtype": "bfloat16", "transformers_version": "5.0", "_name_or_path": "b"}
    told |= {"pad_token_id": None, "optimization_step": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(models(tmp_path, told, other), output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == other
