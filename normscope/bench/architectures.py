"""Real architectures before and after `accelerate`, against the same with normalizers and activations left out.

A step is forward, backward and SGD at learning rate 0: the cost of a step, and every repetition does the same work.
Leaving out all normalizers and activations gains more than any kernel can; the share of that gain is reported.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.profiler import ProfilerActivity, profile

import normscope as ns
from normscope.bench.timing import Call, clock_of, interleave
from normscope.errors import DependencyError
from normscope.records import ModelMemory, ModelSpeed, Timing

__all__ = ["ARCHITECTURES", "LAYOUTS", "Architecture", "load_timm", "measure"]

BATCH, SIDE = 8, 128
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.Mish)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Architecture:
    """A model to be built by timm, with random weights."""

    name: str
    build: Callable[[Any], nn.Module]
    images: bool = True

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those to measure; a transformer has no maps that could lie otherwise."""
        return tuple(LAYOUTS) if self.images else ("contiguous",)

    def label(self, layout: str) -> str:
        """What --select matches."""
        return f"{self.name} cl" if layout == "channels_last" else self.name


def _timm(name: str, model: str, *, images: bool = True, **options: int) -> Architecture:
    return Architecture(name, lambda timm: timm.create_model(model, **options), images)


class _UNet(nn.Module):
    """A U-Net on timm's ResNet-18: upsample, join, convolve twice with BatchNorm and ReLU, four times."""

    def __init__(self, timm: Any) -> None:
        super().__init__()
        self.encoder = timm.create_model("resnet18", features_only=True)
        widths = self.encoder.feature_info.channels()
        pairs = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.decoder = nn.ModuleList(nn.Sequential(*_twice(deep + skip, skip)) for deep, skip in pairs)
        self.head = nn.Conv2d(widths[0], 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = self.encoder(x)
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1))
        y: Tensor = self.head(x)
        return y


def _twice(inputs: int, outputs: int) -> Iterator[nn.Module]:
    for channels in (inputs, outputs):
        yield nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        yield nn.BatchNorm2d(outputs)
        yield nn.ReLU(inplace=True)


ARCHITECTURES = (
    _timm("MobileNetV2", "mobilenetv2_100"),
    _timm("EfficientNet-B0", "efficientnet_b0"),
    _timm("ResNet-18", "resnet18"),
    _timm("ResNet-50", "resnet50"),
    _timm("DenseNet-121", "densenet121"),
    _timm("ConvNeXt-Atto", "convnext_atto"),
    _timm("ViT-Ti/16", "vit_tiny_patch16_224", images=False, img_size=SIDE),
    Architecture("U-Net", _UNet),
)


def load_timm() -> Any:
    """The package that builds the architectures.

    Raises:
        DependencyError: It is not installed, or does not load.
    """
    try:
        import timm  # type: ignore[import-not-found,unused-ignore]
    except Exception as error:  # a torchvision for another torch raises RuntimeError
        raise DependencyError(
            f"the architectures need timm, which cannot be imported: {error}",
            cure="pip install timm, with the torchvision that fits your torch",
        ) from error
    return timm


def measure(architecture: Architecture, layout: str, timm: Any, seconds: float, device: torch.device) -> ModelSpeed:
    """Time a step and an evaluation of the model as it is, accelerated, and bare.

    Raises:
        ProofError: The accelerated model computes something else; `accelerate` compares outputs and gradients.
    """
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, SIDE, SIDE, device=device).contiguous(memory_format=LAYOUTS[layout])
    plain = architecture.build(timm).to(device, memory_format=LAYOUTS[layout]).train()  # type: ignore[call-overload]
    report = ns.accelerate(plain, x, copy=True)
    models = {"torch": plain, "accelerated": report.model, "bare": _bare(copy.deepcopy(plain))}
    g = torch.randn_like(plain(x))
    memory = tuple(ModelMemory(name, _saved(model, x), _peak(model, x, g)) for name, model in models.items())
    alternatives = dict(_alternatives(models, x, g))
    rounds = interleave(alternatives, seconds, clock_of(device))
    return ModelSpeed(
        name=architecture.label(layout),
        layout=layout,
        shape=tuple(x.shape),
        parameters=sum(p.numel() for p in plain.parameters()),
        changed=len(report.changed),
        timings=tuple(Timing(name, rounds.time(name)) for name in alternatives),
        step=rounds.ratio("torch", "accelerated"),
        step_share=rounds.gain("torch", "accelerated", "bare"),
        evaluation=rounds.ratio("torch, eval", "accelerated, eval"),
        evaluation_share=rounds.gain("torch, eval", "accelerated, eval", "bare, eval"),
        memory=memory,
        rounds=rounds.count,
        dropped=rounds.dropped,
        calm=rounds.calm,
    )


def _bare(model: nn.Module) -> nn.Module:
    """The model with every normalizer and every activation replaced by the identity."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NORMS + ACTIVATIONS):
                setattr(parent, name, nn.Identity())
    return model


def _alternatives(models: Mapping[str, nn.Module], x: Tensor, g: Tensor) -> Iterator[tuple[str, Call]]:
    for name, model in models.items():
        yield name, partial(_step, model, torch.optim.SGD(model.parameters(), lr=0.0), x, g)
    for name, model in models.items():
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        yield f"{name}, eval", partial(_evaluate, copy.deepcopy(model, shared).eval(), x)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, g: Tensor) -> None:
    model(x).backward(g)
    optimizer.step()
    optimizer.zero_grad()


def _evaluate(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward, beyond parameters, buffers and input."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, Tensor] = {}  # alive, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    del y
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def _peak(model: nn.Module, x: Tensor, g: Tensor) -> int:
    """The most bytes that were allocated at once, the gradients of the parameters included."""
    if x.is_cuda:
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        model(x).backward(g)
        peak = torch.cuda.max_memory_allocated(x.device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on stderr
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            model(x).backward(g)
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        peak = max(itertools.accumulate(e.nbytes() for e in events))
    model.zero_grad()
    return peak
