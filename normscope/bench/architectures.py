"""Real architectures before and after `accelerate`, against the same with normalizers and activations left out.

A step is forward, backward and SGD at learning rate 0: the cost of a step, and every repetition does the same work.
Leaving out all normalizers and activations gains more than any kernel can; the share of that gain is reported.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.profiler import ProfilerActivity, profile

import normscope as ns
from normscope.bench import networks
from normscope.bench.timing import Call, clock_of, interleave
from normscope.records import ModelMemory, ModelSpeed, Timing

__all__ = ["ARCHITECTURES", "LAYOUTS", "Architecture", "measure"]

BATCH, GPU_BATCH, SIDE = 8, 256, 128
PROVEN = 2  # images of the proof of `accelerate`, which runs in float64
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.Mish)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Architecture:
    """A model with random weights."""

    name: str
    build: Callable[[], nn.Module]
    images: bool = True

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those to measure; a transformer has no maps that could lie otherwise."""
        return tuple(LAYOUTS) if self.images else ("contiguous",)

    def label(self, layout: str) -> str:
        """What --select matches."""
        return f"{self.name} cl" if layout == "channels_last" else self.name


ARCHITECTURES = (
    Architecture("MobileNetV2", networks.mobilenet_v2),
    Architecture("EfficientNet-B0", networks.efficientnet_b0),
    Architecture("ResNet-18", networks.resnet18),
    Architecture("ResNet-50", networks.resnet50),
    Architecture("DenseNet-121", networks.densenet121),
    Architecture("ConvNeXt-Atto", partial(networks.convnext, (2, 2, 6, 2), (40, 80, 160, 320))),
    Architecture("ViT-Ti/16", partial(networks.vision_transformer, SIDE, 192, 12, 3), images=False),
    Architecture("U-Net", networks.unet),
)


def measure(architecture: Architecture, layout: str, seconds: float, device: torch.device) -> ModelSpeed:
    """Time a step and an evaluation of the model as it is, accelerated, and bare.

    Args:
        architecture: What to measure.
        layout: Of images and weights.
        seconds: For everything; the loop gets at least a fifth of it.
        device: Where.

    Raises:
        ProofError: The accelerated model computes something else; `accelerate` compares outputs and gradients.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    batch = GPU_BATCH if device.type == "cuda" else BATCH
    x = torch.randn(batch, 3, SIDE, SIDE, device=device).contiguous(memory_format=LAYOUTS[layout])
    plain = architecture.build().to(device, memory_format=LAYOUTS[layout]).train()  # type: ignore[call-overload]
    report = ns.accelerate(plain, x[:PROVEN], copy=True)
    models = {"torch": plain, "accelerated": report.model, "bare": _bare(copy.deepcopy(plain))}
    g = torch.randn_like(_forward(plain, x))
    memory = tuple(ModelMemory(name, _saved(model, x), _peak(model, x, g)) for name, model in models.items())
    alternatives = dict(_alternatives(models, x, g))
    left = max(seconds / 5, seconds - (time.perf_counter() - start))
    rounds = interleave(alternatives, left, clock_of(device))
    return ModelSpeed(
        name=architecture.label(layout),
        layout=layout,
        shape=tuple(x.shape),
        parameters=sum(p.numel() for p in plain.parameters()),
        changed=len(report.changed),
        fused=_fused(report.notes),
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


def _fused(notes: Sequence[str]) -> tuple[str, ...]:
    """The activations that normalizers have taken up, from notes as "body.4 → relu6" and "norm2 + residual → relu"."""
    chains = (note.rpartition(" → ") for note in notes)
    return tuple(sorted({act for norm, arrow, act in chains if arrow and not norm.endswith("sum")}))


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
    _forward(model, x).backward(g)  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _evaluate(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        _forward(model, x)


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    """On a GPU in bfloat16, as people train there."""
    with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else contextlib.nullcontext():
        y: Tensor = model(x)
        return y


def _saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward, beyond parameters, buffers and input."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, Tensor] = {}  # alive, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = _forward(model, x)
    del y
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def _peak(model: nn.Module, x: Tensor, g: Tensor) -> int:
    """The most bytes that were allocated at once, the gradients of the parameters included."""
    if x.is_cuda:
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        _forward(model, x).backward(g)  # type: ignore[no-untyped-call]
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
