"""Train a job under torchrun or alone, with checkpoints from which it goes on as if nothing had happened.

Whatever is random in a step follows from the seed, the step and the process alone: the order of the items, their crops,
dropout. So a checkpoint holds parameters, buffers, the optimizer's state and what was measured, and no generator.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import normscope as ns
from normscope.errors import ArgumentError, DataError
from normscope.lab.recipes.job import Draw, Items, Job

__all__ = ["CHECKPOINT", "RESULT", "Settings", "Stopped", "evaluate", "together", "train"]

CHECKPOINT, RESULT = "checkpoint.pt", "result.json"
OPTIMIZERS = ("sgd", "adam", "rmsprop")


class Stopped(Exception):  # noqa: N818  (no error: the run goes on when it is called again)
    """A signal asked to stop, and the checkpoint is written."""


class Settings:
    """How a job is run, apart from what it computes.

    Args:
        out: Folder of the checkpoint and the result.
        seed: Of weights, order and crops.
        every: Steps between checkpoints.
        report: Steps between evaluations.
        workers: Processes that read items; 0 for none.
        half: Autocast to bfloat16.
        weights: Folder of a finished run whose layers "features" a new run starts from.
    """

    def __init__(
        self, out: Path, *, seed: int = 0, every: int = 1000, report: int = 5000, workers: int = 0, half: bool = False,
        weights: Path | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("every", every), ("report", report)):
            if value < 1:
                raise ArgumentError(f"{name} must be at least 1, but got {value}")
        self.out, self.seed, self.every, self.report, self.workers = out, seed, every, report, workers
        self.half, self.weights = half, weights


def train(job: Job, name: str, data: Path, settings: Settings) -> dict[str, Any]:
    """Train from the checkpoint on, if there is one, to the end; returns what the result file holds.

    Args:
        job: What.
        name: Of the recipe and its arm.
        data: Folder with the parts "train" and "val".
        settings: How.

    Raises:
        DataError: The checkpoint is damaged, or of another job, seed or number of processes.
        Stopped: SIGTERM came; the checkpoint is of the step that it fell into.
    """
    with _group() as (rank, count, device), _terminating() as asked:
        run = _Run(job, name, job.training(data, job.edge), settings, rank, count, device)
        try:
            run.through(data, asked)
        finally:
            run.leave()
        return run.finish()


class _Run:
    def __init__(
        self, job: Job, name: str, items: Items, settings: Settings, rank: int, count: int, device: torch.device
    ) -> None:
        self.job, self.name, self.settings = job, name, settings
        self.rank, self.count, self.device = rank, count, device
        self.items = items
        torch.manual_seed(settings.seed)
        self.network = network = job.network(items.classes, job.edge).to(device)
        ids = [device.index] if device.type == "cuda" else None
        self.trained: nn.Module = DistributedDataParallel(network, device_ids=ids) if count > 1 else network
        self.optimizer = _optimizer(job, network)
        self.step, self.history = 0, list[dict[str, float]]()
        self.fingerprint = job.fingerprint(name, settings.seed, settings.half, count, len(items), items.classes)

    def through(self, data: Path, asked: Callable[[], bool]) -> None:
        """From where it is to the end, or to the step into which a signal falls."""
        self.rehearse()
        self.resume()
        steps, settings = self.job.schedule.steps, self.settings
        for step, (x, y) in zip(range(self.step, steps), self.batches(), strict=False):
            self.take(step, x, y)
            last = step + 1 == steps
            if last or (step + 1) % settings.report == 0:
                self.measure(data)
            stopping = _any(asked(), self.device)
            if last or stopping or (step + 1) % settings.every == 0:
                self.save()
            if stopping and not last:
                raise Stopped(f"{self.name} stopped at step {step + 1} of {steps}")

    def leave(self) -> None:
        """Let go of DDP while there is still the group.

        Its reducer holds the group too. Being the last to do so, it would end the group's threads with the interpreter
        locked, for which such a thread may wait: in one run of eighty a process hung at its end (torch 2.13, gloo).
        """
        self.trained = self.network

    def rehearse(self) -> None:
        """One step whose effects are undone.

        DDP arranges its buckets after the first step, and sums over many processes are rounded by the arrangement. So a
        resumed run starts arranged, as one that was never interrupted.
        """
        if self.count == 1:
            return
        kept = {key: value.clone() for key, value in self.network.state_dict().items()}
        pairs = [self.items[Draw(k % len(self.items), 0)] for k in range(2)]
        self._loss(*(torch.stack(part) for part in zip(*pairs, strict=True))).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()
        self.network.load_state_dict(kept)

    def resume(self) -> None:
        """From the checkpoint, if there is one."""
        path = self.settings.out / CHECKPOINT
        if not path.is_file():
            if self.settings.weights is not None:
                _start(self.network, self.settings.weights / CHECKPOINT)
            return
        kept = _read(path)
        if kept.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"{path} belongs to another recipe, data, seed, size, precision or number of processes",
                cure="take another folder, or the same options as before",
                found=kept.get("name"), asked=self.name,
            )  # fmt: skip
        self.network.load_state_dict(kept["network"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.step, self.history = kept["step"], kept["history"]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of every batch, from the present step on."""
        loader: DataLoader[Any] = DataLoader(
            self.items,  # type: ignore[arg-type]
            batch_sampler=_Order(
                len(self.items), self.job.schedule.batch, self.settings.seed, self.step, self.rank, self.count
            ),
            num_workers=self.settings.workers,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def take(self, step: int, x: Tensor, y: Tensor) -> None:
        """One step of the optimizer."""
        schedule = self.job.schedule
        torch.manual_seed(_mixed(self.settings.seed, step, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        self.trained.train()
        self.optimizer.zero_grad()
        self._loss(x, y).backward()  # type: ignore[no-untyped-call]
        if schedule.clip < float("inf"):
            nn.utils.clip_grad_norm_(self.network.parameters(), schedule.clip)
        self.optimizer.step()
        self.step = step + 1

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half):
            output = self.trained(x.to(self.device, non_blocking=True))
        return self.job.loss(output.float(), y.to(self.device, non_blocking=True))

    def measure(self, data: Path) -> None:
        """Scores on the items of the part "val", noted with the step."""
        if self.count > 1:  # running statistics are each process's own; those of the first are kept and judged
            for buffer in self.network.buffers():
                dist.broadcast(buffer, 0)
        items = self.job.testing(data, self.job.edge)
        found = evaluate(self.job, [self.network], items, self.device, self.settings.workers, self.rank, self.count)
        self.history.append({"step": float(self.step)} | found)

    def save(self) -> None:
        """The checkpoint, whole or not at all: written beside the old one and put in its place."""
        if self.rank == 0:
            state = {
                "fingerprint": self.fingerprint, "name": self.name, "step": self.step, "history": self.history,
                "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            }  # fmt: skip
            _replace(self.settings.out / CHECKPOINT, lambda path: torch.save(state, path))
        if self.count > 1:
            dist.barrier()

    def finish(self) -> dict[str, Any]:
        """Write the result."""
        result = {"name": self.name, "steps": self.step, "history": self.history}
        if self.rank == 0:
            text = json.dumps(result, indent=1) + "\n"
            _replace(self.settings.out / RESULT, lambda path: path.write_text(text, encoding="utf-8"))
        return result


class _Order:
    """Endless batches of draws, one process's share; every epoch in an order of its own."""

    def __init__(self, items: int, batch: int, seed: int, start: int, rank: int, count: int) -> None:
        if items < batch * count:
            raise DataError(
                f"{items} items to train on are fewer than one batch of {batch * count}", cure="a smaller batch"
            )
        self.items, self.batch, self.seed, self.start, self.rank, self.count = items, batch, seed, start, rank, count

    def __iter__(self) -> Iterator[list[Draw]]:
        whole = self.batch * self.count
        per_epoch = self.items // whole
        step = self.start
        while True:
            epoch = step // per_epoch
            order = torch.randperm(self.items, generator=torch.Generator().manual_seed(_mixed(self.seed, epoch)))
            for k in range(step % per_epoch, per_epoch):
                first = k * whole + self.rank * self.batch
                chosen: list[int] = order[first : first + self.batch].tolist()
                yield [Draw(index, _mixed(self.seed, epoch, index)) for index in chosen]
                step += 1


def evaluate(
    job: Job, networks: list[nn.Module], items: Items, device: torch.device, workers: int = 0, rank: int = 0,
    count: int = 1,
) -> dict[str, float]:  # fmt: skip
    """The mean of every score; several networks vote by the mean of their probabilities.

    Args:
        job: Whose scores.
        networks: One, or an ensemble.
        items: What to report on.
        device: Of the networks.
        workers: Processes that read items.
        rank: Which part of the items is this process's.
        count: How many processes share them.
    """
    loader: DataLoader[Any] = DataLoader(
        items,  # type: ignore[arg-type]
        batch_sampler=[
            [Draw(k, k) for k in range(first, min(first + job.size, len(items)))]
            for first in range(rank * job.size, len(items), count * job.size)
        ],
        num_workers=workers,
    )
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for x, y in loader:
            outputs = [network.eval()(x.to(device)).float() for network in networks]
            if len(networks) > 1:
                outputs = [torch.stack([output.softmax(1) for output in outputs]).mean(0).log()]
            for name, row in job.scores(outputs[0], y.to(device)).items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + row.double().sum()
    if count > 1:
        # Every process has the same scores to tell, also one that was left without items.
        names: list[Any] = [None] * count
        dist.all_gather_object(names, sorted(sums))
        for name in max(names, key=len):
            value = sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=device))
            dist.all_reduce(value)
    return {name: float(value / len(items)) for name, value in sorted(sums.items())}


def together(job: Job, checkpoints: list[Path], data: Path) -> dict[str, float]:
    """The scores of the networks of several checkpoints, which vote by the mean of their probabilities.

    Raises:
        DataError: a checkpoint is damaged, or of another network.
    """
    items = job.testing(data, job.edge)
    networks = [job.network(items.classes, job.edge) for _ in checkpoints]
    for network, path in zip(networks, checkpoints, strict=True):
        try:
            network.load_state_dict(_read(path)["network"])
        except RuntimeError as error:
            raise DataError(f"{path} holds another network", cure="name the folder of a run of this arm") from error
    return evaluate(job, networks, items, torch.device("cpu"))


def _read(path: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {name: kept[name] for name in ("fingerprint", "name", "step", "history", "network", "optimizer")}
    except Exception as error:  # whatever unpickling a damaged file raises
        raise DataError(f"{path} is no checkpoint, or damaged", cure="name another folder", reason=error) from error


def _start(network: nn.Module, path: Path) -> None:
    """Take over the layers called "features"; all of them must be there."""
    kept = {key: value for key, value in _read(path)["network"].items() if key.startswith("features.")}
    try:
        found = network.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise DataError(f"{path} holds features of another shape", cure="name another folder", reason=error) from error
    missing = [key for key in found.missing_keys if key.startswith("features.")]
    if missing or found.unexpected_keys:
        cure = "name the folder of a run with the same normalizer"
        raise DataError(f"{path} holds no features for this network", cure=cure, missing=missing[:3])


def _optimizer(job: Job, network: nn.Module) -> torch.optim.Optimizer:
    schedule = job.schedule
    groups = ns.optim.decay_groups(network, schedule.decay)
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, schedule.rate, momentum=0.9)
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups, schedule.rate)
    if schedule.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, schedule.rate, momentum=0.9)
    raise ArgumentError(f"there is no optimizer {schedule.optimizer!r}", cure=f"one of {', '.join(OPTIMIZERS)}")


@contextmanager
def _group() -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device; the group that torchrun's variables describe, if they are there."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # else two runs differ in the last bits
    if count == 1:
        yield 0, 1, device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), count, device
    finally:
        dist.destroy_process_group()


@contextmanager
def _terminating() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM has come; the handler of before comes back."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _any(here: bool, device: torch.device) -> bool:
    """Whether it is so in any process."""
    if not dist.is_initialized():
        return here
    flag = torch.tensor(float(here), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, the same everywhere."""
    mixed = 0
    for number in numbers:
        # The finalizer of splitmix64: near numbers give unrelated seeds.
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1  # torch takes 63 bits without surprises


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
