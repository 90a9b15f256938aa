"""What `test_doctor_ranks.py` runs on two ranks: torchrun --nproc-per-node 2 doctor_worker.py FOLDER."""

import datetime as dt
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import normscope as ns
from normscope.doctor import check, ranks
from normscope.surgery import state_hash


def model(mean):
    made = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    made[1].running_mean += mean
    return made.eval()


def loader():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 4, generator=generator) for _ in range(6)]


def verdict(one):
    before = state_hash(one, rng=True)
    found = check(one, loader())["NRM605"]
    assert state_hash(one, rng=True) == before
    return [found.status, list(found.layers), found.reason]


def times():
    """What is said about synchronized normalizers, and whether they were timed."""
    one = nn.Sequential(nn.Linear(4, 8), ns.nn.SyncBatchNorm(8)).train()
    before = state_hash(one, rng=True)
    report = check(one, loader(), select="NRM8")
    assert state_hash(one, rng=True) == before
    costs = report.measurements.costs
    return [report["NRM804"].status, None if costs.synced is None else costs.synced.value, costs.problem]


def main():
    dist.init_process_group("gloo")
    rank, told = dist.get_rank(), {}
    torch.manual_seed(0)
    told["apart"] = verdict(model(0.5 * rank))
    told["alike"] = verdict(model(0.5))
    told["timed"] = times()
    ranks.PATIENCE = dt.timedelta(seconds=2)
    if rank == 0:
        told["alone"] = verdict(model(0.0))
        told["timed alone"] = times()
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
