"""The watcher: it sees what units receive, costs no bit of the training, and leaves no hook behind."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normscope as ns
from normscope.errors import ArgumentError
from normscope.surgery import reach


def net():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Sigmoid(), nn.Dropout(0.3), nn.Linear(16, 8), nn.BatchNorm1d(8)
    )


def train(model, steps=12, each=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 6) + 1).square().mean().backward()
        optimizer.step()
        each()
    return model


def hooks(model):
    return [len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules()]


def test_training_is_the_same_bit_for_bit():
    torch.manual_seed(0)
    alone = train(net())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    model = net()
    with ns.watch(model, "*"):
        train(model)
    assert torch.equal(torch.get_rng_state(), after)
    for (name, a), b in zip(alone.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), (_, b) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_percentiles_are_numpys():
    model, seen = net(), []
    model[5].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().numpy()))
    with ns.watch(model, units=8) as watcher:
        train(model)
    assert watcher.layers == ("1", "5")
    assert watcher.units("5") == tuple(range(8))
    for unit in range(8):
        bands = watcher.bands("5", unit)
        expected = np.array([np.percentile(x[:, unit], (15, 50, 85)) for x in seen])
        # torch.quantile in float32 against numpy in float64
        assert np.allclose(np.stack([bands.low, bands.middle, bands.high], 1), expected, atol=1e-5)
    assert bands.steps == tuple(range(1, 13))
    travelled = [np.ptp(watcher.bands("5", k).middle) for k in range(8)]
    assert np.ptp(watcher.bands("5").middle) == sorted(travelled)[4]


def test_maps_have_their_units_on_axis_1_and_sequences_at_the_end():
    x = torch.randn(4, 3, 10, 10) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    for model, data in ((nn.BatchNorm2d(3), x), (nn.LayerNorm(3), x.movedim(1, -1).flatten(1, 2))):
        with ns.watch(model) as watcher:
            model(data)
        spread = [watcher.bands("", k).high[0] - watcher.bands("", k).low[0] for k in range(3)]
        # From the 15th to the 85th percentile a Gaussian spans 2.07 σ; of 400 values ± 10 %.
        assert np.allclose(np.array(spread) / [1, 10, 100], 2.07, rtol=0.25)


def test_memory_is_bounded_and_covers_the_whole_training():
    model = net()
    with ns.watch(model, points=10) as watcher:
        train(model, 100)
    steps = watcher.bands("1").steps
    assert len(steps) <= 10
    assert set(np.diff(steps)) == {16}
    assert steps[-1] > 80
    with ns.watch(model, every=7) as watcher:
        train(model, 30)
    assert watcher.bands("1").steps == (7, 14, 21, 28)


def test_only_training_counts():
    model = net()
    with ns.watch(model) as watcher:
        model.eval()(torch.randn(8, 6))
        assert watcher.steps == 0
        train(model.train(), 2)
        with torch.no_grad():
            model.eval()(torch.randn(8, 6))
    assert watcher.bands("1").steps == (1, 2)


def test_hooks_go_with_the_context_even_by_an_exception():
    model = net()
    before = hooks(model)

    def broken():
        with ns.watch(model, "*"):
            assert hooks(model) != before
            train(model, 1, each=lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        broken()
    assert hooks(model) == before
    watcher = ns.watch(model)
    train(model, 3)
    watcher.stop()
    watcher.stop()
    assert hooks(model) == before
    train(model, 3)
    assert watcher.steps == 3
    assert not [path for path, _ in reach(model) if "watcher" in path]


def test_other_hooks_stay():
    model, calls = net(), []
    with ns.watch(model):
        model[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.randn(8, 6))
    assert calls == [1]


def test_copies_and_files_hold_hooks_that_do_nothing():
    model = net()
    with ns.watch(model, "*") as watcher:
        train(model, 2)
        file = io.BytesIO()
        torch.save(model, file)
        assert b"normscope" not in file.getvalue()
        file.seek(0)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for other in others:
            train(other, 3)
            assert torch.isfinite(other(torch.randn(8, 6))).all()
        assert watcher.steps == 2
        train(model, 1)
    assert watcher.steps == 3


def test_a_recomputed_layer_counts_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    model = Checkpointed()
    with ns.watch(model) as watcher:
        train(model, 4)
    assert watcher.bands("body.1").steps == (1, 2, 3, 4)


def test_compiled_models_are_refused_and_what_hooks_do_not_see_is_said():
    model = net()
    with pytest.raises(ArgumentError, match=r"compiled.*NRM905"):
        ns.watch(torch.compile(model, backend="eager"))
    compiled = nn.BatchNorm1d(6)
    compiled.compile(backend="eager")
    with pytest.raises(ArgumentError, match=r"'1' is compiled"):
        ns.watch(nn.Sequential(nn.Linear(6, 6), compiled))
    before = hooks(model)

    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body[1].forward(self.body[0](x)).mean(1, keepdim=True)

    with ns.watch(Bypassed()) as watcher:
        train(watcher._model, 2)
    assert watcher.unseen == ("body.1", "body.5")
    assert "NRM905" in str(watcher)
    with pytest.raises(ArgumentError, match=r"nothing was seen of body\.1"):
        watcher.bands("body.1")
    with pytest.raises(ArgumentError, match="nothing was seen"):
        watcher.picture()
    assert hooks(model) == before


def test_data_parallel():
    """Without devices it calls the module itself; replicas have its hooks, run in threads, and are left out."""
    model = nn.DataParallel(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    with ns.watch(model) as watcher:
        train(model, 2)
        replica = model.module[1]._replicate_for_data_parallel()
        replica.__dict__.update(model.module[1]._parameters)
        watcher.steps += 1  # DataParallel itself was called
        replica(torch.full((4, 4), 1e6))
        train(model, 1)
    assert watcher.bands("module.1").steps == (1, 2, 4)
    assert max(watcher.bands("module.1").high) < 1e5


def test_per_sample_gradients_pass_by():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).sum()

    expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.ones(3, 6))
    with ns.watch(model) as watcher:
        made = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.ones(3, 6))
    assert all(torch.equal(made[k], expected[k]) for k in made)
    assert watcher.unseen == ("1",)


def test_figures_and_text(tmp_path):
    pytest.importorskip("matplotlib")
    model = net()
    with ns.watch(model, ["1", "2"]) as watcher:
        assert "not called in training mode" in str(watcher)
        train(model)
    watcher.to_figure(tmp_path / "units.svg")
    watcher.to_figure(tmp_path / "units.png")
    assert (
        "training steps" in (tmp_path / "units.svg").read_text(encoding="utf-8")
        or (tmp_path / "units.svg").stat().st_size > 5000
    )
    assert (tmp_path / "units.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ArgumentError, match="no ending of a picture"):
        watcher.to_figure(tmp_path / "units.docx")
    picture = watcher.picture()
    assert [plot.title.split(",")[0] for plot in picture.plots] == ["1", "2"]
    assert [series.kind for series in picture.plots[0].series] == ["band", "line", "line", "line"]
    lines = str(watcher).splitlines()
    assert len(lines) == 3
    assert any(block in lines[1] for block in "▁▂▃▄▅▆▇█")
    assert repr(watcher) == "Watcher(2 layers, 12 steps)"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"percentiles": (15, 50)}, "percentiles must be three"),
        ({"percentiles": (50, 15, 85)}, "ascending"),
        ({"units": 0}, "units must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"points": 1}, "points must be at least 2"),
        ({"select": "absent"}, "select matches no module"),
    ],
)
def test_bad_arguments_are_refused(options, sentence):
    model = net()
    before = hooks(model)
    with pytest.raises(ArgumentError, match=sentence):
        ns.watch(model, **options)
    assert hooks(model) == before
    with pytest.raises(ArgumentError, match=r"must be a torch\.nn\.Module"):
        ns.watch("model")
    with pytest.raises(ArgumentError, match="'9' is not watched"):
        ns.watch(model).bands("9")


def test_only_kept_units_can_be_asked_for():
    model = net()
    with ns.watch(model, units=3) as watcher:
        train(model, 2)
    assert watcher.units("1") == (0, 8, 15)
    with pytest.raises(ArgumentError, match="unit 1 of 1 is not kept"):
        watcher.bands("1", 1)
