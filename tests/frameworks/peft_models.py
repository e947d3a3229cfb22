"""Tiny language models with PEFT's adapters, and steps of training for them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft: Any = pytest.importorskip("peft", reason="needs peft")

TOKENS = torch.arange(10).reshape(2, 5)


def base(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 17}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **config))


def adapted(config: Any = None, *, autocast: bool = True, **of_base: Any) -> Any:
    """The base with an adapter; by default LoRA on its queries."""
    model = base(**of_base)
    torch.manual_seed(1)
    if config is None:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


class Training:
    """Steps of SGD on the parameters that train when it is made; they get noise too."""

    def __init__(self, model: Any) -> None:
        self.model = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.5)
        self._noise = torch.Generator().manual_seed(2)

    def step(self) -> None:
        self.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                noise = torch.randn(parameter.shape, generator=self._noise).to(parameter.dtype)
                parameter.grad = noise if parameter.grad is None else parameter.grad + noise / 4
        self.optimizer.step()
        self.optimizer.zero_grad()
