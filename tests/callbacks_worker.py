"""What `test_integrations.py` runs on two ranks: torchrun --nproc-per-node 2 callbacks_worker.py LIBRARY FOLDER."""

import hashlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normscope as ns

CENTRES = 2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def data(count=512):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (count,), generator=generator)
    return CENTRES[y] + torch.randn(count, 6, generator=generator), y


def body(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), norm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def digest(model):
    """Of weights, statistics and the generator behind them."""
    values = [*model.state_dict().values(), torch.get_rng_state()]
    return hashlib.sha256(b"".join(v.detach().contiguous().numpy().tobytes() for v in values)).hexdigest()


def lightning_fit(callbacks, folder, norm=nn.BatchNorm1d):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = body(norm)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Module()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True))
    return model


def trainer_fit(callbacks, folder):
    import transformers

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = body()

        def forward(self, pixels, labels=None):
            logits = self.net(pixels)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Net()
    rows = [{"pixels": a, "labels": b} for a, b in zip(*data(), strict=True)]
    options = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=32, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=0.1, seed=3, ddp_backend="gloo",
    )  # fmt: skip
    transformers.Trainer(model=model, args=options, train_dataset=rows, callbacks=callbacks).train()
    return model


def main():
    library, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    warnings.simplefilter("ignore")  # of the libraries, about workers and loggers
    if library == "lightning":
        from normscope.integrations.lightning import HealthCallback

        fit = lightning_fit
    else:
        from normscope.integrations.transformers import HealthCallback

        fit = trainer_fit
    logged = []
    logging.getLogger("normscope").addHandler(
        type("Kept", (logging.Handler,), {"emit": lambda _, r: logged.append(r)})()
    )
    alone = digest(fit([], folder))
    callback = HealthCallback(budget=30)
    watched = digest(fit([callback], folder))
    told = {
        "ranks": dist.get_world_size(),
        "alone": alone,
        "watched": watched,
        "moments": [(c.moment, c.step, c.epoch) for c in callback.history],
        "compared": [{v.code: v.status for v in c.record.verdicts}["NRM605"] for c in callback.history],
        "scored": [bool(c.record.scores) for c in callback.history],
    }
    if library == "lightning":
        logged.clear()
        silent = HealthCallback(budget=30)
        fit([silent], folder, ns.nn.SyncBatchNorm)
        told["synchronized"] = [len(silent.history), [record.getMessage() for record in logged]]
    (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
