"""Recurrent layers against NumPy in float64, written from the papers' equations, one sequence step after another."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import normscope as ns

T, N, F, H = 6, 5, 3, 4
EPS = 1e-5
LENGTHS = (4, 6, 1, 3, 6)
KINDS = ("BatchNormLSTM", "LayerNormLSTM", "LayerNormGRU")


def build(kind, *args, **options):
    torch.manual_seed(0)
    if kind == "BatchNormLSTM":
        options = {"max_length": 8, **options}
    net = getattr(ns.nn, kind)(*args, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        for norm in net.children():  # as if trained: every step has statistics of its own
            if isinstance(norm, ns.nn.RecurrentBatchNorm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                norm.num_batches_tracked[:5] = 3
    return net


def sequences(seed=1, features=F):
    return torch.randn(T, N, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the twins ------------------------------------------------------------------------------------------------------


def σ(a):
    return 1 / (1 + np.exp(-a))


def layer_norm(a, α, β):
    return α * (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + EPS) + β


class Twin:
    """One direction of one layer: NumPy arrays of the parameters, and the equations."""

    def __init__(self, net, suffix):
        self.p = {n: t.detach().numpy() for n, t in net.state_dict().items() if n.split(".")[0].endswith(f"_{suffix}")}
        self.suffix, self.training, self.kind = suffix, net.training, type(net).__name__
        self.seen = {}

    def weight(self, name):
        return self.p[f"weight_{name}_{self.suffix}"]

    def norm(self, name, a, t, keep):
        get = {key: self.p.get(f"norm_{name}_{self.suffix}.{key}") for key in
               ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
        γ, β = get["weight"], 0 if get["bias"] is None else get["bias"]
        if self.kind != "BatchNormLSTM":
            return layer_norm(a, γ, β)
        if self.training:
            m = max(keep.sum(), 1)
            μ = a[keep].sum(0) / m
            v = ((a[keep] - μ) ** 2).sum(0) / m
            self.seen[name, t] = (keep.sum(), μ, v)
        else:
            row = min(t, int((get["num_batches_tracked"] > 0).sum()) - 1)
            μ, v = get["running_mean"][row], get["running_var"][row]
        return γ * (a - μ) / np.sqrt(v + EPS) + β

    def lstm(self, x, h, c, t, keep):
        """Cooijmans et al., eq. 6-8; Ba et al., eq. 20-22."""
        z = self.norm("hh", h @ self.weight("hh").T, t, keep) + self.norm("ih", x @ self.weight("ih").T, t, keep)
        i, f, g, o = np.split(z, 4, axis=-1)
        c = σ(f) * c + σ(i) * np.tanh(g)
        return σ(o) * np.tanh(self.norm("c", c, t, keep)), c

    def gru(self, x, h, t, keep):
        """Ba et al., supplementary material."""
        W, U, n = self.weight("ih"), self.weight("hh"), 2 * H
        gates = self.norm("hh", h @ U[:n].T, t, keep) + self.norm("ih", x @ W[:n].T, t, keep)
        r, z = np.split(σ(gates), 2, axis=-1)
        new = np.tanh(self.norm("in", x @ W[n:].T, t, keep) + r * self.norm("hn", h @ U[n:].T, t, keep))
        return ((1 - z) * h + z * new,)

    def run(self, x, lengths, states):
        """Every step over the samples that have it; x (T, N, F), each sequence from its own end if reversed."""
        lengths, out = np.asarray(lengths), np.zeros((len(x), x.shape[1], H))
        states = [s.copy() for s in states]
        backwards = self.suffix.endswith("reverse")
        for t in range(len(x)):
            keep = t < lengths
            at = lengths - 1 - t if backwards else np.full_like(lengths, t)
            rows = np.arange(len(lengths))
            step = x[np.where(keep, at, 0), rows]
            new = (self.gru if self.kind == "LayerNormGRU" else self.lstm)(step, *states, t, keep)
            for s, n in zip(states, new, strict=True):
                s[keep] = n[keep]
            out[at[keep], rows[keep]] = new[0][keep]
        return out, states


def twin(net, x, lengths=None, hx=None):
    x = x.numpy()
    lengths = [len(x)] * x.shape[1] if lengths is None else lengths
    count = 1 if type(net).__name__ == "LayerNormGRU" else 2
    directions = 2 if net.bidirectional else 1
    hx = np.zeros((count, net.num_layers * directions, x.shape[1], H)) if hx is None else hx
    last, k, runs = [], 0, {}
    for layer in range(net.num_layers):
        outs = []
        for suffix in (f"l{layer}", f"l{layer}_reverse")[:directions]:
            one = runs[suffix] = Twin(net, suffix)
            out, states = one.run(x, lengths, hx[:, k])
            outs.append(out)
            last.append(states)
            k += 1
        x = np.concatenate(outs, -1)
    return x, [np.stack(s) for s in zip(*last, strict=True)], runs


def states_of(last):
    return [last] if isinstance(last, torch.Tensor) else list(last)


def assert_close(mine, truth):
    np.testing.assert_allclose(mine.detach().numpy(), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layers", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_papers(kind, layers, ragged, training):
    net = build(kind, F, H, num_layers=layers[0], bidirectional=layers[1]).train(training)
    x = sequences()
    directions = layers[0] * (1 + layers[1])
    hx = np.random.default_rng(3).normal(size=(1 if kind == "LayerNormGRU" else 2, directions, N, H))
    given = tuple(torch.from_numpy(s) for s in hx)
    lengths = torch.tensor(LENGTHS) if ragged else None
    # Padding must not matter, not even NaN. (The states of padded samples are finite only because nothing reads it.)
    outputs_truth, last_truth, runs = twin(net, x, LENGTHS if ragged else None, hx)
    outputs, last = net(x, given[0] if len(given) == 1 else given, lengths=lengths)
    assert_close(outputs, outputs_truth)
    for mine, truth in zip(states_of(last), last_truth, strict=True):
        assert_close(mine, truth)
    if kind == "BatchNormLSTM" and training:
        before = build(kind, F, H, num_layers=layers[0], bidirectional=layers[1])
        for suffix, one in runs.items():
            for (name, t), (m, μ, v) in one.seen.items():
                norm, old = (n.get_submodule(f"norm_{name}_{suffix}") for n in (net, before))
                if m > 0:
                    assert_close(norm.running_mean[t], 0.9 * old.running_mean[t].numpy() + 0.1 * μ)
                if m > 1:
                    assert_close(norm.running_var[t], 0.9 * old.running_var[t].numpy() + 0.1 * v * m / (m - 1))
                assert norm.num_batches_tracked[t] == old.num_batches_tracked[t] + (m > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_padded_and_batch_first_are_one(kind):
    nets = [build(kind, F, H, num_layers=2, bidirectional=True, batch_first=k == 1) for k in range(3)]
    x, lengths = sequences(), torch.tensor(LENGTHS)
    hx = torch.randn(4, N, H, dtype=torch.float64)
    given = hx if kind == "LayerNormGRU" else (hx, hx * 2)
    gy = sequences(2, 2 * H)
    results = []
    for k, net in enumerate(nets):
        inputs = x.clone().requires_grad_()
        if k == 0:
            outputs, last = net(inputs, given, lengths=lengths)
        elif k == 1:
            outputs, last = net(inputs.transpose(0, 1), given, lengths=lengths)
            outputs = outputs.transpose(0, 1)
        else:
            packed = pack_padded_sequence(inputs, lengths, enforce_sorted=False)
            outputs, last = net(packed, given)
            assert torch.equal(outputs.batch_sizes, packed.batch_sizes)
            outputs, long = pad_packed_sequence(outputs)
            assert torch.equal(long, lengths)
        outputs.backward(gy)
        results.append([outputs, *states_of(last), inputs.grad, *(p.grad for p in net.parameters())])
    for mine in results[1:]:
        for a, b in zip(mine, results[0], strict=True):
            assert_close(a, b.detach().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(kind):
    net, lengths = build(kind, F, H, bidirectional=True), torch.tensor(LENGTHS)
    x = sequences()
    spoiled = x.clone()
    spoiled[torch.arange(T)[:, None] >= lengths] = 7e5
    mine, truth = copy.deepcopy(net)(spoiled, lengths=lengths)[0], copy.deepcopy(net)(x, lengths=lengths)[0]
    assert torch.equal(mine, truth)
    assert (mine[torch.arange(T)[:, None] >= lengths] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    net = build(kind, F, H, num_layers=2)
    x, lengths = sequences()[:3, :4].clone().requires_grad_(), torch.tensor([3, 1, 2, 3])

    def run(x, *parameters):
        names = [name for name, _ in net.named_parameters()]
        outputs, last = torch.func.functional_call(
            copy.deepcopy(net), dict(zip(names, parameters, strict=True)), (x,), {"lengths": lengths}
        )
        return outputs, *states_of(last)

    assert torch.autograd.gradcheck(run, (x, *net.parameters()), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_interface_is_torchs(kind):
    peer = nn.GRU if kind == "LayerNormGRU" else nn.LSTM
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}
    net, torchs = build(kind, F, H, **options), peer(F, H, **options).double()
    x = sequences().transpose(0, 1)
    mine, theirs = net(x), torchs(x)
    assert mine[0].shape == theirs[0].shape
    assert [s.shape for s in states_of(mine[1])] == [s.shape for s in states_of(theirs[1])]
    shapes = {name: p.shape for name, p in torchs.named_parameters() if name.startswith("weight")}
    assert {name: p.shape for name, p in net.named_parameters() if name.startswith("weight")} == shapes
    assert str(net).startswith(f"{kind}(\n  {F}, {H}, num_layers=2") or f"{F}, {H}, num_layers=2" in repr(net)
    net.flatten_parameters()
    net.eval(), torchs.eval()
    mine, theirs = net(x[0]), torchs(x[0])
    assert mine[0].shape == theirs[0].shape
    assert [s.shape for s in states_of(mine[1])] == [s.shape for s in states_of(theirs[1])]
    assert_close(mine[0], net(x[:1])[0][0].detach().numpy())
    loaded = build(kind, F, H, **options).eval()
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(loaded(x)[0], net(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_between_layers(kind):
    net = build(kind, F, H, num_layers=2, dropout=1.0)
    x = sequences()
    with torch.no_grad():
        a, b = net(x)[0], net(x * 3 + 1)[0]
    assert torch.equal(a, b)  # the second layer sees zeros
    assert not torch.equal(net.eval()(x)[0], net(x * 3 + 1)[0])
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        build(kind, F, H, dropout=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind):
    net = build(kind, F, H)
    with pytest.raises(ns.ShapeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 2"):
        net(torch.zeros(T, N, 2, dtype=torch.float64))
    with pytest.raises(ns.ShapeError, match="Expected input to be 2D or 3D, got 4D"):
        net(torch.zeros(1, T, N, F, dtype=torch.float64))
    with pytest.raises(ns.ShapeError, match="Expected hidden size"):
        net(sequences(), torch.zeros(2, N, H))
    for lengths in ([1, 2], [1, 2, 3, 4, 9], [1, 2, 3, 4, -1]):
        with pytest.raises(ns.ShapeError, match="lengths"):
            net(sequences(), lengths=torch.tensor(lengths))
    with pytest.raises(ns.ArgumentError, match="packed"):
        net(pack_padded_sequence(sequences(), torch.full((N,), T)), lengths=torch.tensor(LENGTHS))
    with pytest.raises(ns.ArgumentError, match="dropout"):
        build(kind, F, H, dropout=2.0)
    with pytest.raises(ns.ArgumentError, match="greater than zero"):
        build(kind, F, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_half_precision(kind):
    """Products in bfloat16, of 8 bits, through 6 steps."""
    net, x = build(kind, F, H).float(), sequences().float()
    truth = copy.deepcopy(net)(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = copy.deepcopy(net)(x)[0]
        outputs.float().square().sum().backward()
    assert (outputs.float() - truth).abs().max() < 0.1
    assert net.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph_and_has_second_derivatives(kind):
    net, x = build(kind, F, H), sequences()[:3].requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(net), backend="eager", fullgraph=True)
    assert_close(compiled(x)[0], copy.deepcopy(net)(x)[0].detach().numpy())
    assert torch.autograd.gradgradcheck(lambda x: copy.deepcopy(net)(x)[0], (x,), fast_mode=True)


# --- RecurrentBatchNorm ---------------------------------------------------------------------------------------------


def test_recurrent_batch_norm_starts_at_a_tenth():
    layer = ns.nn.RecurrentBatchNorm(3, 4)
    assert torch.equal(layer.weight, torch.full((3,), 0.1))
    assert "max_length=4" in repr(layer)
    net = ns.nn.BatchNormLSTM(F, H, max_length=4)
    assert all(bool((norm.weight == 0.1).all()) for norm in net.children())
    with pytest.raises(ns.ArgumentError, match="max_length"):
        ns.nn.RecurrentBatchNorm(3, 0)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_steps_one_by_one_are_the_whole(momentum):
    whole = ns.nn.RecurrentBatchNorm(F, T, momentum=momentum, dtype=torch.float64)
    single = copy.deepcopy(whole)
    mask = torch.arange(T)[:, None] < torch.tensor(LENGTHS)
    for k in range(3):
        x = sequences(k)
        outputs = whole(x, mask=mask)
        steps = torch.stack([single(x[t], step=t, mask=mask[t]) for t in range(T)])
        assert_close(steps, outputs.detach().numpy())
    for mine, truth in zip(single.buffers(), whole.buffers(), strict=True):
        assert_close(mine, truth.numpy())
    if momentum is None:
        means = [sequences(k)[2][mask[2]].mean(0) for k in range(3)]
        assert_close(whole.running_mean[2], torch.stack(means).mean(0).numpy())


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_is_added_before_the_activation(training):
    plain = ns.nn.RecurrentBatchNorm(F, T, dtype=torch.float64).train(training)
    layer = ns.nn.RecurrentBatchNorm(F, T, activation="tanh", dtype=torch.float64).train(training)
    x, residual = sequences(), sequences(2)
    mask = torch.arange(T)[:, None] < torch.tensor(LENGTHS)
    expected = torch.where(mask[:, :, None], (plain(x, mask=mask) + residual).tanh(), 0)
    assert_close(layer(x, mask=mask, residual=residual), expected.detach().numpy())
    assert_close(layer(x[2], 2, mask[2], residual[2]), expected[2].detach().numpy())


def test_beyond_the_last_step_seen_its_statistics_repeat():
    layer = ns.nn.RecurrentBatchNorm(F, 5, dtype=torch.float64)
    layer(sequences()[:3])
    layer.eval()
    x = sequences(4)
    last = layer(x[0], step=2)
    for step in (3, 4, 9):
        assert torch.equal(layer(x[0], step=step), last)
    assert not torch.equal(layer(x[0], step=1), last)
    longer = layer(torch.cat([x, x]))
    assert torch.equal(longer[2], layer(x[2], step=2))
    # Training beyond max_length normalizes by the batch, and enters nothing.
    layer.train()
    before = [b.clone() for b in layer.buffers()]
    y = layer(x[0], step=7)
    assert_close(y.mean(0), np.zeros(F))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before, strict=True))


def test_one_sample_raises_in_training_and_not_where_masked():
    layer = ns.nn.RecurrentBatchNorm(F, 5, dtype=torch.float64)
    with pytest.raises(ns.ShapeError, match="Expected more than 1 value per channel when training"):
        layer(sequences()[:, :1])
    assert torch.equal(layer(sequences()[:, :1], mask=torch.ones(T, 1, dtype=torch.bool)), torch.zeros(T, 1, F))
    with pytest.raises(ns.ShapeError, match="expected 2D input with 3 features"):
        layer(sequences(), step=1)
    with pytest.raises(ns.ShapeError, match=r"layer: norm_ih_l0 \(RecurrentBatchNorm\)"):
        ns.nn.BatchNormLSTM(F, H, max_length=5)(torch.randn(T, 1, F))


def test_checkpointing_and_pausing():
    net = build("BatchNormLSTM", F, H)
    plain = copy.deepcopy(net)
    plain(sequences())
    checkpoint(lambda x: net(x)[0], sequences().requires_grad_(), use_reentrant=False).sum().backward()
    with ns.pause_statistics(net):
        net(sequences(5))
    for mine, truth in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_torchs_normalizers_serve_too(kind):
    net, x = build(kind, F, H, num_layers=2), sequences()
    truth = net(x)[0]
    assert ns.to_torch(net).changed
    assert not any(isinstance(norm, ns.nn.LayerNorm) for norm in net.modules())
    assert_close(net(x)[0], truth.detach().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind):
    """Remember the sign of the first step for T steps; chance is a loss of 0.69."""
    torch.manual_seed(0)
    options = {"max_length": T} if kind == "BatchNormLSTM" else {}
    net, head = getattr(ns.nn, kind)(1, 16, **options), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], 0.02)
    losses = []
    for _ in range(60):
        x = torch.randn(T, 64, 1)
        loss = nn.functional.binary_cross_entropy_with_logits(head(net(x)[0][-1]), (x[0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.35
