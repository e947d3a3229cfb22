"""What the config ``mmengine_digits.py`` names: data, network and metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset


@DATASETS.register_module()
class Digits(Dataset[dict[str, Tensor]]):
    """One half of scikit-learn's 1,797 images of 8 x 8 pixels, chosen at random.

    Args:
        part: "training" or "validation".
    """

    def __init__(self, part: str) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        chosen = order.chunk(2)[("training", "validation").index(part)]
        self.images = torch.tensor(digits.images, dtype=torch.float32)[chosen].unsqueeze(1) / 16
        self.labels = torch.tensor(digits.target)[chosen]
        self.metainfo = {"classes": [str(name) for name in digits.target_names]}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


@MODELS.register_module()
class DigitsNetwork(BaseModel):  # type: ignore[misc]
    """Two convolutions with group norm, a linear classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 4 * 4, 10),
        )

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """The loss for ``mode="loss"``; (predicted digits, labels) for "predict"."""
        scores = self.layers(images)
        if mode == "loss":
            return {"loss": cross_entropy(scores, labels)}
        if mode == "predict":
            return scores.argmax(dim=1), labels
        return scores


@METRICS.register_module()
class DigitsAccuracy(BaseMetric):  # type: ignore[misc]
    """``digits/accuracy``: percent of the images whose digit is predicted right."""

    default_prefix = "digits"

    def process(self, data_batch: Any, data_samples: Sequence[Tensor]) -> None:
        predicted, labels = data_samples
        self.results += (predicted == labels).tolist()

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return {"accuracy": 100 * sum(results) / len(results)}
