"""Whether embeddings that are compared with each other tell the batch in which they were normalized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from normscope import statistics
from normscope.doctor.cache import Batch, regroup
from normscope.doctor.measurements import Leak
from normscope.doctor.patient import Patient
from normscope.records import Interval

__all__ = ["LEAK", "leak"]

# The declared use for which this is measured.
LEAK = "contrastive-loss"
# Groups, as large as the loader's batches: of 16, one stranger in 16 is of one's own.
GROUPS = 16
FEWEST = 4


def leak(patient: Patient, batches: Sequence[Batch], seed: int) -> Leak:
    """Embed every sample twice, both times and only once with the same others, and look for its partner.

    The two embeddings of a sample are those that the model returns, a pair or two halves of one tensor. Groups are
    dealt at random, so that nothing but the statistics of its batch can bring an embedding nearer to its group.

    Args:
        patient: The model.
        batches: Of pairs, as for the loss.
        seed: Of the deals.
    """
    size = max((batch.size for batch in batches), default=0)
    whole = [batch for batch in batches if batch.size == size]
    if min(size, len(whole)) < FEWEST:
        return Leak(problem=f"{FEWEST} batches of {FEWEST} samples are needed, {len(whole)} of {size} are there")
    data = pytree.tree_map(lambda *t: torch.cat(t) if _of(t[0], size) else t[0], *(b.fresh() for b in whole))
    total = size * len(whole)
    rng = np.random.default_rng(seed)
    kept = rng.permutation(total)[: GROUPS * size]
    deals = [kept, rng.permutation(kept)]
    with patient.on_batches():
        used = tuple(f.name for f in patient.trackers if f.module.training)
        try:
            one, other = (_embedded(patient, data, total, deal.reshape(-1, size)) for deal in deals)
        except (ValueError, RuntimeError) as error:
            return Leak(problem=str(error).splitlines()[0])
    if one is None or other is None:
        return Leak(problem="forward must return two embeddings of every sample: a pair, or one after the other")
    row = np.empty(total, dtype=int)
    row[deals[1]] = np.arange(len(kept))
    same = torch.from_numpy(row[kept])
    return _judged(one, (other[0][same], other[1][same]), size, used)


def _of(t: Any, size: int) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == size


def _embedded(patient: Patient, data: Any, total: int, groups: Any) -> tuple[Tensor, Tensor] | None:
    """The two embeddings of the samples of all groups, of unit length, in the order of the groups."""
    pairs = []
    for group in groups:
        batch = Batch(0, regroup(data, total, group.tolist()), len(group))
        output, _ = patient.run(batch)
        found = [t.flatten(1) for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.dim() > 1]
        if found and found[0].shape[0] == 2 * len(group):
            found = list(found[0].chunk(2))
        if len(found) < 2 or any(t.shape != (len(group), found[0].shape[1]) for t in found[:2]):
            return None
        pairs.append(tuple(F.normalize(t.double(), dim=1) for t in found[:2]))
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


def _judged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], group: int, used: tuple[str, ...]) -> Leak:
    """From the embeddings of both deals, in one order of samples."""
    samples = len(one[0])
    own = torch.arange(samples) // group
    together = one[0] @ one[1].T
    apart = one[0] @ other[1].T
    hits = [(s.argmax(1) == torch.arange(samples)).double().cpu().numpy() for s in (together, apart)]
    gain = statistics.bootstrap_difference(*hits, level=0.99, resamples=2000, seed=0)
    strangers = together.masked_fill(torch.eye(samples, dtype=torch.bool, device=together.device), -2.0)
    betrayed = float((own[strangers.argmax(1).cpu()] == own).double().mean())
    points = Interval(100 * gain.value, 100 * gain.low, 100 * gain.high, "pp")
    return Leak(samples, betrayed, (group - 1) / (samples - 1), points, used)
