"""The callbacks look on: the same training bit for bit, with and without, in the real libraries where they are."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normscope as ns
from normscope.errors import ArgumentError
from normscope.integrations.observer import Observer

CENTRES = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * 2


def data(count=256):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (count,), generator=generator)
    return CENTRES[y] + torch.randn(count, 6, generator=generator), y


def body():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def hooks(model):
    return sum(len(m._forward_pre_hooks) for m in model.modules())


def same(a, b):
    """Weights, running statistics, gradients: bit for bit."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    assert all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


# --- the observer, without any library ----------------------------------------------------------------------------


def loop(observer, epochs=3):
    torch.manual_seed(0)
    model = body()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True)
    step = 0
    if observer:
        observer.begin()
    for epoch in range(epochs):
        for x, y in loader:
            if observer:
                observer.see((x, y))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
            if observer and observer.is_ready():
                observer.examine(model, "start", step, epoch)
        if observer:
            observer.after_epoch(model, step, epoch + 1)
    if observer:
        observer.after_training(model, step, epochs)
    return model


def test_the_training_is_the_same_bit_for_bit():
    alone = loop(None)
    after = torch.get_rng_state()
    observer = Observer(every=1, start=True)
    model = loop(observer)
    assert torch.equal(torch.get_rng_state(), after)
    same(model, alone)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert [(c.moment, c.step, c.epoch) for c in observer.history] == [
        ("start", 6, 0), ("epoch", 8, 1), ("epoch", 16, 2), ("epoch", 24, 3),
    ]  # fmt: skip


def test_the_moments_can_be_chosen():
    observer = Observer(every=2, end=True)
    loop(observer)
    assert [(c.moment, c.epoch) for c in observer.history] == [("epoch", 2), ("end", 3)]
    observer = Observer(every=0)
    loop(observer)
    assert [(c.moment, c.step) for c in observer.history] == [("end", 24)]
    for wrong in ({"every": -1}, {"every": 0, "start": False, "end": False}):
        with pytest.raises(ArgumentError):
            Observer(**wrong)


def test_alarms_are_logged_and_handed_over(caplog):
    heard = []
    observer = Observer(on_report=lambda report, checkup: heard.append((report, checkup)))
    with caplog.at_level(logging.INFO, logger="normscope"):
        loop(observer, 1)
    assert "step 8, epoch 1: Report(Sequential:" in caplog.text
    assert heard[0][1] is observer.history[0]
    assert heard[0][0].record is observer.history[0].record


def test_a_check_that_fails_does_not_end_the_training(caplog):
    observer = Observer(options={"forward": lambda model, batch: 1 / 0})
    alone, model = loop(None, 2), loop(observer, 2)
    same(model, alone)
    assert not observer.history
    assert "could not be checked" in caplog.text
    quiet = Observer()
    quiet.examine(model, "end", 0, 0)
    assert "no batch has passed by" in caplog.text


def test_settings_of_the_project_hold(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.normscope]\nselect = ["NRM1"]\n')
    monkeypatch.chdir(tmp_path)
    observer = Observer(every=0)
    loop(observer, 1)
    assert {v.code[:4] for v in observer.history[0].record.verdicts} == {"NRM1"}


def test_what_is_kept_is_bounded():
    observer = Observer()
    observer.begin()
    for _ in range(2000):
        observer.see(torch.zeros(64, 4))
    assert len(observer._reader.kept) <= 97
    assert observer._reader.kept[-1].index > 1900


# --- Lightning ----------------------------------------------------------------------------------------------------


def lightning_fit(package, callbacks, tmp_path, epochs=2, broken=False):
    pl = pytest.importorskip(package)
    if hasattr(pl, "pytorch"):
        pl = pl.pytorch

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = body()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            if broken and self.global_step == 10:
                raise ZeroDivisionError
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, _):
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    torch.manual_seed(0)
    model = Module()
    loader = DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about workers and loggers
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, loader, DataLoader(TensorDataset(*data(64)), batch_size=32))
    return model, trainer, torch.get_rng_state()


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_lightning_trains_the_same(package, tmp_path):
    pytest.importorskip(package)
    from normscope.integrations.lightning import HealthCallback

    alone, first, state = lightning_fit(package, [], tmp_path)
    callback = HealthCallback(start=True, budget=20)
    model, trainer, after = lightning_fit(package, [callback], tmp_path)
    same(model, alone)
    assert torch.equal(after, state)
    assert trainer.callback_metrics["val_loss"] == first.callback_metrics["val_loss"]
    assert [(c.moment, c.step, c.epoch) for c in callback.history] == [
        ("start", 6, 0), ("epoch", 8, 1), ("epoch", 16, 2),
    ]  # fmt: skip
    assert callback.history[-1].record.scores  # labels were found: there is a price
    assert hooks(model) == 0


# --- transformers -------------------------------------------------------------------------------------------------


def trainer_fit(callbacks, tmp_path, broken=False):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = body(), 0

        def forward(self, pixels, labels=None):
            self.calls += 1
            if broken and self.calls == 10:
                raise ZeroDivisionError
            logits = self.net(pixels)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = Net()
    x, y = data()
    rows = [{"pixels": a, "labels": b} for a, b in zip(x, y, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=32, report_to=[], use_cpu=True,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=0.1, seed=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows, callbacks=callbacks)
        try:
            trainer.train()
        except ZeroDivisionError:
            assert broken
    return model, torch.get_rng_state(), trainer


def test_the_trainer_trains_the_same(tmp_path):
    pytest.importorskip("transformers")
    from normscope.integrations.transformers import HealthCallback

    alone, state, _ = trainer_fit([], tmp_path)
    callback = HealthCallback(start=True, budget=20)
    model, after, _ = trainer_fit([callback], tmp_path)
    same(model, alone)
    assert torch.equal(after, state)
    assert [(c.moment, c.step, c.epoch) for c in callback.history] == [
        ("start", 6, 0), ("epoch", 8, 1), ("epoch", 16, 2),
    ]  # fmt: skip
    assert callback.history[-1].record.scores  # the model's own loss
    assert hooks(model) == 0


def test_a_training_that_breaks_leaves_a_hook_that_the_next_one_takes_away(tmp_path):
    pytest.importorskip("transformers")
    from normscope.integrations.transformers import HealthCallback

    callback = HealthCallback(every=0)
    model, _, trainer = trainer_fit([callback], tmp_path, broken=True)
    assert hooks(model) == 1
    callback.on_train_begin(None, trainer.state, None, model=model)
    assert hooks(model) == 1
    callback.on_train_end(None, trainer.state, None, model=model)
    assert hooks(model) == 0


# --- two ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_every_rank_checks_its_own_copy_and_trains_the_same(library, tmp_path):
    pytest.importorskip(library)
    worker = Path(__file__).with_name("callbacks_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker]
    root = os.pathsep.join([str(Path(ns.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root}
    done = subprocess.run(
        [*command, library, tmp_path], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    for rank in told:
        assert rank["ranks"] == 2
        assert rank["watched"] == rank["alone"]  # weights, statistics and random numbers, bit for bit
        assert rank["moments"] == [["epoch", 8, 1], ["epoch", 16, 2]]
        assert set(rank["compared"]) <= {"pass", "warn", "fail"}  # both ranks came
        assert all(rank["scored"])
    if library == "lightning":  # in training mode one rank would wait for the other for good
        for rank in told:
            checks, messages = rank["synchronized"]
            assert checks == 0
            assert all("synchronized normalizers would wait" in text for text in messages)
            assert messages


def test_the_package_needs_neither():
    import normscope.integrations  # noqa: F401

    assert ns.check is not None
