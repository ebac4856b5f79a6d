"""Loops as diffusers' and timm's examples have them, on Accelerate's face: the numbers of Accelerate itself.

Those are of Accelerate 1.15 on two CPU ranks under torchrun.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from tests.dist.rank_pool import RunRanks

LOSSES = [1.4142902, 1.3059305, 1.1732756, 1.0077839, 0.9899910, 1.0102290]
AVERAGED, RESTORED = 9.5655766, 13.1955700
CLASS_LOSSES = [1.6826944, 1.6591845, 1.6129034, 1.5646355, 1.6019554, 1.6455206]
CLASS_LOSSES += [1.4566131, 1.5797107, 1.6872381, 1.4594694, 1.5144620, 1.6701754]


def _accelerator(stage: int, **options: Any) -> Any:
    from distui.compat.accelerate import Accelerator, PartialState
    from distui.compat.accelerate.state import AcceleratorState, GradientState
    from distui.compat.accelerate.utils import DeepSpeedPlugin

    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage), **options)


class EMAModel:
    """Averages parameters, and puts them into the model and back, as diffusers' does."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.shadow_params = [param.clone().detach() for param in parameters]
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.Tensor]) -> None:
        for shadow, param in zip(self.shadow_params, parameters, strict=True):
            shadow.sub_(0.1 * (shadow - param))

    def store(self, parameters: Iterable[torch.Tensor]) -> None:
        self.kept = [param.detach().cpu().clone() for param in parameters]

    def copy_to(self, parameters: Iterable[torch.Tensor]) -> None:
        for shadow, param in zip(self.shadow_params, parameters, strict=True):
            param.data.copy_(shadow.to(param.device).data)

    def restore(self, parameters: Iterable[torch.Tensor]) -> None:
        for kept, param in zip(self.kept, parameters, strict=True):
            param.data.copy_(kept.data)


class Block(nn.Module):
    """A part of the network that knows the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.time = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.silu(self.norm(x))) + self.time(time)[:, :, None, None]


class UNet(nn.Module):
    """Says what noise there is in latents."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(100, 8)
        self.first = nn.Conv2d(4, 8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        x, time = self.first(latents), self.time(timesteps)
        for block in self.blocks:
            x = block(x, time)
        return self.last(x)


def _images(stage: int, folder: Path, resumes: bool) -> None:
    from distui.compat.accelerate.utils import set_seed

    accelerator = _accelerator(stage, gradient_accumulation_steps=2)
    set_seed(0)
    encoder = nn.Conv2d(3, 4, 2, stride=2).requires_grad_(False)
    unet: Any = UNet()
    ema = EMAModel(unet.parameters())

    def save_model_hook(models: Any, weights: Any, output_dir: str) -> None:
        if accelerator.is_main_process:
            torch.save(ema.shadow_params, f"{output_dir}/ema.bin")

    def load_model_hook(models: Any, input_dir: str) -> None:
        ema.shadow_params = torch.load(f"{input_dir}/ema.bin")

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    optimizer: Any = torch.optim.AdamW(unet.parameters(), lr=1e-2, weight_decay=1e-2)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    loader: Any = DataLoader(
        TensorDataset(torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))), batch_size=2
    )
    unet, optimizer, loader, scheduler = accelerator.prepare(unet, optimizer, loader, scheduler)
    place, first = str(folder / "checkpoint-3"), 6 if resumes else 0
    if resumes:
        accelerator.load_state(place)
    signal = torch.linspace(1e-4, 0.02, 100).cumsum(0).neg().exp()
    losses, train_loss = [], 0.0
    for index, (pixels,) in enumerate(accelerator.skip_first_batches(loader, first), first):
        with accelerator.accumulate(unet):
            latents = encoder(pixels) * 0.5
            draws = torch.Generator().manual_seed(100 * index + accelerator.process_index)
            noise = torch.randn(latents.shape, generator=draws)
            timesteps = torch.randint(0, 100, (len(latents),), generator=draws)
            kept = signal[timesteps][:, None, None, None]
            prediction = unet(kept.sqrt() * latents + (1 - kept).sqrt() * noise, timesteps)
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
            train_loss += accelerator.gather(loss.repeat(2)).mean().item() / 2
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
            losses.append(train_loss)
            train_loss = 0.0
            if len(losses) == 3 and not resumes:
                accelerator.save_state(place)
    assert losses == pytest.approx(LOSSES[first // 2 :], rel=1e-4)
    plain = accelerator.unwrap_model(unet)
    ema.store(plain.parameters())
    for expected in (AVERAGED, RESTORED):
        if expected == AVERAGED:
            ema.copy_to(plain.parameters())
        else:
            ema.restore(plain.parameters())
        with torch.no_grad():
            told = plain(torch.ones(1, 4, 4, 4), torch.tensor([3])).sum().item()
        assert told == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("stage", "after"), [(0, 3), (3, 0)])
def test_a_loop_as_diffusers_has(run_ranks: RunRanks, tmp_path: Path, stage: int, after: int) -> None:
    run_ranks(_images, 2, stage, tmp_path, False)
    run_ranks(_images, 2, after, tmp_path, True)  # also at another stage


class Residual(nn.Module):
    """A block with running statistics and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.gelu(self.norm(self.conv(x))) * self.scale[:, None, None]


def _update(average: nn.Module, model: nn.Module) -> None:
    """Average parameters and buffers, as timm does with a copy of the model."""
    ours, theirs = ([*each.parameters(), *each.buffers()] for each in (average, model))
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            one.copy_(0.9 * one + 0.1 * other if one.is_floating_point() else other)


def _classes(stage: int) -> None:
    accelerator = _accelerator(stage)
    torch.manual_seed(0)
    body: list[nn.Module] = [nn.Conv2d(3, 8, 2, stride=2), nn.Sequential(*(Residual() for _ in range(3)))]
    model: Any = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    params = list(model.parameters())
    decayed, plain = ([p for p in params if (p.ndim > 1) is decays] for decays in (True, False))
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer: Any = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    draws = torch.Generator().manual_seed(1)
    images, labels = torch.randn(52, 3, 8, 8, generator=draws), torch.randint(0, 5, (52,), generator=draws)
    data = TensorDataset(images, labels)
    loader: Any = DataLoader(data, batch_size=4, drop_last=True)
    held: Any = DataLoader(data, batch_size=6)
    average = copy.deepcopy(model).eval()
    model, optimizer, loader, held = accelerator.prepare(model, optimizer, loader, held)
    losses = []
    for _ in range(2):
        model.train()
        for index, (pixels, target) in enumerate(loader):
            share = 0.3 + 0.05 * index
            hot = F.one_hot(target, 5).float() * 0.9 + 0.02
            wanted = share * hot + (1 - share) * hot.flip(0)
            logits = model(share * pixels + (1 - share) * pixels.flip(0))
            loss = torch.sum(-wanted * F.log_softmax(logits, dim=-1), dim=-1).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_value_(model.parameters(), 0.5)
            optimizer.step()
            _update(average, accelerator.unwrap_model(model))
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    assert losses == pytest.approx(CLASS_LOSSES, rel=1e-4)
    model.eval()
    right = seen = 0
    with torch.no_grad():
        for pixels, target in held:
            guesses, targets = accelerator.gather_for_metrics((model(pixels).argmax(-1), target))
            right, seen = right + int((guesses == targets).sum()), seen + len(targets)
        told = average(torch.ones(2, 3, 8, 8)).sum().item()
    assert (right, seen) == (19, 52)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:  # running statistics are each rank's own
        total = sum(value.double().abs().sum().item() for value in state.values() if value.is_floating_point())
        assert (told, total) == pytest.approx((0.4418567, 137.3876682), rel=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loop_as_timm_has(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(_classes, 2, stage)
