"""A recipe in a process of its own, for `test_recipes.py`: forked from a server that has imported everything."""

import contextlib
import gc
import os
import sys
import time
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from normscope.cli import main
from normscope.lab.recipes import catalogue, engine, networks


@contextlib.contextmanager
def narrow():
    """The large networks with an eighth of their maps: a checkpoint of the whole ones is of 90 and 200 MB."""
    thin = {name: partial(getattr(networks, name), width=8) for name in ("ResNet50", "Detector")}
    table = [
        (name, one // 8, (a // 8, b // 8), (c // 8, d // 8), pool, last // 8)
        for name, one, (a, b), (c, d), pool, last in networks.INCEPTION
    ]
    with mock.patch.multiple(catalogue, **thin), mock.patch.object(networks, "INCEPTION", table):
        yield


def end_of_group(end=dist.destroy_process_group):
    """The group must not be left to a reducer to destroy: see `engine._Run.leave`."""
    assert not any(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
    end()


def run(words, environment, told, hold):
    """The command line, with its messages in a file.

    Args:
        words: After "normscope".
        environment: Variables to add.
        told: The file.
        hold: The step at which it waits to be killed; None to go through.
    """
    with told.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= environment
    torch.set_num_threads(1)
    if hold is not None:
        take = engine._Run.take

        def wait(self, step, x, y):
            if step >= hold:
                time.sleep(600)
            take(self, step, x, y)

        engine._Run.take = wait
    with narrow(), mock.patch.object(dist, "destroy_process_group", end_of_group):
        main(words)
