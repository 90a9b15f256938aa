"""The training experiments on trial: each can come out either way, and a normalizer that does nothing changes nothing.

What an arm measured is replaced by planted numbers, with the claim's effect in them, against it, or none at all; the
tasks, the tuning and the judging are the real ones.
"""

import datetime as dt
import math

import planted as further
import pytest
import torch
from planted import noise, row

from normscope.lab import networks, registry
from normscope.lab.advice import SITUATIONS
from normscope.lab.experiment import Measured, Results, Task, execute
from normscope.lab.experiments import c01_statistics_batch, e01_recurrent, h01_matrix
from normscope.lab.ledger import Run, judge
from normscope.lab.samples import assuming, samples
from normscope.records import Judgement, Picture, Table, from_json, to_json

TRAINING = [name for name in registry.runnable() if not name.startswith("A")]
CORE = ["B01", "B03", "B06", "B07", "B08", "C01", "C05", "E01", "F01", "F02"]


def curve(task, fast):
    """Accuracy that reaches its end early or late."""
    steps = [float(10 * k) for k in range(1, 11)]
    ends = [min(1.0, step / (20 if fast else 80)) for step in steps]
    return {"steps": steps, "curve": [0.97 * end for _ in task.seeds for end in ends]}


# Name → the numbers of a task, when the claim's arm is better by `gain`: positive confirms, negative refutes.
def b01(task, gain):
    good = (task["norm"] == "BN") == (gain > 0)
    return curve(task, good or not gain) | {
        "test": row(task, 0.97 + 0.02 * (good and gain != 0)), "valid": row(task, 0.9),
        "drift": row(task, 0.5 if good else 2.0), **{f"band {level}": [0.0] * 10 for level in ("0.15", "0.5", "0.85")},
    }  # fmt: skip


def b03(task, gain):
    good = (task["norm"] == "BN") == (gain > 0)
    works = task["rate"] <= (1.0 if good or not gain else 0.03)
    value = 0.9 if works else 0.1
    return curve(task, good or not gain) | {"test": row(task, value), "valid": row(task, value), "time": [1.0]}


def b06(task, gain):
    normed, relu = task["norm"] == "BN", task["activation"] == "relu"
    if task["stage"] == "train":
        return {"test": row(task, 0.9 if relu == (gain > 0) else 0.2), "valid": row(task, 0.5)}
    vanishes = (not normed if gain > 0 else normed) and not relu
    return {
        "slope": row(task, -1.4 if vanishes else 0.0), "scale": row(task, 0.1 if normed == (gain > 0) else 1.0),
        "growth": row(task, 0.1 if gain > 0 else -0.1), "profile": [0.0] * 30,
    }  # fmt: skip


def b07(task, gain):
    better = "sigmoid" if gain > 0 else "relu"
    return {"test": row(task, 0.9 + 0.05 * (task["activation"] == better and gain != 0)), "valid": row(task, 0.9)}


def b08(task, gain):
    better = "after" if gain > 0 else "before"
    return {"test": row(task, 0.9 + 0.05 * (task["place"] == better and gain != 0)), "valid": row(task, 0.9)}


def c01(task, gain):
    norm = str(task["norm"])
    size = int(norm[5:]) if norm.startswith("ghost") else 32
    value = 0.6 + 0.03 * math.copysign(1, gain) * math.log2(size) * (gain != 0)
    value -= 0.1 * (norm == "GN" and gain < 0)
    return {name: row(task, value) for name in ("test", "valid", "precise", "corrected", "batch test", "batch train")}


def c05(task, gain):
    stored = 0.6 - 0.05 * (gain > 0)
    small = 1e-4 * noise(task, 0)  # two evaluations of one network hardly differ
    return {
        "training": (0.6 + small).tolist(), "stored": [stored], "recalibrated": [0.6],
        "requests": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "moments": row(task, 0.5),
    }  # fmt: skip


def e01(task, gain):
    horizontal = str(task["norm"]).startswith("horizontal")
    grows = horizontal and gain > 0
    # Above −1 both ways of the main claim; −2: normalizing horizontally helps; −3: LayerNorm does.
    helped = 0.05 * (horizontal if gain == -2 else task["norm"] == "LN" and gain == -3)
    found = {"test": row(task, 0.9 - 0.2 * grows + helped), "valid": row(task, 0.9)}
    for when in [f"{regime} {time}" for regime in e01_recurrent.REGIMES for time in ("start", "end")]:
        found |= {f"slope {when}": row(task, 0.5 if grows else -0.5), f"profile {when}": [0.0] * 8}
    return found


def f01(task, gain):
    good = (task["norm"] == "none") == (gain > 0) or gain == 0
    values = [30.0 + k + 1.0 * good + float(noise(task, k)[0]) for k in range(4)]
    return {
        "psnr": values, "contrast": [0.05 if good else 0.2] * 4, "bilinear": [29.0] * 4, "valid": values[:1],
        "curve": [25.0, 31.0] if good else [20.0, 31.0], "steps": [1.0, 2.0], "batch statistics": values,
    }  # fmt: skip


def f02(task, gain):
    helped = task["norm"] == "BN" and task["task"] == "noise"
    value = 30.0 + gain * helped
    return {"psnr": [value + float(noise(task, k)[0]) for k in range(4)], "valid": row(task, 30.0)}


PLANTED = {
    "B01": b01,
    "B03": b03,
    "B06": b06,
    "B07": b07,
    "B08": b08,
    "C01": c01,
    "C05": c05,
    "E01": e01,
    "F01": f01,
    "F02": f02,
    **further.PLANTED,
}
# Which judgement carries the claim, and what no effect at all must give.
MAIN = dict.fromkeys(PLANTED, 0)
NOTHING = {"B06": None, "E01": None}


def planted(name, gain, profile="cpu", by=None):
    experiment, plant = registry.load(name), by or PLANTED[name]
    seeds = tuple(range(experiment.seeds[profile]))
    results = Results()
    # The noise follows from the task: the same on every machine.
    with assuming(("mnist", "fashion-mnist", "cifar10", "pictures")):
        while undone := [task for task in experiment.tasks(profile, seeds, results) if task not in results]:
            for task in undone:
                results.add(Measured(task, plant(task, gain), 0.0))
    return experiment, results


def test_the_ten_core_experiments_are_here():
    assert set(CORE) <= set(TRAINING)
    assert set(TRAINING) == set(PLANTED)


@pytest.mark.parametrize("name", TRAINING)
def test_a_planted_effect_is_confirmed_and_its_opposite_refuted(name):
    verdicts = []
    for gain in (1.0, -1.0):
        experiment, results = planted(name, gain)
        judgements = experiment.judge(results)
        verdicts.append(judgements[MAIN[name]].verdict)
        for j in judgements:
            assert from_json(Judgement, to_json(j)) == j
        picture = experiment.figure(results)
        assert from_json(Picture, to_json(picture)) == picture
    assert verdicts == ["CONFIRMED", "REFUTED"]
    missing = set(experiment.registration.claims) - {claim for j in judgements for claim in j.claims}
    assert not missing


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in NOTHING])
def test_no_effect_is_never_confirmed(name):
    experiment, results = planted(name, 0.0, "full")
    assert experiment.judge(results)[MAIN[name]].verdict != "CONFIRMED"


# Whose verdicts are not of the two sides: the published quarter is on record, and so is the number 14.
OTHER = {
    ("D01", "is it a quarter of the training time?"): {"CONDITIONAL"},
    ("D01", "14 times less time?"): {"CONDITIONAL", "REFUTED"},
}


@pytest.mark.parametrize("name", sorted(set(TRAINING) - set(CORE)))
def test_every_question_can_be_confirmed_and_refuted(name, monkeypatch):
    monkeypatch.setattr(h01_matrix, "successors", h01_matrix.successors)  # what is planted there is taken back
    plants = {question: plant for (experiment, question), plant in further.FURTHER.items() if experiment == name}
    found = []
    for gain in (1.0, -1.0):
        experiment, results = planted(name, gain)
        said = {j.question: j.verdict for j in experiment.judge(results)}
        assert set(plants) <= set(said)
        for question, plant in plants.items():
            experiment, results = planted(name, gain, by=plant)
            said[question] = next(j.verdict for j in experiment.judge(results) if j.question == question)
        found.append(said)
    for question, verdict in found[0].items():
        sides = {verdict, found[1][question]}
        assert sides == OTHER.get((name, question), {"CONFIRMED", "REFUTED"}), question
        if question in plants:
            assert verdict == "CONFIRMED", question


def test_the_matrix_marks_the_best_and_what_cannot_be_told_from_it():
    experiment, results = planted("H01", 1.0)
    tasks, faults = experiment.tables(results)
    for table in (tasks, faults):
        assert from_json(Table, to_json(table)) == table
    marks = {row.name: dict(zip(tasks.columns, [c and c.mark for c in row.cells], strict=True)) for row in tasks.rows}
    # Planted is a gain of 0.1 for one normalizer: 50 times the noise. What is planted alike cannot be told apart.
    assert marks["recurrent"] == {"none": "", "BN": "", "LN": "best", "IN": None, "GN": None}
    assert marks["convolutions"] == {"none": "", "BN": "best", "LN": "", "IN": "", "GN": ""}
    assert set(marks["denoising"].values()) == {"best", "not separable", None}
    values = {row.name: dict(zip(faults.columns, row.cells, strict=True)) for row in faults.rows}
    lost = results.per_seed("test", stage="test", task="convolutions", norm="BN")
    small = results.per_seed("test", stage="test", task="small batch", norm="BN")
    difference = 100 * sum(a - b for a, b in zip(lost, small, strict=True)) / len(lost)
    assert values["small batch"]["BN"].value.value == pytest.approx(difference)
    assert values["small batch"]["GN"].value.high == 0
    assert values["super-resolution"]["BN"].mark == ""
    assert values["super-resolution"]["LN"].mark == "best"


def answered(name):
    """The questions of an experiment, with any verdicts."""
    if name in TRAINING:
        experiment, results = planted(name, 1.0)
    else:
        experiment = registry.load(name)
        results = experiment.run("quick")
    return [j.question for j in experiment.judge(results)]


@pytest.mark.parametrize("name", sorted({asked.experiment for s in SITUATIONS for asked in s.asked}))
def test_advice_rests_on_questions_that_are_answered(name):
    questions = answered(name)
    for asked in (asked for situation in SITUATIONS for asked in situation.asked):
        assert asked.experiment != name or questions.count(asked.question) == 1, asked.question


def verdicts(name, gain, question):
    experiment, results = planted(name, gain)
    return [j.verdict for j in experiment.judge(results) if question in j.question]


@pytest.mark.parametrize(
    ("name", "question", "confirmed", "refuted"),
    [
        ("C01", "GroupNorm among the best", 1.0, -1.0),  # planted: all alike, and GroupNorm behind
        ("E01", "LSTM: does it explode", 1.0, -1.0),
        ("E01", "tanh: is it of no use", 1.0, -2.0),
        ("E01", "LSTM: is it of no use", 1.0, -2.0),
        ("E01", "LSTM: is LayerNorm the best", -3.0, -2.0),
    ],
)
def test_further_questions_come_out_either_way(name, question, confirmed, refuted):
    assert verdicts(name, confirmed, question) == ["CONFIRMED"]
    assert verdicts(name, refuted, question) == ["REFUTED"]


def test_swapped_labels_swap_the_verdict():
    experiment, results = planted("B07", 1.0)
    other = {"sigmoid": "relu", "relu": "sigmoid"}
    swapped = Results(
        Measured(_with(m.task, activation=other[m.task["activation"]]), m.numbers, m.seconds) for m in results
    )
    assert experiment.judge(swapped)[0].verdict == "REFUTED"


def _with(task, **changes):
    return Task(task.experiment, tuple((dict(task.settings) | changes).items()), task.seeds)


@pytest.mark.parametrize("name", ["B01", "B03", "B07", "C01"])
def test_a_normalizer_that_does_nothing_changes_nothing_bit_for_bit(name):
    experiment = registry.load(name)
    tasks = experiment.tasks("quick", (0, 1), Results())
    task = _with(
        next(t for t in tasks if t["norm"] == "none" or name == "C01"), norm="none", steps=100 if name == "B01" else 12
    )
    runs = [execute(experiment, t).numbers for t in (task, _with(task, norm="noop"))]
    kept = [{k: v for k, v in numbers.items() if k != "time"} for numbers in runs]
    assert kept[0] == kept[1]
    # And the pairing is not trivial: a normalizer that does something changes it.
    normed = execute(experiment, _with(task, norm="BN" if name != "C01" else "LN")).numbers
    assert normed["curve"] != runs[0]["curve"]


@pytest.mark.parametrize("name", ["B02", "B12", "B17", "C04", "C06", "D01", "F04", "F05", "F06", "G01"])
def test_nothing_changes_nothing_in_what_is_measured_otherwise(name):
    experiment = registry.load(name)
    tasks = experiment.tasks("quick", (0, 1), Results())
    task = next(t for t in tasks if dict(t.settings).get("norm") in ("none", "GN"))
    runs = [execute(experiment, _with(task, norm=norm, steps=6)).numbers for norm in ("none", "noop", "BN", "LN")]
    kept = [repr({k: v for k, v in numbers.items() if not k.startswith("time")}) for numbers in runs]
    assert kept[0] == kept[1]
    assert len(set(kept[:1] + kept[2:])) >= 2


@pytest.mark.parametrize("name", ["B01", "B07"])
def test_shuffled_labels_teach_nothing(name, monkeypatch):
    import normscope.lab.experiments.b01_mnist as b01_mnist
    import normscope.lab.training as training

    def shuffled(*arguments):
        found = samples(*arguments)
        order = torch.randperm(len(found.train_y), generator=torch.Generator().manual_seed(0))
        return type(found)(
            found.title, found.train_x, found.train_y[order], found.valid_x, found.valid_y, found.test_x, found.test_y,
            found.classes,
        )  # fmt: skip

    for module in (b01_mnist, training):
        monkeypatch.setattr(module, "samples", shuffled)
    experiment = registry.load(name)
    task = next(t for t in experiment.tasks("quick", (0,), Results()) if t["norm"] == "BN")
    accuracy = execute(experiment, task).numbers["test"]
    # 360 test images, 10 classes: guessing reaches 0.1 ± 0.016.
    assert max(accuracy) < 0.25


def quick_sample():
    """Two experiments a day, another pair tomorrow: every one of them at least once a week."""
    day = dt.date.today().toordinal()
    return [TRAINING[(2 * day + k) % len(TRAINING)] for k in range(2)]


@pytest.mark.parametrize("name", quick_sample())
def test_a_quick_run_works_and_decides_nothing(name):
    experiment = registry.load(name)
    seeds = (0, 1)
    results = experiment.run("quick", seeds)
    record = judge(Run(name, "quick", seeds, results, (), ()))
    assert record.runs == record.planned
    assert {j.verdict for j in record.judgements} == {"UNDECIDED"}
    task = min(results, key=lambda m: m.task.cost).task
    again = execute(experiment, task).numbers
    assert {k: v for k, v in again.items() if not k.startswith("time")} == {
        k: tuple(v) if isinstance(v, tuple) else v for k, v in results[task].numbers.items() if not k.startswith("time")
    }


def test_ghost_batches_of_all_samples_are_batch_normalization():
    data = samples("digits", "half", 200, 100)
    settings = {"data": "digits", "net": "cnn", "steps": 5, "stage": "tune", "rate": 0.03}
    runs = []
    for norm in ("ghost32", "BN"):
        task = Task("C01", tuple((settings | {"norm": norm}).items()), (0,))
        network = c01_statistics_batch.build(task, data)
        torch.manual_seed(0)
        runs.append(network.train()(data.train_x[:32]))
    torch.testing.assert_close(runs[0], runs[1])


def test_evalnorm_corrects_a_copy_and_learns():
    data = samples("digits", "half", 200, 100)
    task = Task("C01", tuple({"data": "digits", "net": "cnn", "norm": "ghost2"}.items()), (0,))
    network = c01_statistics_batch.build(task, data).eval()
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    learnt = c01_statistics_batch._with_evalnorm(network, data, 2, 0)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)
    for block, before in zip(learnt.blocks, network.blocks, strict=True):
        torch.testing.assert_close(block[1].running_var, before[1].running_var, rtol=0, atol=0)
        torch.testing.assert_close(block[1].weight, before[1].weight, rtol=0, atol=0)
        assert (block[1].mean_weight - 0.5).abs().max() > 0.02  # from 1/2, where it starts

    def loss(model):
        """EvalNorm's own, over batches of two."""
        total = 0.0
        for pair in data.train_x[:100].split(2):
            model.train()(pair)
            total += sum(float(block[1].loss) for block in model.blocks)
        return total

    after = loss(learnt)
    for block in learnt.blocks:
        torch.nn.init.constant_(block[1].mean_weight, 0.5)
        torch.nn.init.constant_(block[1].var_weight, 0.5)
    assert after < 0.9 * loss(learnt)


def test_parts_see_their_own_statistics():
    norm = networks.norm_2d("BRN4", 3).train()
    x = torch.randn(8, 3, 5, 5) * torch.arange(1, 9)[:, None, None, None]
    # Bounds of 1 and 0 at first: Batch Renormalization is then Batch Normalization.
    expected = torch.cat([torch.nn.functional.batch_norm(part, None, None, training=True) for part in x.split(4)])
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    assert norm.norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.eval()(x)[:1], norm(x[:1]))


@pytest.mark.parametrize("norm", ["none", "horizontal 0.1", "LN"])
def test_an_lstm_step_by_step_is_the_lstm(norm):
    network = e01_recurrent.Gated(3, 10, 7, 0, norm)
    x = torch.randn(6, 7, 3)
    state = network.states(x, torch.zeros(6, e01_recurrent.UNITS))[-1]
    torch.testing.assert_close(network.scores(state), network(x), atol=1e-5, rtol=1e-5)
    other = e01_recurrent.Gated(3, 10, 7, 0, "none")
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(network.lstm.get_parameter(name), other.lstm.get_parameter(name))
    assert torch.equal(network.head, other.head)
    assert not any(p.any() for name, p in network.lstm.named_parameters() if name.startswith("bias"))


def test_the_recurrent_cell_against_torch():
    torch.manual_seed(0)
    cell = e01_recurrent.Cell(3, 10, 7, 0, "none")
    theirs = torch.nn.RNN(3, e01_recurrent.UNITS, batch_first=True, bias=False)
    with torch.no_grad():
        theirs.weight_hh_l0.copy_(cell.recurrent.T)
        theirs.weight_ih_l0.copy_(cell.input.T)
    x = torch.randn(5, 7, 3)
    states = torch.stack(cell.states(x, torch.zeros(5, e01_recurrent.UNITS)), 1)
    torch.testing.assert_close(states, theirs(x)[0])
