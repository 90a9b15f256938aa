"""What the edits of models do to the architectures that people use: one table, model × operation × outcome.

python scripts/zoo.py [--select PATTERN …] [--operation NAME …] [--again] [--pixels N] [--seconds N] [--write]

Models of timm and transformers with random weights, normalizers with statistics far from 0 and 1 and γ of both signs,
on small inputs; nothing is downloaded. Outcomes go into docs/zoo.json, and what is there is not computed again: the
sweep can be stopped and taken up, or run in pieces. --write puts the table into docs/zoo.md.

- *fold*: how many of the normalizers right behind a layer were folded. That they are is observed when the model runs:
  the very tensor that a convolution, Linear or Embedding has returned goes into them. Behind the plus those that were
  folded otherwise: before a layer, behind a concatenation or a reshaped output, behind another normalizer. Then the
  largest difference over the largest output, in float64.
- *convert*: BatchNorm → GroupNorm(1), calibrated on one half of natural pictures (noise, where a model takes none),
  measured on the other; so many pictures that in every layer the old moments agree between the halves within 4 %, up
  to a number of pixels. Statistics are those of the pictures, moved by 0.3 σ and by factors of 0.5 to 2. Layers; in
  how many the moments of the output are within 5 % of the old layer's: root mean square over the channels of the
  difference of means or of σ, the larger, over that of σ; the same in the middle layer, and in parentheses between
  the two halves with the old layers, which is what sampling does; loss, the mean square of what the model's output is
  off by over its variance, of the swap alone → calibrated.
- the others go there and back: *exact* means that output and model were as before, bit for bit.

Pictures are CIFAR-10's, in $NORMSCOPE_DATA.
"""

import argparse
import contextlib
import copy
import fnmatch
import functools
import importlib.machinery
import inspect
import json
import math
import re
import sys
import time
import types
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import normscope as ns
from normscope.data import load
from normscope.surgery import find, state_hash
from normscope.surgery.forward import feed

RESULTS, PAGE = (Path(__file__).parents[1] / "docs" / name for name in ("zoo.json", "zoo.md"))
SIZES = (64, 96, 128, 224, 256)
PICTURES = 128  # in each half: where the search begins
ENOUGH, SAME = 0.04, 0.05  # the halves' own distance that ends it, and what calls moments the same

TIMM = (
    "resnet18", "resnet26d", "resnext50_32x4d", "seresnet50", "ecaresnet26t", "skresnet18", "resnest14d",
    "res2net50_14w_8s", "resnetv2_50", "resnetrs50", "resnetblur50", "gernet_s", "regnetx_002", "regnety_002",
    "regnetz_b16", "vgg11_bn", "densenet121", "dla34", "dla60_res2net", "dpn48b", "legacy_xception", "xception41",
    "inception_v3", "inception_v4", "inception_next_atto", "efficientnet_b0", "efficientnet_es", "tf_efficientnet_b0",
    "tf_efficientnetv2_b0", "mixnet_s", "mnasnet_small", "semnasnet_075", "mobilenetv1_100", "mobilenetv2_050",
    "mobilenetv3_small_050", "mobilenetv4_conv_small_050", "mobilenet_edgetpu_v2_xs", "fbnetc_100", "fbnetv3_b",
    "spnasnet_100", "hardcorenas_a", "lcnet_050", "tinynet_e", "ghostnet_050", "ghostnetv2_100", "hrnet_w18_small",
    "selecsls42b", "rexnet_100", "cspresnet50", "cspdarknet53", "vovnet39a", "ese_vovnet19b_dw", "repvgg_a0",
    "mobileone_s0", "repghostnet_050", "repvit_m0_9", "fastvit_t8", "levit_128s", "levit_conv_128s",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0", "tiny_vit_5m_224",
    "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "convmixer_768_32", "xcit_nano_12_p16_224",
    "visformer_tiny", "pvt_v2_b0", "nest_tiny", "coatnet_nano_rw_224", "maxvit_pico_rw_256", "halonet26t",
    "lambda_resnet26t", "botnet26t_256", "gcresnext26ts", "shvit_s1", "starnet_s1", "swiftformer_xs", "fasternet_t0",
    "hgnetv2_b0", "nextvit_small", "rdnet_tiny", "tresnet_m", "convnext_atto", "nfnet_l0", "poolformer_s12",
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "pit_ti_224",
)  # fmt: skip

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = SMALL | {"vocab_size": 60}
SPEECH = SMALL | {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SERIES = {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "d_model": 16}
# Class, kind of input, settings of its configuration.
TRANSFORMERS = (
    ("ResNetModel", "image", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}),
    ("RegNetModel", "image", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "groups_width": 8}),
    ("MobileNetV1Model", "image", {"depth_multiplier": 0.25}),
    ("MobileNetV2Model", "image", {"depth_multiplier": 0.25}),
    ("EfficientNetModel", "image", {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}),
    ("LevitModel", "image", {"image_size": 64, "hidden_sizes": [32, 48, 64], "depths": [2, 2, 2], "key_dim": [8] * 3}),
    ("MobileViTModel", "image", {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 24, 32, 64]}),
    ("MobileViTV2Model", "image", {"width_multiplier": 0.5}),
    ("HGNetV2Backbone", "image", {}),
    ("RTDetrResNetBackbone", "image", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}),
    ("SegformerForSemanticSegmentation", "image", {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16}),
    ("SwiftFormerModel", "image", {"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]}),
    ("CvtModel", "image", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3]}),
    ("TextNetModel", "image", {}),
    ("PoolFormerModel", "image", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    ("SuperPointForKeypointDetection", "image", {}),
    ("Wav2Vec2ConformerModel", "wave", SPEECH),
    ("PatchTSTModel", "series", SERIES | {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}),
    ("PatchTSMixerModel", "series", SERIES | {"num_layers": 2, "norm_mlp": "BatchNorm"}),
    ("VitsModel", "text", {}),
    ("ConvNextModel", "image", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    ("BertModel", "text", TEXT),
    ("LlamaModel", "text", TEXT | {"num_key_value_heads": 2}),
    ("T5EncoderModel", "text", {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 48}),
)  # fmt: skip


# --- models -------------------------------------------------------------------------------------------------------


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


@contextlib.contextmanager
def without_torchvision():
    """timm asks torchvision for transforms of images when it is imported; of that nothing is needed here."""

    class Module(types.ModuleType):
        __path__ = ()

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return _Anything(name, (), {})

    class Finder:
        def find_spec(self, name, *_):
            here = name.partition(".")[0] == "torchvision"
            return importlib.machinery.ModuleSpec(name, self, is_package=True) if here else None

        def create_module(self, spec):
            return Module(spec.name)

        def exec_module(self, _):
            pass

    finder = Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def of_timm(name):
    """A model of timm and images of the smallest size that it takes."""
    with without_torchvision():
        import timm

    for size in SIZES:
        x = torch.randn(2, 3, size, size)
        for options in ({}, {"img_size": size}):
            with contextlib.suppress(Exception), torch.no_grad():
                model = timm.create_model(name, num_classes=10, **options).eval()
                model(x)
                return model, x
    raise RuntimeError(f"{name} takes no images of {SIZES[0]} to {SIZES[-1]} pixels")


def of_transformers(name, kind, settings):
    """A small model of transformers and an input."""
    import transformers

    cls = getattr(transformers, name)
    model = cls(cls.config_class(**settings)).eval()
    x = {
        "image": lambda: {"pixel_values": torch.randn(2, getattr(model.config, "num_channels", 3), 64, 64)},
        "text": lambda: {"input_ids": torch.randint(0, 30, (2, 12))},
        "wave": lambda: {"input_values": torch.randn(2, 800)},
        "series": lambda: {"past_values": torch.randn(2, 32, 3)},
    }[kind]()
    return model, x


def randomize(model):
    """Statistics far from those of a new layer, γ of both signs: what a mistake cannot hide behind."""
    with torch.no_grad():
        for found in find(model):
            for name, t in (*found.module.named_parameters(recurse=False), *found.module.named_buffers(recurse=False)):
                if name == "running_var":
                    t.uniform_(0.5, 2)
                elif name == "running_mean":
                    t.normal_(std=0.3)
                elif name == "weight":
                    t.uniform_(0.5, 1.5).mul_(torch.randint(0, 4, t.shape).clamp(max=1) * 2 - 1)
                elif name == "bias":
                    t.normal_(std=0.3)


def models():
    """Name → how to build model and input."""
    found = {f"timm {name}": lambda name=name: of_timm(name) for name in TIMM}
    found |= {f"transformers {entry[0]}": lambda entry=entry: of_transformers(*entry) for entry in TRANSFORMERS}
    return found


# --- operations ---------------------------------------------------------------------------------------------------


def output(model, example):
    """All tensors that come out, in evaluation."""
    torch.manual_seed(0)
    with torch.no_grad():
        y = feed(model, example)
    return [t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, torch.Tensor)]


def wide(model, example):
    """Outputs in float64, or, where a model holds to its dtype, in that."""
    try:
        doubled = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, example
        )
        return output(copy.deepcopy(model).double(), doubled)
    except Exception:
        return output(model, example)


def right_behind(model, example):
    """Normalizers with running statistics that get, in every call, the very tensor that a layer has returned."""
    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
    marked, seen, handles = {}, {}, []

    def leave(_module, _args, y):
        marked[id(y)] = y

    def enter(module, args):
        seen[module] = seen.get(module, True) and id(args[0]) in marked

    norms = {f.module for f in find(model) if f.running}
    for module in model.modules():
        if isinstance(module, layers):
            handles.append(module.register_forward_hook(leave))
        elif module in norms:
            handles.append(module.register_forward_pre_hook(enter))
    output(model, example)
    for handle in handles:
        handle.remove()
    return {f.name for f in find(model) if seen.get(f.module)}


def fold(model, example):
    direct = right_behind(model, example)  # some models keep what they compute: the first run is before all
    before, expected = state_hash(model), wide(model, example)
    report = ns.fold(model, example)
    folded = wide(model, example)
    error = max(
        ((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(expected, folded, strict=True)
        if a.is_floating_point() and a.numel()
    )
    report.undo()
    hits = sum(name in direct for name in report.changed)
    return {
        "outcome": "exact" if error <= 1e-4 and state_hash(model) == before else "WRONG",
        "norms": sum(f.running for f in find(model)),
        "behind": len(direct),
        "folded": hits,
        "more": len(report.changed) - hits,
        "error": error,
        "left": sorted({re.sub(r"\d+", "#", reason) for name, reason in report.skipped if name in direct}),
    }


def there_and_back(there, back):
    """An edit that keeps the function, and the one that takes it back."""

    def operation(model, example):
        expected = output(model, example)
        before = state_hash(model)
        report = there(model, example)
        between = output(model, example)
        same = all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()), equal_nan=True)
            for a, b in zip(expected, between, strict=True)
            if a.is_floating_point() and a.numel()
        )
        back(model)
        after = output(model, example)
        again = all(torch.equal(a, b) or bool((a != a).any()) for a, b in zip(expected, after, strict=True))
        exact = same and again and state_hash(model) == before
        return {
            "outcome": "exact" if exact else "WRONG",
            "changed": len(report.changed),
            "skipped": len(report.skipped),
        }

    return operation


@functools.cache
def cifar10():
    return load("cifar10").train_x


def pictures(count, size):
    """Two halves of natural pictures, each picture at mean 0 and variance 1 by channel."""
    x = torch.tensor(cifar10()[: 2 * count]).float()
    x = F.interpolate(x, size, mode="bilinear")
    return F.instance_norm(x).chunk(2)


def halves(example, count):
    """Two batches like an example."""

    def drawn(t):
        if t.dim() == 4 and t.shape[1] == 3:
            return pictures(count, t.shape[-2:])
        shape = (2 * count, *t.shape[1:])
        return (torch.randn(shape) if t.is_floating_point() else torch.randint(0, 30, shape)).chunk(2)

    if isinstance(example, torch.Tensor):
        return drawn(example)
    pairs = {key: drawn(t) for key, t in example.items()}
    return [{key: pair[k] for key, pair in pairs.items()} for k in (0, 1)]


def perturb(model, batch):
    """Statistics of the batch, then moved by 0.3 σ and by factors of 0.5 to 2: a deep network stays within range."""
    ns.recalibrate(model, [batch], progress=False)
    with torch.no_grad():
        for found in find(model):
            if found.running:
                mean, var = found.module.running_mean, found.module.running_var
                mean += 0.3 * var.sqrt() * torch.randn(mean.shape)
                var *= torch.empty(var.shape).uniform_(0.5, 2)


def moments(model, names, batch):
    """Mean and standard deviation, by layer and channel, of what normalizers give to their activation; the output."""
    seen, handles = {name: [] for name in names}, []

    def note(name, y):
        var, mean = torch.var_mean(y, [k for k in range(y.dim()) if k != 1], correction=0)
        seen[name].append(torch.stack([mean, var]).double())

    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module._modules.get("act", nn.Identity()), nn.Identity):
            handles.append(module.drop.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, __, y, name=name: note(name, y)))
    y = output(model, batch)[0].double()
    for handle in handles:
        handle.remove()
    calls = {name: torch.stack(parts).unbind(1) for name, parts in seen.items() if parts}  # all of one size
    spread = {name: (var.mean(0) + mean.var(0, correction=0)).sqrt() for name, (mean, var) in calls.items()}
    return {name: (mean.mean(0), spread[name]) for name, (mean, _) in calls.items()}, y


def apart(old, new):
    """Root mean square over the channels of the difference of means or of σ, the larger, over that of σ."""
    (m, s), (n, t) = old, new
    return float(max((n - m).norm(), (t - s).norm()) / s.norm())


def apart_by_channel(old, new):
    """The same by each channel's own σ: of the difference of means, in σ, or of that of ln σ."""
    (m, s), (n, t) = old, new
    alive = (s > 0) & (t > 0)
    return max(float(d[alive].square().mean().sqrt()) for d in ((n - m) / s, (t / s).log()))


def enough(model, names, example, pixels):
    """Two halves of so many pictures that the layers' own moments agree between them."""
    first = next(t for t in torch.utils._pytree.tree_leaves(example) if isinstance(t, torch.Tensor))
    most = pixels // first[0, 0].numel()
    count = min(PICTURES, most)
    perturb(model, halves(example, count)[0])
    while True:
        fitted, held = halves(example, count)
        (there, _), (old, target) = (moments(model, names, half) for half in (fitted, held))
        sampling = {name: apart(old[name], there[name]) for name in old}
        far = max(sampling.values(), default=0.0)
        if far <= ENOUGH or count >= most:
            return fitted, held, old, target, sampling, count
        count = min(most, 32 * math.ceil(count / 32 * (far / ENOUGH) ** 2 + 0.5))


def middle(distances):
    """That of the middle layer."""
    return sorted(distances)[len(distances) // 2] if distances else 0.0


def convert(model, example, pixels):
    """BatchNorm → GroupNorm(1), fitted on one half of the data, measured on the other."""
    names = [f.name for f in find(model) if f.kind == "BatchNorm"]
    if not names:
        return {"outcome": "exact", "changed": 0, "skipped": 0}
    fitted, held, old, target, sampling, count = enough(model, names, example, pixels)
    before = state_hash(model)  # some models keep what they compute
    report = ns.convert(model, {"BatchNorm": "GroupNorm(1)"}, calibrate=[fitted])
    new, y = moments(report.model, [name for name in report.changed if name in old], held)
    swapped, _ = report.details["calibration"].output  # nothing was fitted to a half then
    loss = [swapped**2, float((y - target).square().mean() / target.var())]
    report.undo()
    pairs = [(apart(old[name], new[name]), sampling[name]) for name in new]
    return {
        "outcome": "exact" if all(map(math.isfinite, loss)) and state_hash(model) == before else "WRONG",
        "changed": len(report.changed),
        "skipped": len(report.skipped),
        "pictures": count,
        "middle": [round(middle([pair[k] for pair in pairs]), 4) for k in (0, 1)],
        "worst": [round(x, 4) for x in max(pairs, default=(0.0, 0.0))],
        "within": sum(off <= SAME for off, _ in pairs),
        "by channel": sum(apart_by_channel(old[name], new[name]) <= SAME for name in new),
        "loss": loss,
        "left": sorted({re.sub(r"\d+", "#", reason) for _, reason in report.skipped}),
    }


OPERATIONS = {
    "fold": fold,
    "freeze": there_and_back(lambda m, _: ns.freeze(m), ns.unfreeze),
    "synchronize": there_and_back(lambda m, _: ns.synchronize(m), ns.desynchronize),
    # Of two pictures a 1×1 map would be normalized to ±1 whatever they are: gradients are then a matter of rounding.
    "accelerate": there_and_back(lambda m, x: ns.accelerate(m, halves(x, 4)[0]), ns.to_torch),
    "convert": convert,
}


def outcome(operation, model, example):
    """What an operation does to a model; an error that says what to do is a refusal."""
    start = time.perf_counter()
    try:
        result = OPERATIONS[operation](model, example)
    except ns.NormscopeError as error:
        result = {"outcome": "refused", "reason": str(error).splitlines()[0]}
    except Exception as error:
        result = {"outcome": "FAILED", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    return result | {"seconds": round(time.perf_counter() - start, 1)}


# --- the table ----------------------------------------------------------------------------------------------------


def cell(operation, result):
    """A cell of the table."""
    if result is None or result["outcome"] != "exact":
        return "" if result is None else f"{result['outcome']}: {result.get('reason', '')}"[:60].rstrip(": ")
    if operation == "fold":
        more = f" + {result['more']}" if result["more"] else ""
        return f"{result['folded']}/{result['behind']}{more}, {result['error']:.0e}" if result["norms"] else "–"
    if operation == "convert" and result["changed"]:
        (naive, fitted), within = result["loss"], f"{result['by channel']}\\*"
        if "within" in result:
            within = "{}, {:.0f} ({:.0f}) %".format(result["within"], *(100 * x for x in result["middle"]))
        return f"{result['changed']}, {within}, {naive:.2g} → {fitted:.2g}"
    return f"exact, {result['changed']}" if result["changed"] else "–"


def table(results):
    """The page: sums, a row per model, and why a normalizer right behind a layer stayed."""
    names = [name for name in models() if name in results]
    rows = [f"| model | {' | '.join(OPERATIONS)} |", f"|---|{'---|' * len(OPERATIONS)}"]
    rows += [f"| {n} | {' | '.join(cell(o, results[n].get(o)) for o in OPERATIONS)} |" for n in names]
    folds = {n: results[n]["fold"] for n in names if results[n].get("fold", {}).get("outcome") == "exact"}
    behind, folded, more = (sum(f[key] for f in folds.values()) for key in ("behind", "folded", "more"))
    fits = [r for n in names if (r := results[n].get("convert", {})).get("changed")]
    judged = [r for r in fits if "within" in r]
    wrong = [f"{n} {o}" for n in names for o, r in results[n].items() if r["outcome"] in ("WRONG", "FAILED")]
    head = [
        f"{len(names)} models. Folded: {folded} of {behind} normalizers right behind a layer"
        f" ({100 * folded / max(behind, 1):.1f} %), and {more} others."
        f" Converted: {sum(r['changed'] for r in fits)} in {len(fits)} models, {sum(r['skipped'] for r in fits)} left;"
        f" moments within 5 % in {sum(r['within'] for r in judged)} of {sum(r['changed'] for r in judged)} layers, in"
        f" the middle one of {sum(r['middle'][0] <= SAME for r in judged)} of {len(judged)} models, in all layers of"
        f" {sum(r['within'] == r['changed'] for r in judged)}; by each channel's own σ in"
        f" {sum(r['by channel'] for r in fits)} layers. Loss less than a tenth of the swap's in"
        f" {sum(r['loss'][1] <= 0.1 * r['loss'][0] for r in fits)} models, less than half in"
        f" {sum(r['loss'][1] <= 0.5 * r['loss'][0] for r in fits)}."
        f" Refused: {sum(r['outcome'] == 'refused' for n in names for r in results[n].values())}."
        f" Wrong: {', '.join(wrong) or 'none'}."
    ]
    why = [f"- {n}: {f['left'][0]}{', …' if f['left'][1:] else ''}" for n, f in folds.items() if f["left"]]
    left = [f"- {n}: {r['left'][0]}" for n in names if (r := results[n].get("convert", {})).get("left")]
    far = [
        f"- {n}: {r['changed'] - r['within']} of {r['changed']}, the worst by {100 * off:.0f} %,"
        f" the halves {100 * sampling:.0f} %, {r['pictures']} pictures each"
        for n in names
        if (r := results[n].get("convert", {})).get("within", math.inf) < r.get("changed", 0)
        for off, sampling in [r["worst"]]
    ]
    lists = (
        ("Right behind a layer, and not folded:", why),
        ("Not converted:", left),
        ("Layers whose moments are off by more than 5 %, which `held=` refuses:", far),
    )
    ends = [line for title, lines in lists for line in ("", title, "", *(lines or ["- none"]))]
    return "\n".join([*head, "", *rows, *ends])


def main():
    """Compute what is missing, print the table."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]).splitlines()[0])
    parser.add_argument("--select", nargs="*", default=["*"], help="patterns of names, as 'timm res*'")
    parser.add_argument("--operation", nargs="*", default=list(OPERATIONS), choices=list(OPERATIONS))
    parser.add_argument("--again", action="store_true", help="compute what is there, too")
    parser.add_argument("--pixels", type=int, default=2**21, help="the most in each half of convert's pictures")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further model after that long")
    parser.add_argument("--write", action="store_true", help="put the table into docs/zoo.md")
    given = parser.parse_args()
    OPERATIONS["convert"] = functools.partial(convert, pixels=given.pixels)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    warnings.simplefilter("ignore")
    end = time.monotonic() + given.seconds
    for name, build in models().items():
        if time.monotonic() > end or not any(fnmatch.fnmatch(name, pattern) for pattern in given.select):
            continue
        missing = [o for o in given.operation if given.again or o not in results.get(name, {})]
        if missing:
            torch.manual_seed(0)
            model, example = build()
            randomize(model)
        for operation in missing:
            result = outcome(operation, copy.deepcopy(model), example)
            results.setdefault(name, {})[operation] = result
            RESULTS.write_text(json.dumps(results, indent=1))
            print(name, operation, cell(operation, result), f"{result['seconds']} s", file=sys.stderr, flush=True)
    text = table(results)
    print(text)
    if given.write:
        marker = "<!-- scripts/zoo.py -->\n"
        PAGE.write_text(PAGE.read_text().partition(marker)[0] + marker + text + "\n")


if __name__ == "__main__":
    main()
