"""Averages made of snapshots, against the weighted sum of everything a run went through."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ema_fused import PowerFunctionEMA
from ema_fused.posthoc import power_profiles
from ema_fused.posthoc.power_profiles import Profile, combine, density, gamma_of
from ema_fused.posthoc.reconstruction import Reconstruction, reconstruct
from tests import processes
from tests.networks import Tied, Weight, conv_net, differences, generator

save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file
load_model = pytest.importorskip("safetensors.torch").load_model


def discrete_weights(sigma_rel: float, times: list[int]) -> Tensor:
    """The weight of every value in the average after the last: the paper's beta, multiplied out."""
    v = sigma_rel**-2
    gamma = float(np.roots([1, 7, 16 - v, 12 - v]).real.max())
    weights = np.zeros(len(times))
    before = 0
    for k, time in enumerate(times):
        beta = (1 - (time - before) / time) ** (gamma + 1)
        weights[:k] *= beta
        weights[k] = 1 - beta
        before = time
    return torch.from_numpy(weights)


class Walk(nn.Module):
    """Large weights that move a little: what an average must not lose."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(100).to(dtype))
        self.register_buffer("count", torch.tensor(0))


def walk(
    run_dir: Path, steps: int, every: int, dtype: torch.dtype = torch.float32, samples: int = 1
) -> tuple[Tensor, PowerFunctionEMA]:
    """A run with snapshots; all values of its weight."""
    model = Walk(dtype)
    ema = PowerFunctionEMA(model)
    random = generator(1)
    values = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_((torch.randn(100, generator=random) * 0.02).to(dtype))
            model.count += 1
        ema.update_parameters(model, samples=samples)
        values.append(model.weight.detach().double().clone())
        if step % every == 0:
            ema.save_snapshot(run_dir)
    return torch.stack(values), ema


def error_of(found: Tensor, values: Tensor, sigma_rel: float) -> float:
    """The largest error, in units of how far the weights have wandered in the run."""
    times = list(range(1, len(values) + 1))
    expected = discrete_weights(sigma_rel, times) @ values
    wandered = (values[-1] - values[0]).std()
    return ((found.double() - expected).abs().max() / wandered).item()


# The sum of profiles.


def test_inner_products_are_the_integrals() -> None:
    profiles = [Profile(gamma_of(s), t) for s in (0.03, 0.1, 0.25) for t in (2.5, 10.0)]
    for one in profiles:
        for other in profiles:
            # Beyond the earlier time one of the two is 0.
            times = torch.linspace(0, min(one.time, other.time), 100_001, dtype=torch.float64)
            integral = torch.trapezoid(density(one, times) * density(other, times), times)
            found = power_profiles._inner(*torch.tensor([*one, *other], dtype=torch.float64))
            assert found.item() == pytest.approx(integral.item(), rel=1e-6, abs=1e-12)
        times = torch.linspace(0, one.time, 100_001, dtype=torch.float64)
        assert torch.trapezoid(density(one, times), times).item() == pytest.approx(1)
        assert density(one, times + one.time + 1e-9).max() == 0


def test_the_sum_is_the_nearest_with_weights_that_sum_to_1() -> None:
    times = torch.linspace(0, 8, 20_001, dtype=torch.float64)
    kept = [Profile(gamma_of(s), float(t)) for s in (0.05, 0.1) for t in (2, 4, 6, 8)]
    wanted = Profile(gamma_of(0.07), 8.0)
    weights, error = combine(kept, wanted)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    columns = torch.stack([density(profile, times) for profile in kept])
    target = density(wanted, times)

    def distance(candidate: list[float]) -> float:
        rest = torch.tensor(candidate, dtype=torch.float64) @ columns - target
        squared = torch.trapezoid(rest**2, times) / torch.trapezoid(target**2, times)
        return squared.sqrt().item()

    assert distance(weights) == pytest.approx(error, rel=1e-2)
    random = np.random.default_rng(0)
    for _ in range(50):
        change = random.normal(size=8) * 1e-3
        moved = (np.array(weights) + change - change.mean()).tolist()
        assert distance(moved) > distance(weights)


def test_a_kept_profile_is_itself() -> None:
    kept = [Profile(gamma_of(s), float(t)) for t in range(1, 33) for s in (0.05, 0.1)]
    weights, error = combine(kept, kept[-1])
    assert weights[-1] == pytest.approx(1, abs=1e-9)
    assert max(map(abs, weights[:-1])) < 1e-9
    assert error < 1e-7


def test_equal_and_nearly_equal_profiles_do_no_harm() -> None:
    kept = [Profile(gamma_of(s), t) for t in (5.0, 5.0, 5.0 + 1e-9, 10.0) for s in (0.05, 0.1)]
    weights, error = combine(kept, Profile(gamma_of(0.08), 10.0))
    assert max(map(abs, weights)) < 2
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    assert error < 0.1
    # Far outside of the widths kept, from snapshots close together: a sum of |weights| of 100,000
    # would come a little nearer, and lose five digits of what was saved.
    kept = [Profile(gamma_of(0.05 + 0.01 * j), 1000.0 - k) for k in range(5) for j in range(8)]
    weights, error = combine(kept, Profile(gamma_of(0.02), 1000.0))
    assert sum(map(abs, weights)) < 3000
    assert error < 0.06


# Against the true average.

# The largest errors allowed, in units of how far the weights wander in the run.
ALLOWED = {
    # sigma_rel: (with 8 steps of snapshots, with 32, with 128)
    0.03: (4e-2, 1e-3, 2e-5),
    0.07: (4e-3, 6e-5, 3e-6),
    0.08: (4e-3, 6e-5, 4e-6),
    0.15: (6e-3, 1e-4, 5e-6),
    0.20: (3e-2, 2e-3, 4e-5),
}


def test_reconstructed_averages_are_near_the_true_ones_the_more_snapshots_the_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of files, none to keep
    errors: dict[float, list[float]] = {sigma_rel: [] for sigma_rel in ALLOWED}
    for snapshots in (8, 32, 128):
        run_dir = tmp_path / str(snapshots)
        values, _ = walk(run_dir, 1024, 1024 // snapshots)
        assert len(list(run_dir.iterdir())) == 2 * snapshots
        for sigma_rel, found in errors.items():
            found.append(error_of(reconstruct(run_dir, sigma_rel)["weight"], values, sigma_rel))
    for sigma_rel, found in errors.items():
        assert found == sorted(found, reverse=True)
        for error, allowed in zip(found, ALLOWED[sigma_rel], strict=True):
            assert error < allowed, (sigma_rel, found)


def test_a_kept_width_comes_out_as_it_was_saved(tmp_path: Path) -> None:
    _, ema = walk(tmp_path, 64, 4)
    for width in ema.sigma_rel:
        found = reconstruct(tmp_path, width)
        torch.testing.assert_close(found["weight"], ema.average(width)["weight"], rtol=0, atol=1e-6)
        assert found["count"].item() == 64


def test_an_earlier_step_sees_nothing_that_came_later(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    values, _ = walk(short, 256, 8)
    walk(long, 512, 8)
    early = reconstruct(long, 0.08, step=256)
    assert torch.equal(early["weight"], reconstruct(short, 0.08)["weight"])
    assert early["count"].item() == 256
    assert error_of(early["weight"], values, 0.08) < 1e-4


def test_samples_and_16_bit_models(tmp_path: Path) -> None:
    values, _ = walk(tmp_path, 256, 8, torch.bfloat16, samples=32)
    found = reconstruct(tmp_path, 0.08)["weight"]
    assert found.dtype == torch.float32
    assert error_of(found, values, 0.08) < 1e-4
    made = Reconstruction(tmp_path, 0.08)
    assert (made.steps, made.wanted.time) == (256, 256 * 32)


def test_weights_that_never_change_come_out_as_they_are(tmp_path: Path) -> None:
    model = Weight(12_345.678)
    ema = PowerFunctionEMA(model)
    for _ in range(3):
        ema.update_parameters(model)
        ema.save_snapshot(tmp_path)
    for sigma_rel in (0.01, 0.07, 0.28):
        assert reconstruct(tmp_path, sigma_rel)["weight"].item() == model.weight.item()


# Kinds of tensors, and the file that is written.


class Odd(nn.Module):
    """Scalars, empty and complex tensors, integers, bool, strides, a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.index = nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)
        self.tied = Tied()
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("short", torch.tensor([1.5], dtype=torch.bfloat16))


def trained(
    model: nn.Module, run_dir: Path, steps: int = 12, every: int = 3
) -> tuple[PowerFunctionEMA, list[dict[str, Tensor]]]:
    ema = PowerFunctionEMA(model)
    random = generator()
    seen = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter.add_(noise.to(parameter.dtype), alpha=0.1)
        ema.update_parameters(model)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        if step % every == 0:
            ema.save_snapshot(run_dir)
    return ema, seen


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_every_kind_of_tensor_is_reconstructed(tmp_path: Path) -> None:
    model = Odd()
    _, seen = trained(model, tmp_path, 24, 1)
    found = reconstruct(tmp_path, 0.07)
    assert found.keys() == model.state_dict().keys()
    weights = discrete_weights(0.07, list(range(1, 25)))
    for name, tensor in found.items():
        latest = model.state_dict()[name]
        assert tensor.dtype == latest.dtype, name
        if name in ("index", "mask", "short"):
            assert torch.equal(tensor, latest), name
            continue
        expected = sum(
            w.item() * one[name].to(torch.complex128) for w, one in zip(weights, seen, strict=True)
        )
        error = (tensor.to(torch.complex128) - expected).abs().max() if tensor.numel() else 0
        assert error < 0.02, name  # few steps: a profile that is cut into 24 pieces
    assert found["tied.decoder.weight"] is found["tied.encoder.weight"]
    model.load_state_dict(found)


@pytest.mark.filterwarnings("ignore::ema_fused.SlowPathWarning")
def test_the_written_file_holds_the_same_and_loads_into_the_model(tmp_path: Path) -> None:
    model = Odd()
    trained(model, tmp_path / "run")
    written = []
    Reconstruction(tmp_path / "run", 0.07).save(tmp_path / "out.safetensors", written.append)
    expected = reconstruct(tmp_path / "run", 0.07)
    found = load_file(tmp_path / "out.safetensors")
    assert differences(found, {name: expected[name] for name in found}) == []
    assert expected.keys() - found.keys() == {"tied.decoder.weight"}
    assert sum(written) == Reconstruction(tmp_path / "run", 0.07).bytes
    target = Odd()
    assert load_model(target, tmp_path / "out.safetensors") == (set(), [])
    assert differences(dict(target.state_dict()), expected) == []
    assert target.tied.decoder.weight is target.tied.encoder.weight


MEASURED = """
import sys
from pathlib import Path
import torch
from torch import nn
from ema_fused import PowerFunctionEMA
from ema_fused.posthoc.reconstruction import Reconstruction

def own_memory():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):  # without the pages of mapped files
            return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
model = nn.ParameterList([nn.Parameter(torch.randn(2**19)) for _ in range(16)])
ema = PowerFunctionEMA(model)
for _ in range(2):
    ema.update_parameters(model)
    ema.save_snapshot(folder)
del model, ema
made = Reconstruction(folder, 0.07)
before, used = own_memory(), []
made.save(folder / "out.safetensors", lambda done: used.append(own_memory() - before))
print(made.bytes, max(used))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
@pytest.mark.slow
def test_memory_stays_at_a_few_tensors(tmp_path: Path) -> None:
    # Memory that is freed goes back at once, instead of being kept for later.
    done = processes.run("-c", MEASURED, tmp_path, MALLOC_MMAP_THRESHOLD_="100000")
    whole, used = map(int, done.stdout.split())
    one = 2 * 2**20
    assert whole == 16 * one
    assert used < 6 * one


def test_what_cannot_be_saved_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"some")
        raise OSError("no space left on device")

    ema, _ = trained(Weight(), tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        ema.save_snapshot(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


# Refusals.


@pytest.mark.parametrize("sigma_rel", [0.0, -0.05, 0.2887, 1.0])
def test_a_width_out_of_range_is_refused(tmp_path: Path, sigma_rel: float) -> None:
    trained(Weight(), tmp_path)
    with pytest.raises(ValueError, match=rf"sigma_rel is {sigma_rel}; a number in \(0, 0\.2887\)"):
        reconstruct(tmp_path, sigma_rel)


def test_no_snapshots(tmp_path: Path) -> None:
    for run_dir in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no snapshot-\*\.safetensors in .*save_snap"):
            reconstruct(run_dir, 0.07)


@pytest.mark.parametrize("step", [0, 4, 13])
def test_a_step_without_snapshots(tmp_path: Path, step: int) -> None:
    trained(Weight(), tmp_path)
    with pytest.raises(ValueError, match=f"no snapshot of step {step} .* there are 3, 6, 9, 12"):
        reconstruct(tmp_path, 0.07, step)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: conv_net(dtype=torch.float64), r"different models: '.*' is F32 .* and F64"),
        (Weight, r"different models: '[\w.]+' is .* and not there; give each run"),
        (conv_net, "different runs, [0-9a-f]{32} and [0-9a-f]{32}"),
    ],
    ids=["dtype", "names", "run"],
)
def test_snapshots_of_different_models_or_runs(
    tmp_path: Path, other: Callable[[], nn.Module], match: str
) -> None:
    trained(conv_net(), tmp_path)
    trained(other(), tmp_path, 14, 14)
    with pytest.raises(ValueError, match=match):
        reconstruct(tmp_path, 0.07)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_damaged_file_is_named(tmp_path: Path, share: float) -> None:
    trained(conv_net(), tmp_path)
    path = sorted(tmp_path.iterdir())[3]
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=f"{path.name} is no whole safetensors file"):
        reconstruct(tmp_path, 0.07)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "snapshot-1.safetensors")
    with pytest.raises(ValueError, match=r"snapshot-1\.safetensors doesn't say"):
        reconstruct(tmp_path, 0.07)


def test_without_safetensors_it_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema, _ = trained(Weight(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for action in (lambda: reconstruct(tmp_path, 0.07), lambda: ema.save_snapshot(tmp_path)):
        with pytest.raises(ImportError, match=r"pip install 'ema_fused\[export\]'"):
            action()
