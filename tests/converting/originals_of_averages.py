"""The averages of other packages: trained, saved as they save themselves, loaded, trained on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DECAY = 0.9
Tensors = dict[str, Tensor]


def model(seed: int = 0) -> nn.Sequential:
    """Parameters, and buffers of floats and of integers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))


def train(net: nn.Module, step: int) -> None:
    """What a training step does to the tensors, the same for every ``step`` of that number."""
    random = torch.Generator().manual_seed(1000 + step)
    for name, value in net.state_dict().items():
        if name.startswith("ema_"):  # mmcv's averages
            continue
        if value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=random).mul_(0.1).to(value.dtype))
        else:
            value.add_(1)


def copied(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def parameters_of(net: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensors[name].detach().clone() for name, _ in net.named_parameters()}


class Original:
    """An average of another package beside the model that it follows.

    Args:
        net: the model; None: :func:`model`.

    Attributes:
        arithmetic: ours with the same bits.
        momentum: the weight of the next value at our ``steps``.
        keeps_steps: the format has the number of updates.
        keeps_raw: it has the weights of the model.
        keeps_buffers: it has all of the ``state_dict``.
    """

    format = ""
    suffix = ".pt"
    arithmetic = "lerp"
    keeps_steps = True
    keeps_raw = False
    keeps_buffers = True
    is_exact = True
    loading: Mapping[str, Any] = {}

    def __init__(self, net: nn.Module | None = None) -> None:
        self.net = model() if net is None else net
        self.make()

    def momentum(self, steps: int) -> float:
        return 1 - DECAY

    def make(self) -> None:
        raise NotImplementedError

    def update(self, step: int) -> None:
        raise NotImplementedError

    def save(self, path: Path) -> None:
        torch.save(self.checkpoint(), path)

    def load(self, path: Path) -> None:
        self.load_checkpoint(torch.load(path, weights_only=True))

    def checkpoint(self) -> Any:
        raise NotImplementedError

    def load_checkpoint(self, checkpoint: Any) -> None:
        raise NotImplementedError

    def averages(self) -> Tensors:
        """By the names of the model; those of the parameters at least."""
        raise NotImplementedError

    def run(self, steps: range) -> Original:
        """Trains the model, and updates the average after each step."""
        for step in steps:
            train(self.net, step)
            self.update(step)
        return self


class Torch(Original):
    format = "torch"

    def make(self) -> None:
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def update(self, step: int) -> None:
        self.ema.update_parameters(self.net)

    def checkpoint(self) -> Any:
        return self.ema.state_dict()

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.ema.load_state_dict(checkpoint)

    def averages(self) -> Tensors:
        return copied(self.ema.module.state_dict())


class EmaPytorch(Original):
    format = "ema-pytorch"
    keeps_raw = True

    def make(self) -> None:
        from ema_pytorch import EMA

        settings = {"update_after_step": 0, "update_every": 1, "inv_gamma": 1e-9}
        self.ema = EMA(self.net, beta=DECAY, **settings)

    def update(self, step: int) -> None:
        self.ema.update()

    def checkpoint(self) -> Any:
        return {"step": 7, "ema": self.ema.state_dict()}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.ema.load_state_dict(checkpoint.get("ema", checkpoint))

    def averages(self) -> Tensors:
        return copied(self.ema.ema_model.state_dict())

    def momentum(self, steps: int) -> float:
        return 1 - float(torch.tensor(DECAY))


class TorchEma(Original):
    format = "torch-ema"
    arithmetic = "delta"
    keeps_buffers = False
    is_exact = False  # within 2 units in the last place: the original rounds once more

    def make(self) -> None:
        from torch_ema import ExponentialMovingAverage

        self.ema = ExponentialMovingAverage(self.net.parameters(), decay=DECAY)

    def momentum(self, steps: int) -> float:
        return max(1 - DECAY, 9 / (10 + steps))

    def update(self, step: int) -> None:
        self.ema.update()

    def checkpoint(self) -> Any:
        return self.ema.state_dict()

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.ema.load_state_dict(checkpoint)

    def averages(self) -> Tensors:
        named = (name for name, _ in self.net.named_parameters())
        return copied(dict(zip(named, self.ema.shadow_params, strict=True)))


class DiffusersList(Original):
    format = "diffusers-list"
    arithmetic = "delta"
    keeps_buffers = False
    settings: Mapping[str, Any] = {"foreach": True}

    def make(self) -> None:
        from diffusers.training_utils import EMAModel

        self.ema = EMAModel(self.net.parameters(), decay=DECAY, **self.settings)

    def momentum(self, steps: int) -> float:
        return 1 - min(DECAY, (1 + steps) / (10 + steps))

    def update(self, step: int) -> None:
        self.ema.step(self.net.parameters())

    def checkpoint(self) -> Any:
        return self.ema.state_dict()

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.ema.load_state_dict(checkpoint)

    def averages(self) -> Tensors:
        named = (name for name, _ in self.net.named_parameters())
        return copied(dict(zip(named, self.ema.shadow_params, strict=True)))


def _diffusers_model() -> Any:
    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config

    class Small(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config
        def __init__(self, width: int = 7) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(5, width)
            self.norm = nn.BatchNorm1d(width)

    return Small


class Diffusers(DiffusersList):
    """The folder that ``save_pretrained`` writes."""

    format = "diffusers"
    suffix = ""
    keeps_buffers = True

    def __init__(self, net: nn.Module | None = None) -> None:
        self.cls = _diffusers_model()
        self.settings = {"foreach": True, "model_cls": self.cls, "use_ema_warmup": True}
        super().__init__(self.cls() if net is None else net)

    def make(self) -> None:
        config: Any = self.net.config
        self.settings = {**self.settings, "model_config": config}
        super().make()

    def momentum(self, steps: int) -> float:
        return 1 - min(DECAY, 1 - (1 + steps) ** (-2 / 3))

    def save(self, path: Path) -> None:
        self.ema.save_pretrained(path)

    def load(self, path: Path) -> None:
        self.ema = type(self.ema).from_pretrained(path, self.cls, foreach=True)


class Lightning(Original):
    format = "lightning"
    arithmetic = "products"
    keeps_raw = True

    def make(self) -> None:
        from lightning.pytorch import LightningModule
        from lightning.pytorch.callbacks import EMAWeightAveraging

        # The original's steps of a trainer, without one.
        self.callback: Any = EMAWeightAveraging(decay=DECAY)
        self.trainer: Any = SimpleNamespace(global_step=0)
        self.module = LightningModule()
        self.module.net = self.net
        self.callback.setup(self.trainer, self.module, "fit")

    def update(self, step: int) -> None:
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, None, 0)

    def checkpoint(self) -> Any:
        checkpoint = {"state_dict": self.module.state_dict(), "epoch": 0, "optimizer_states": []}
        self.callback.on_save_checkpoint(self.trainer, self.module, checkpoint)
        return checkpoint

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.callback.on_load_checkpoint(self.trainer, self.module, checkpoint)

    def averages(self) -> Tensors:
        return copied(self.callback._average_model.module.net.state_dict())


class Mmengine(Original):
    format = "mmengine"
    keeps_raw = True

    def make(self) -> None:
        from mmengine.hooks import EMAHook

        self.hook: Any = EMAHook(momentum=1 - DECAY)
        self.runner: Any = SimpleNamespace(model=self.net, iter=0, epoch=0, _resume=True)
        self.hook.before_run(self.runner)

    def update(self, step: int) -> None:
        self.hook.after_train_iter(self.runner, 0)
        self.runner.iter += 1

    def checkpoint(self) -> Any:
        from mmengine.logging import MessageHub

        hub = MessageHub.get_instance("convert")
        hub.update_scalar("train/loss", 0.5)  # saved as an object of mmengine
        checkpoint = {
            "meta": {"epoch": 1, "iter": self.runner.iter},
            "state_dict": copied(self.net.state_dict()),
            "message_hub": hub.state_dict(),
        }
        self.hook.before_save_checkpoint(self.runner, checkpoint)
        return checkpoint

    def load_checkpoint(self, checkpoint: Any) -> None:
        # In the order of Runner.resume().
        from mmengine.logging import MessageHub

        self.hook.after_load_checkpoint(self.runner, checkpoint)
        MessageHub.get_instance("resumed").load_state_dict(checkpoint["message_hub"])
        self.runner.epoch, self.runner.iter = (checkpoint["meta"][key] for key in ("epoch", "iter"))
        self.net.load_state_dict(checkpoint["state_dict"])

    def averages(self) -> Tensors:
        return copied(self.hook.ema_model.module.state_dict())


class Mmcv(Original):
    """After an epoch, when its hook has exchanged averages and weights."""

    format = "mmcv"
    arithmetic = "axpby"
    keeps_raw = True
    loading: Mapping[str, Any] = {"averages_in": "parameters"}

    def make(self) -> None:
        from tests.frameworks import originals

        originals.import_mmcv()
        from mmcv.runner.hooks import EMAHook

        self.plain = self.net
        self.hook: Any = EMAHook(momentum=1 - DECAY, warm_up=3)
        self.runner: Any = SimpleNamespace(model=self.net, iter=0)
        self.hook.before_run(self.runner)

    def momentum(self, steps: int) -> float:
        return min(1 - DECAY, (1 + steps) / (3 + steps))

    def update(self, step: int) -> None:
        self.hook.after_train_iter(self.runner)
        self.runner.iter += 1

    def checkpoint(self) -> Any:
        self.hook.after_train_epoch(self.runner)
        state = copied(self.net.state_dict())
        self.hook.before_train_epoch(self.runner)
        return {"meta": {"epoch": 1, "iter": self.runner.iter}, "state_dict": state}

    def load_checkpoint(self, checkpoint: Any) -> None:
        missing, unexpected = self.net.load_state_dict(checkpoint["state_dict"], strict=False)
        assert not missing and not unexpected
        self.runner.iter = checkpoint["meta"]["iter"]
        self.hook.before_train_epoch(self.runner)

    def averages(self) -> Tensors:
        buffers = self.hook.param_ema_buffer
        return {name: self.hook.model_buffers[one].clone() for name, one in buffers.items()}


class Timm(Original):
    format = "timm"
    keeps_raw = True
    keeps_steps = False

    def make(self) -> None:
        from tests.frameworks.originals import original

        emas = original("timm==1.0.31", "timm.utils.model_ema")
        self.ema: Any = emas.ModelEmaV3(self.net, decay=DECAY)

    def update(self, step: int) -> None:
        self.ema.update(self.net, step=step)

    def checkpoint(self) -> Any:
        return {
            "epoch": 3,
            "arch": "small",
            "state_dict": self.net.state_dict(),
            "optimizer": {"state": {}, "param_groups": []},
            "version": 2,
            "args": argparse.Namespace(model="small", lr=0.1),  # as its CheckpointSaver does
            "state_dict_ema": self.ema.module.state_dict(),
        }

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.ema.module.load_state_dict(checkpoint["state_dict_ema"])
        self.net.load_state_dict(checkpoint["state_dict"])

    def averages(self) -> Tensors:
        return copied(self.ema.module.state_dict())


ALL: tuple[Callable[..., Original], ...] = (
    Torch,
    EmaPytorch,
    TorchEma,
    DiffusersList,
    Diffusers,
    Lightning,
    Mmengine,
    Mmcv,
    Timm,
)
