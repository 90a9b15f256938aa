"""Numbers as if they had been measured: name → what a task gives when the claim's arm is better by `gain`.

Positive confirms, negative refutes, zero is no effect at all.
"""

import math

import torch

from normscope.lab.experiments import b17_shift, h01_matrix


def noise(task, k):
    """Small, and different for every run and seed."""
    return 0.002 * torch.randn(len(task.seeds), generator=torch.Generator().manual_seed(int(task.key[:7], 16) + k))


def row(task, value, k=0):
    return (value + noise(task, k)).tolist()


def sign(gain):
    return (gain > 0) - (gain < 0)


def trained(task, value):
    """What `train` gives: as fast as it is good."""
    steps = [float(10 * k) for k in range(1, 11)]
    rows = [[float(v)] * 10 for v in value + noise(task, 7)]
    return {
        "steps": steps, "curve": [v for r in rows for v in r], "test": row(task, value), "valid": row(task, value),
        "train": row(task, value), "time": [1.0],
    }  # fmt: skip


def b04(task, gain):
    wide = (task["norm"] != "none") == (gain > 0) and gain != 0
    near = 0.2 if not wide else 2.0
    return {name: row(task, 0.9 if near >= abs(1 - task["gain"]) else 0.2) for name in ("test", "valid")}


def b09(task, gain):
    lost = 0.1 * (task["norm"] == "BN bare") * sign(gain)
    return trained(task, 0.8 - lost)


def b12(task, gain):
    return trained(task, 0.8 + 0.05 * (task["norm"] == "BN") * sign(gain))


def b16(task, gain):
    return trained(task, 0.8 + 0.05 * (task["batches"] == "mixed") * sign(gain))


def b18(task, gain):
    order = ("raw", "log", "standardised", "whitened", "standardised, BN inside")
    return trained(task, 0.8 + 0.03 * order.index(task["input"]) * sign(gain))


def c02(task, gain):
    return trained(task, 0.5 + 0.1 * (task["batch"] / 32) * (task["norm"] == "BN") * sign(gain))


def c07(task, gain):
    return trained(task, 0.5 + 0.05 * (task["norm"] not in ("IN", "LN")) * sign(gain))


def b02(task, gain):
    normed = task["norm"] == "BN"
    better = normed * sign(gain)
    # It is always faster; what is planted is whether distributions and gradients are steadier then.
    found = trained(task, 0.8 + 0.05 * normed * abs(sign(gain)))
    return found | {"drift": row(task, 0.5 - 0.2 * better), "shift": row(task, 0.5 - 0.2 * better, 1)}


def b13(task, gain):
    grows = (gain > 0) * (task["way"] != "true")
    steps = [float(10 * k) for k in range(1, 11)]
    rows = [[(1 + k if grows else 1.0) + float(n) for k in range(10)] for n in noise(task, 3)]
    sizes = [v for r in rows for v in r]
    return trained(task, 0.8 + 0.05 * (task["way"] == "true") * sign(gain)) | {
        "steps": steps, "bias": sizes, "weight": sizes
    }  # fmt: skip


def b14(task, gain):
    norm = str(task["norm"])
    speed = 0.8 if norm == "none" else 0.9 if norm == "BN" else 0.88 if gain > 0 else 0.82
    return trained(task, speed if gain else 0.8) | {"drift": row(task, 2.0 if "noisy" in norm else 0.5)}


def b15(task, gain):
    value = 1.0 - 0.5 * (task["norm"] == "BN") * sign(gain) + float(noise(task, 2)[0])
    return {"steps": [1.0, 2.0], "raw": [value] * 2, "relative": [value] * 2}


def f03(task, gain):
    small = float(noise(task, 1)[0])
    wide = 0.2 * (gain <= 0)
    return {
        "noise spread": 0.02 + small + wide, "noise kurtosis": small, "noise correlation": small / 4,
        "enlarged spread": 0.6 + small - 0.5 * (gain < 0), "enlarged kurtosis": 9 + small,
        "enlarged correlation": 0.3,
    }  # fmt: skip


def f04(task, gain):
    worse = (task["norm"] != "none") * sign(gain)
    if task["map"] == "shape":
        worse = -worse
    return {"error": row(task, -2 + 0.5 * worse), "valid": row(task, 2.0)}


def h02(task, gain):
    return trained(task, 0.5 + 0.05 * (task["norm"] == "BN") * sign(gain))


def h03(task, gain):
    found = trained(task, 0.5 + 0.05 * (task["norm"] == "BN ZCA") * sign(gain))
    return found | {"time": [1 + float(task["norm"] == "BN ZCA") + float(noise(task, 5)[0])]}


def b05(task, gain):
    share = 0.6 if task["norm"] == "BN" and gain > 0 else 0.1 if task["norm"] == "BN" and gain < 0 else 0.3
    works = math.log10(task["rate"]) < -3 + 3.5 * share
    return {"valid": row(task, 0.9 if works else 0.5), "test": row(task, 0.5)}


def b17(task, gain):
    robust = (task["norm"] != "none") * sign(gain)
    found = trained(task, 0.8 - 0.1 * robust * (task["task"] == "contrast"))
    for k, shift in enumerate(b17_shift.SHIFTS):
        found |= {shift: row(task, 0.5 + 0.1 * robust, k), f"{shift} batch": row(task, 0.5 + 0.2 * sign(gain), k)}
        found[f"{shift} class"] = row(task, 0.3, k)
    return found


def c04(task, gain):
    loss = 0.1 * (task["norm"] == "BN") * sign(gain)
    return {"test": row(task, 0.8 - loss), "valid": row(task, 0.8), "along": [0.5] * 10}


def c06(task, gain):
    return trained(task, 0.8 - 0.05 * (task["norm"] == "BN") * (2 / task["batch"]) * sign(gain))


def d01(task, gain):
    if "norm" in dict(task.settings):
        return trained(task, 0.9)
    ratio = 1 + 0.2 * sign(gain)
    return {"time none": [1.0] * 3, "time BN": [ratio + float(noise(task, k)[0]) for k in range(3)]}


def g01(task, gain):
    kept = 0.5 - 0.1 * (task["norm"] == "BN") * sign(gain)
    found = {name: [kept + float(noise(task, k)[0]) for k in range(4)] for name in ("attack", "transfer", "noise")}
    return trained(task, 0.9) | found | {"clean": row(task, 0.9)}


def b10(task, gain):
    noisy = {"none": 0, "BN": 1, "ghost8": 2, "BN fixed": 0}[task["norm"]] * sign(gain)
    found = trained(task, 0.5 + 0.05 * noisy)
    return found | {"train": row(task, 0.8, 4)}


def b11(task, gain):
    normed, value = task["norm"] == "BN", task["lambda"]
    found = {name: row(task, 0.5) for name in ("test", "valid", "train")}
    strong = 100 * value * sign(gain)
    found |= {"zeros": row(task, 0.2 + 0.5 * strong * (task["penalty"] == "L1")), "norm": row(task, 5 - 2 * strong, 1)}
    return found | {"replayed": row(task, 0.5 - 0.1 * normed * (gain > 0), 2)}


def c03(task, gain):
    norm = str(task["norm"])
    error = 0.3 + 0.03 * sign(gain) * (math.log2(task["workers"]) if norm.startswith("ghost") else 0)
    return trained(task, 1 - error) | {"difference": [1e-7]}


def e02(task, gain):
    behind = [0.0, 0.05, 0.1, 0.1]
    test = [0.8 - sign(gain) * b * (task["norm"] == "BN") + float(noise(task, k)[0]) for k, b in enumerate(behind)]
    return {"valid": row(task, 0.8), "by length": test, "test": test[:1], "going on": [64.0 - k for k in range(40)]}


def f05(task, gain):
    norm = str(task["norm"])
    better = {"none": 0.0, "BN": 0.3, "BN alike": 0.3, "LN": 0.3, "IN": 0.5}.get(norm, 0.0) * sign(gain)
    return {"loss": [1.0 - better + k * (0.2 - 0.1 * better) + float(noise(task, k)[0]) for k in range(3)],
            "valid": row(task, -1.0)}  # fmt: skip


def f06(task, gain):
    worse = {"none": 0.0, "BN": 0.5, "LN": 0.3, "GN": 0.3, "IN": 0.1}[task["norm"]] * sign(gain)
    return {"distance": row(task, 1 + worse), "valid": row(task, -1.0), "entropy": row(task, 2.0, 1)}


def h01(task, gain):
    name, norm = str(task["task"]), str(task["norm"])
    value = 0.8
    if name == "super-resolution":
        value += 0.1 * sign(gain) * ((norm == "LN") - (norm == "BN"))
    recommended = {"recurrent": "LN", "convolutions": "BN", "perceptron": "BN", "small batch": "GN"}.get(name)
    if recommended:
        value += 0.1 * sign(gain) * (norm == recommended)
    return {"test": row(task, value), "valid": row(task, 0.8)}


PLANTED = {
    "B02": b02, "B04": b04, "B05": b05, "B09": b09, "B10": b10, "B11": b11, "B12": b12, "B13": b13, "B14": b14,
    "B15": b15, "B16": b16, "B17": b17, "B18": b18, "C02": c02, "C03": c03, "C04": c04, "C06": c06, "C07": c07,
    "D01": d01, "E02": e02, "F03": f03, "F04": f04, "F05": f05, "F06": f06, "G01": g01, "H01": h01, "H02": h02,
    "H03": h03,
}  # fmt: skip


# --- further questions: a positive gain confirms the one that is named, a negative one refutes it ---------------------


def rate_alone(task, gain):
    wide = str(task["norm"]) in (("BN scaled",) if gain > 0 else ("BN",))
    return {name: row(task, 0.9 if (2.0 if wide else 0.2) >= abs(1 - task["gain"]) else 0.2)
            for name in ("test", "valid")}  # fmt: skip


def affine_learns(task, gain):
    return trained(task, 0.1 + 0.4 * (task["norm"] != "BN only" or gain > 0))


def dropout_needless(task, gain):
    return b10(task, 0.0) | {"test": row(task, 0.5 + 0.05 * (gain < 0) * (task["dropout"] > 0))}


def decay_without(task, gain):
    used = (task["norm"] == "none") == (gain > 0) and task["lambda"] > 0
    return b11(task, 1.0) | {"test": row(task, 0.5 + 0.05 * used)}


def fewer_data(task, gain):
    return trained(task, 0.8 + 0.02 * gain * (task["norm"] == "BN") * -math.log2(task["size"]))


def shifts_slow(task, gain):
    noisy = "noisy" in str(task["norm"])
    speed = 0.8 if task["norm"] == "none" else 0.9 - 0.08 * noisy * (gain > 0)
    return trained(task, speed) | {"drift": row(task, 2.0 if noisy else 0.5)}


def unequal_batches(task, gain):
    suffers = (task["norm"] == "none") == (gain > 0)
    return trained(task, 0.8 - 0.1 * suffers * (task["batches"] != "mixed"))


def small_batch_without(task, gain):
    return trained(task, 0.5 + 0.1 * gain * (task["batch"] / 32) * (task["norm"] == "none"))


def synchronised(task, gain):
    return trained(task, 0.7 - 0.05 * (gain < 0) * str(task["norm"]).endswith("synchronised")) | {"difference": [1e-7]}


def varying(task, gain):
    loss = 0.1 * (task["norm"] == "BN") * (task["regime"] == ("varying" if gain > 0 else "fixed"))
    return {"test": row(task, 0.8 - loss), "valid": row(task, 0.8), "along": [0.5] * 10}


def ends(task, gain):
    return trained(task, 0.5 + 0.05 * gain * (task["norm"] == "LN"))


def longer_steps(task, gain):
    if "norm" in dict(task.settings):
        return trained(task, 0.9)
    ratio = 1.2 + 0.02 * gain * math.log2(task["batch"])
    return {"time none": [1.0] * 3, "time BN": [ratio + float(noise(task, k)[0]) for k in range(3)]}


def beyond(task, gain):
    return e02(task, 0.0) | {"by length": [0.8, 0.8, 0.8, 0.8 - 0.2 * (gain < 0) + float(noise(task, 4)[0])]}


def mixing(task, gain):
    better = str(task["norm"]) == ("BN alike" if gain > 0 else "BN")
    return {"loss": [1.0 - 0.3 * better + float(noise(task, k)[0]) for k in range(3)], "valid": row(task, -1.0)}


def two_samples(task, gain):
    small = task["task"] == "small batch"
    return {"test": row(task, 0.8 - 0.1 * gain * small), "valid": row(task, 0.8)}


def groups(task, gain):
    return {"test": row(task, 0.8 + 0.1 * gain * (task["norm"] == "GN")), "valid": row(task, 0.8)}


def layers(task, gain):
    return {"test": row(task, 0.8 - 0.1 * gain * (task["norm"] == "LN")), "valid": row(task, 0.8)}


def counted(task, gain):
    """Of the layers of the package, which no run measures."""
    h01_matrix.successors = lambda: (17, 18) if gain > 0 else (9, 18)
    return h01(task, 1.0)


def slow_steps(task, gain):
    return trained(task, 0.5) | {"time": [1 + 0.5 * (gain > 0) * (task["norm"] == "BN") + float(noise(task, 5)[0])]}


def slow_whitening(task, gain):
    return trained(task, 0.5) | {"time": [1 + 0.5 * gain * (task["norm"] == "BN ZCA") + float(noise(task, 5)[0])]}


FURTHER = {
    ("B04", "is that left to the rate (gain² in its place widens further)?"): rate_alone,
    ("B09", "do γ and β learn by gradient descent?"): affine_learns,
    ("B10", "is dropout needless with it?"): dropout_needless,
    ("B11", "is the best decay of more use without it?"): decay_without,
    ("B12", "is its gain larger with less data?"): fewer_data,
    ("B14", "do shifting distributions slow it down?"): shifts_slow,
    ("B16", "does Batch Normalization lose less by unequal batches?"): unequal_batches,
    ("C02", "or is it the optimizer's batch: does it rise without a normalizer?"): small_batch_without,
    ("C03", "do synchronised statistics repair it?"): synchronised,
    ("C04", "does it lose more with varying batches than with fixed ones?"): varying,
    ("C07", "is LayerNorm better than InstanceNorm in convolutions?"): ends,
    ("D01", "the more so the larger the batch?"): longer_steps,
    ("E02", "do the last step's statistics serve beyond the longest sequence?"): beyond,
    ("F05", "does it suffer from mixing unrelated images in a batch?"): mixing,
    ("H01", "do nearly all successors use one sample only?"): counted,
    ("H01", "is GroupNorm better where statistics have two samples?"): two_samples,
    ("H01", "is LayerNorm useful in recurrent networks only?"): layers,
    ("H01", "small batch: is GN among the best?"): groups,
    ("H02", "is a step with Batch Normalization slower by a tenth?"): slow_steps,
    ("H03", "is whitening expensive?"): slow_whitening,
}
