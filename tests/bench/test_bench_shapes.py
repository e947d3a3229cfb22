"""The networks whose updates are measured have the shapes of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_fused.bench import shapes

FOLDER = Path(shapes.__file__).parent / "shapes"
ELEMENTS = {
    "gpt2_small": 124_439_808,
    "llama_3_8b": 218_112_000,
    "resnet50": 25_557_032,
    "sdxl_unet": 2_567_463_684,
    "vit_l_16": 304_326_632,
    "yolov8_l": 43_691_520,
}


def written(key: str) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """A file, and its shapes one by one as they are in it."""
    found = json.loads((FOLDER / f"{key}.json").read_text(encoding="utf-8"))
    return found, [tuple(shape) for shape, count in found["shapes"] for _ in range(count)]


def parameters(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


def test_files_say_what_they_hold_and_from_where() -> None:
    assert shapes.networks() == sorted(ELEMENTS)
    for key, elements in ELEMENTS.items():
        found, all_shapes = written(key)
        assert found["tensors"] == len(all_shapes)
        assert found["elements"] == elements
        assert shapes.Shapes(key, "", all_shapes, "").elements == elements
        assert len(found["source"]) > 20
        assert len(shapes.find(key).shapes) == len(all_shapes)
        assert shapes.find(key).title == found["title"]


def test_networks_of_transformers_have_these_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers: Any = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_key_value_heads=8
    )
    resnet = transformers.ResNetConfig(num_labels=1000)
    with torch.device("meta"):
        assert written("gpt2_small")[1] == parameters(
            transformers.GPT2Model(transformers.GPT2Config())
        )
        assert written("llama_3_8b")[1] == parameters(transformers.LlamaModel(llama).layers[0])
        assert written("resnet50")[1] == parameters(
            transformers.ResNetForImageClassification(resnet)
        )


def test_sdxl_of_diffusers_has_these_shapes() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    assert written("sdxl_unet")[1] == parameters(unet)
    divided = shapes.find("sdxl_unet")
    assert divided.shapes[0] == (80, 4, 3, 3)
    assert "/ 4" in divided.title
    assert divided.elements * 15 < ELEMENTS["sdxl_unet"] < divided.elements * 17


def test_lists_and_repetitions_are_told_by_their_keys() -> None:
    lists = shapes.find("1000x16")
    assert (len(lists.shapes), lists.elements, lists.title) == (1000, 16_000, "1 000 x 16")
    twice = shapes.find("llama_3_8b*2")
    assert twice.shapes == shapes.find("llama_3_8b").shapes * 2
    assert twice.title == "Llama-3-8B, 1 of 32 layers, 2 times"


def test_capped_shapes_have_as_many_tensors_of_as_many_dimensions() -> None:
    for key in ELEMENTS:
        full, tiny = shapes.find(key), shapes.find(key).capped(4)
        assert list(map(len, tiny.shapes)) == list(map(len, full.shapes))
        assert max(max(shape, default=0) for shape in tiny.shapes) == 4
