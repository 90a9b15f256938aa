"""Normalization in recurrent networks: per-time-step batch normalization, and LSTM and GRU with normalized terms.

Inside, sequences are (T, N, ·) with a mask (T, N) where they are ragged; a padded step changes no state, enters no
statistic and comes out 0.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normscope.errors import ArgumentError, ShapeError
from normscope.functional.core import Normalized, apply, check_dtype, view_of
from normscope.functional.running import recomputing, update_running
from normscope.kernels import COMPUTE_DTYPE
from normscope.kernels.formula import Formula
from normscope.nn.base import Layer, normalizes
from normscope.nn.normalization import LayerNorm

__all__ = ["BatchNormLSTM", "LayerNormGRU", "LayerNormLSTM", "RecurrentBatchNorm"]

State = tuple[Tensor, ...]


class RecurrentBatchNorm(Layer):
    """Batch normalization of sequences, with statistics of every time step of their own.

    y = activation(γ · (x − μ_t)/√(σ²_t + ε) + β), S = the samples at step t. In evaluation the running estimates of
    step t take the place of μ_t and σ²_t, and beyond the last step that training has seen, those of that step.

    Args:
        num_features: C.
        max_length: T_max, how many steps have statistics of their own; longer ones do not enter any.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C, the same for all steps.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        gain: γ at the beginning; at 1 the gradients of a tanh or σ behind it vanish.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input does not have C features, or one sample in training.

    Source: Cooijmans et al. 2016, "Recurrent Batch Normalization", §3 and §4.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.RecurrentBatchNorm(8, max_length=20)
        >>> layer(torch.randn(20, 5, 8)).shape, layer(torch.randn(5, 8), step=3).shape
        (torch.Size([20, 5, 8]), torch.Size([5, 8]))
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self,
        num_features: int,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        gain: float = 0.1,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        if max_length < 1:
            raise ArgumentError(
                f"max_length must be at least 1, but got {max_length}", cure="the usual sequence length"
            )
        self.num_features, self.max_length, self.eps = num_features, max_length, eps
        self.momentum, self.affine, self.gain = momentum, affine, gain
        self.set_activation(activation)
        factory = {"device": device, "dtype": dtype}
        self.weight = Parameter(torch.empty(num_features, **factory)) if affine else None
        self.bias = Parameter(torch.empty(num_features, **factory)) if affine and bias else None
        self.register_buffer("running_mean", torch.empty(max_length, num_features, **factory))
        self.register_buffer("running_var", torch.empty(max_length, num_features, **factory))
        self.register_buffer("num_batches_tracked", torch.empty(max_length, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = gain, β = 0, running mean 0 and variance 1, no batch seen."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, self.gain)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Running mean 0 and variance 1, no batch seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    @normalizes
    def forward(
        self,
        input: Tensor,  # noqa: A002
        step: int | None = None,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalize all steps, or one.

        Args:
            input: (T, N, C), steps 0 to T − 1; with a step (N, C).
            step: The number of the step, from 0.
            mask: True = keep; (T, N), with a step (N,).
            residual: Of input's shape, added before the activation.
        """
        check_dtype(input, "RecurrentBatchNorm")
        axes = 3 if step is None else 2
        if input.dim() != axes or input.shape[-1] != self.num_features:
            raise ShapeError(
                f"expected {axes}D input with {self.num_features} features, got input of shape {tuple(input.shape)}",
                cure=f"pass (T, N, {self.num_features}), or (N, {self.num_features}) with step=",
            )
        if step is None:
            return self._normalize(input, 0, mask, residual)
        mask, residual = (None if t is None else t.unsqueeze(0) for t in (mask, residual))
        return self._normalize(input.unsqueeze(0), step, mask, residual).squeeze(0)

    def _normalize(self, x: Tensor, first: int, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        view = view_of(x, "t [n] c", {}, "c")
        keep = view.mask(mask, (2,))
        formula = Formula(view.scope.inside, self.eps, activation=self.activation)
        normalized = functools.partial(
            apply, x, view, formula, weight=self.weight, bias=self.bias, residual=residual, mask=keep
        )
        if not self.training:
            row = self._rows(torch.arange(first, first + len(x), device=x.device))
            return normalized(mean=self.running_mean[row][:, None], var=self.running_var[row][:, None]).y
        if mask is None and x.shape[1] == 1:
            raise ShapeError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}",
                cure="use a larger batch, eval mode, or LayerNormLSTM",
            )
        done = normalized()
        self._track(x, done, first, keep)
        return done.y

    def _rows(self, steps: Tensor) -> Tensor:
        """The rows of the buffers that stand for these steps: their own up to the last one seen, and then that."""
        seen = (self.num_batches_tracked > 0).sum() - 1
        return torch.minimum(steps, seen.clamp(min=0))

    def _track(self, x: Tensor, done: Normalized, first: int, keep: Tensor | None) -> None:
        own = slice(first, min(first + len(x), self.max_length))
        length = own.stop - own.start
        if length < 1 or x.shape[1] == 0 or recomputing():
            return
        view = view_of(x[:length], "t [n] c", {}, "t c")
        mean, var = done.moments
        keep = None if keep is None else keep[:length]
        count = self.num_batches_tracked[own]
        momentum: float | Tensor | None = self.momentum
        if momentum is None:
            momentum = (count + 1)[:, None, None].to(COMPUTE_DTYPE[x.dtype]).reciprocal()
        running = (self.running_mean[own], self.running_var[own])
        update_running(running, (mean[:length], var[:length]), view, keep, momentum, Formula(view.inside, self.eps))
        count.add_(1 if keep is None else keep.any(dim=2).any(dim=1))

    def extra_repr(self) -> str:
        """The arguments."""
        shown = f"{self.num_features}, max_length={self.max_length}, eps={self.eps}, momentum={self.momentum}"
        shown += f", affine={self.affine}, bias={self.bias is not None}"
        return shown + (f", activation={self.activation!r}" if self.activation else "")


class _Sequences(NamedTuple):
    """A batch of sequences, (T, N, ·), longest first where it came packed.

    Attributes:
        data: (T, N, F).
        lengths: (N,), or None where all are T long.
        packed: The packed input it came from.
    """

    data: Tensor
    lengths: Tensor | None
    packed: PackedSequence | None

    @property
    def mask(self) -> Tensor | None:
        """(T, N), False in the padding."""
        if self.lengths is None:
            return None
        return torch.arange(len(self.data), device=self.data.device)[:, None] < self.lengths

    def turned(self, data: Tensor) -> Tensor:
        """Every sequence backwards, the padding where it was; its own inverse."""
        if self.lengths is None:
            return data.flip(0)
        steps = torch.arange(len(data), device=data.device)[:, None]
        source = torch.where(steps < self.lengths, self.lengths - 1 - steps, steps)
        return data.gather(0, source[:, :, None].expand_as(data))


class _Recurrent(Module):
    """Layers, directions, padding and packing, around a cell that a subclass describes.

    The arguments are torch's, without proj_size; weights have torch's names, shapes and initialization.
    """

    _gates: int
    _states: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ArgumentError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed",
                cure=f"it is {dropout}",
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout acts between layers, and there is one: non-zero dropout expects num_layers greater than 1, "
                f"but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=3,
            )
        if hidden_size < 1 or num_layers < 1:
            raise ArgumentError(
                "hidden_size and num_layers must be greater than zero", cure=f"got {hidden_size} and {num_layers}"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        factory = {"device": device, "dtype": dtype}
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                size = input_size if layer == 0 else hidden_size * (1 + bidirectional)
                rows = self._gates * hidden_size
                self.register_parameter(f"weight_ih_{suffix}", Parameter(torch.empty(rows, size, **factory)))
                self.register_parameter(f"weight_hh_{suffix}", Parameter(torch.empty(rows, hidden_size, **factory)))
                for name, norm in self._norms(factory).items():
                    self.add_module(f"norm_{name}_{suffix}", norm)
        self.reset_parameters()

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        return (f"l{layer}", f"l{layer}_reverse") if self.bidirectional else (f"l{layer}",)

    def _norms(self, factory: dict[str, Any]) -> dict[str, Module]:
        """The normalizers of one cell, by name."""
        raise NotImplementedError

    def _cell(self, suffix: str, x: Tensor, state: State, mask: Tensor | None) -> tuple[list[Tensor], State]:
        """Run one direction of one layer over (T, N, F); returns the outputs and the last state.

        What the padding's outputs are does not matter.
        """
        raise NotImplementedError

    def _norm(self, name: str, suffix: str) -> Callable[..., Tensor]:
        """One normalizer, as a function of the term, what is added to it, the step or None for all, and the mask."""
        norm = self.get_submodule(f"norm_{name}_{suffix}")
        if isinstance(norm, RecurrentBatchNorm):
            return lambda x, added, step, mask: norm(x, step, mask, added)
        if isinstance(norm, Layer):
            return lambda x, added=None, *_: norm(x, added)
        # One of torch's, after `ns.to_torch`.
        return lambda x, added=None, *_: norm(x) if added is None else norm(x) + added

    def reset_parameters(self) -> None:
        """Weights uniform in ±1/√hidden_size, as torch's; the normalizers as they begin."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight"):
                torch.nn.init.uniform_(parameter, -1 / math.sqrt(self.hidden_size), 1 / math.sqrt(self.hidden_size))
        for norm in self.children():
            norm.reset_parameters()  # type: ignore[operator]

    def flatten_parameters(self) -> None:
        """Nothing to do: the weights are used as they are."""

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: Tensor | State | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run all layers, as torch's module does.

        Args:
            input: (T, N, F), with batch_first (N, T, F), unbatched (T, F), or packed.
            hx: The first state, (num_layers · directions, N, hidden_size) each; zeros without it.
            lengths: (N,), of padded sequences that are not packed.
        """
        sequences, unbatched = self._read(input, lengths)
        states = self._first(hx, sequences, unbatched)
        outputs, last = self._layers(sequences, states)
        packed = sequences.packed
        if packed is not None:
            if packed.unsorted_indices is not None:
                last = tuple(s.index_select(1, packed.unsorted_indices) for s in last)
            # Lengths on the CPU, as packing wants them; sequences are sorted here.
            data = pack_padded_sequence(outputs, sequences.lengths.cpu()).data  # type: ignore[union-attr]
            result: Tensor | PackedSequence = PackedSequence(
                data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
            )
        elif unbatched:
            result, last = outputs[:, 0], tuple(s[:, 0] for s in last)
        else:
            result = outputs.transpose(0, 1) if self.batch_first else outputs
        return result, last[0] if self._states == 1 else last

    def _read(self, input: Tensor | PackedSequence, lengths: Tensor | None) -> tuple[_Sequences, bool]:  # noqa: A002
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ArgumentError("a packed input brings its lengths", cure="leave out lengths=")
            data, long = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes))
            return _Sequences(self._checked(data), long.to(data.device), input), False
        if input.dim() not in (2, 3):
            raise ShapeError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead",
                shape=tuple(input.shape),
                cure="pass (T, N, F), with batch_first (N, T, F), or unbatched (T, F)",
            )
        if input.dim() == 2:
            if lengths is not None:
                raise ArgumentError("an unbatched input is one sequence", cure="leave out lengths=")
            return _Sequences(self._checked(input[:, None]), None, None), True
        data = self._checked(input.transpose(0, 1) if self.batch_first else input)
        if lengths is not None:
            outside = lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > len(data))).any())
            if lengths.shape != data.shape[1:2] or outside:
                raise ShapeError(
                    f"lengths {lengths.tolist()} do not fit {data.shape[1]} sequences of {len(data)} steps",
                    cure="give one length per sequence, at most the padded one",
                )
            lengths = lengths.to(data.device)
            # NaN in the padding would reach the weights' gradient, as 0 · NaN.
            data = torch.where(_Sequences(data, lengths, None).mask[:, :, None], data, 0)  # type: ignore[index]
        return _Sequences(data, lengths, None), False

    def _checked(self, data: Tensor) -> Tensor:
        if data.shape[-1] != self.input_size:
            raise ShapeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.shape[-1]}",
                shape=tuple(data.shape),
                cure="the last axis holds the features",
            )
        return data

    def _first(self, hx: Tensor | State | None, sequences: _Sequences, unbatched: bool) -> State:
        x = sequences.data
        size = (self.num_layers * (1 + self.bidirectional), x.shape[1], self.hidden_size)
        if hx is None:
            return tuple(x.new_zeros(size) for _ in range(self._states))
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if unbatched:
            states = tuple(s.unsqueeze(1) for s in states)
        if len(states) != self._states or any(tuple(s.shape) != size for s in states):
            raise ShapeError(
                f"Expected hidden size {size}, got {[list(s.shape) for s in states]}",
                cure=f"pass {self._states} of it: (num_layers · directions, N, hidden_size)",
            )
        if sequences.packed is not None and sequences.packed.sorted_indices is not None:
            states = tuple(s.index_select(1, sequences.packed.sorted_indices) for s in states)
        return states

    def _layers(self, sequences: _Sequences, states: State) -> tuple[Tensor, State]:
        x, last, mask = sequences.data, [], sequences.mask
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = torch.nn.functional.dropout(x, self.dropout, self.training)
            directions = []
            for k, suffix in enumerate(self._suffixes(layer)):
                state = tuple(s[layer * (1 + self.bidirectional) + k] for s in states)
                outputs, state = self._cell(suffix, x if k == 0 else sequences.turned(x), state, mask)
                stacked = torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1], self.hidden_size)
                stacked = stacked if mask is None else torch.where(mask[:, :, None], stacked, 0)
                directions.append(stacked if k == 0 else sequences.turned(stacked))
                last.append(state)
            x = torch.cat(directions, dim=-1)
        return x, tuple(torch.stack(s) for s in zip(*last, strict=True))

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, as torch shows them."""
        shown = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        return shown + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)


class _LSTM(_Recurrent):
    """The cell of equations 6 to 8 (Cooijmans et al.) and 20 to 22 (Ba et al.); they differ in the normalizer."""

    _gates, _states = 4, 2

    def _cell(self, suffix: str, x: Tensor, state: State, mask: Tensor | None) -> tuple[list[Tensor], State]:
        weight = self.get_parameter(f"weight_hh_{suffix}")
        of_input, of_hidden, of_cell = (self._norm(name, suffix) for name in ("ih", "hh", "c"))
        inputs = of_input(linear(x, self.get_parameter(f"weight_ih_{suffix}")), None, None, mask)
        (h, c), outputs = state, []
        for t, (term, keep) in enumerate(_steps(inputs, mask)):
            i, f, g, o = of_hidden(linear(h, weight), term, t, keep).chunk(4, dim=-1)
            new_c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            new_h = o.sigmoid() * of_cell(new_c, None, t, keep).tanh()
            outputs.append(new_h)
            h, c = _kept(keep, new_h, h), _kept(keep, new_c, c)
        return outputs, (h, c)


def _steps(inputs: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Step by step; taken apart at once, for the gradient of inputs[t] is as large as that of all steps."""
    return zip(inputs.unbind(), itertools.repeat(None) if mask is None else mask.unbind(), strict=False)


def _kept(keep: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """The new rows where a sequence goes on, else the old ones."""
    return new if keep is None else torch.where(keep[:, None], new, old)


class BatchNormLSTM(_LSTM):
    """`torch.nn.LSTM` with batch normalization of its input term, its hidden term and its cell, step by step.

        (i, f, g, o) = BN(W_hh h; γ_h) + BN(W_ih x; γ_x, b),
        c' = σ(f)·c + σ(i)·tanh(g),   h' = σ(o)·tanh(BN(c'; γ_c, β_c))

    Args:
        input_size: Features of the input.
        hidden_size: Features of h and c.
        num_layers: Layers, each on the outputs of the one before.
        bias: Learn b and β_c.
        batch_first: Input and output are (N, T, ·).
        dropout: Between layers.
        bidirectional: A second pass from each sequence's end; its step t is the t-th from there.
        device: As in torch.
        dtype: As in torch.
        max_length: T_max of the statistics; see `RecurrentBatchNorm`.
        eps: ε.
        momentum: Of the running statistics.
        gain: γ at the beginning.

    Returns:
        Outputs and (h_n, c_n), as torch.nn.LSTM; packed in, packed out.

    Raises:
        ShapeError: Sizes that do not fit, or one sample in training.

    Source: Cooijmans et al. 2016, "Recurrent Batch Normalization", eq. 6-8.

    Example:
        >>> import torch, normscope as ns
        >>> lstm = ns.nn.BatchNormLSTM(3, 4, max_length=10)
        >>> outputs, (h, c) = lstm(torch.randn(10, 8, 3))
        >>> outputs.shape, h.shape
        (torch.Size([10, 8, 4]), torch.Size([1, 8, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gain: float = 0.1,
    ) -> None:
        # Before super().__init__, which builds the normalizers.
        self._options: dict[str, Any] = {"max_length": max_length, "eps": eps, "momentum": momentum, "gain": gain}
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        )  # fmt: skip

    def _norms(self, factory: dict[str, Any]) -> dict[str, Module]:
        sizes = {"ih": (4, self.bias), "hh": (4, False), "c": (1, self.bias)}
        return {
            name: RecurrentBatchNorm(k * self.hidden_size, bias=bias, **self._options, **factory)
            for name, (k, bias) in sizes.items()
        }


class _LayerNormed(_Recurrent):
    """Normalizers over the features, the same for all steps."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        eps: float = 1e-5,
    ) -> None:
        self.eps = eps  # before super().__init__, which builds the normalizers
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        )  # fmt: skip

    def _layer_norms(self, factory: dict[str, Any], **sizes: tuple[int, bool]) -> dict[str, Module]:
        return {
            name: LayerNorm(k * self.hidden_size, self.eps, bias=bias, **factory) for name, (k, bias) in sizes.items()
        }


class LayerNormLSTM(_LayerNormed, _LSTM):
    """`torch.nn.LSTM` with layer normalization of its input term, its hidden term and its cell.

        (i, f, g, o) = LN(W_hh h; α_h) + LN(W_ih x; α_x, b),
        c' = σ(f)·c + σ(i)·tanh(g),   h' = σ(o)·tanh(LN(c'; α_c, β_c))

    The paper's β_h, β_x and b are one sum, which is kept as one parameter.

    Args:
        input_size: Features of the input.
        hidden_size: Features of h and c.
        num_layers: Layers, each on the outputs of the one before.
        bias: Learn b and β_c.
        batch_first: Input and output are (N, T, ·).
        dropout: Between layers.
        bidirectional: A second pass from each sequence's end.
        device: As in torch.
        dtype: As in torch.
        eps: ε.

    Returns:
        Outputs and (h_n, c_n), as torch.nn.LSTM; packed in, packed out.

    Raises:
        ShapeError: Sizes that do not fit.

    Source: Ba et al. 2016, "Layer Normalization", eq. 20-22.

    Example:
        >>> import torch, normscope as ns
        >>> outputs, (h, c) = ns.nn.LayerNormLSTM(3, 4, num_layers=2)(torch.randn(10, 8, 3))
        >>> outputs.shape, h.shape
        (torch.Size([10, 8, 4]), torch.Size([2, 8, 4]))
    """

    def _norms(self, factory: dict[str, Any]) -> dict[str, Module]:
        return self._layer_norms(factory, ih=(4, self.bias), hh=(4, False), c=(1, self.bias))


class LayerNormGRU(_LayerNormed):
    """`torch.nn.GRU` with layer normalization of its input and hidden terms.

        (r, z) = LN(W_hh h; α₁) + LN(W_ih x; α₂, β₂),   n = tanh(LN(W_in x; α₃, β₃) + σ(r)·LN(W_hn h; α₄, β₄)),
        h' = (1 − σ(z))·h + σ(z)·n

    The weights hold r, z, n in torch's order; z is the paper's, 1 − z torch's.

    Args:
        input_size: Features of the input.
        hidden_size: Features of h.
        num_layers: Layers, each on the outputs of the one before.
        bias: Learn the β.
        batch_first: Input and output are (N, T, ·).
        dropout: Between layers.
        bidirectional: A second pass from each sequence's end.
        device: As in torch.
        dtype: As in torch.
        eps: ε.

    Returns:
        Outputs and h_n, as torch.nn.GRU; packed in, packed out.

    Raises:
        ShapeError: Sizes that do not fit.

    Source: Ba et al. 2016, "Layer Normalization", supplementary material (GRU).

    Example:
        >>> import torch, normscope as ns
        >>> outputs, h = ns.nn.LayerNormGRU(3, 4, bidirectional=True)(torch.randn(10, 8, 3))
        >>> outputs.shape, h.shape
        (torch.Size([10, 8, 8]), torch.Size([2, 8, 4]))
    """

    _gates, _states = 3, 1

    def _norms(self, factory: dict[str, Any]) -> dict[str, Module]:
        return self._layer_norms(factory, ih=(2, self.bias), hh=(2, False), hn=(1, self.bias), **{"in": (1, self.bias)})

    def _cell(self, suffix: str, x: Tensor, state: State, mask: Tensor | None) -> tuple[list[Tensor], State]:
        of_gates, of_new, of_hidden_gates, of_hidden_new = (
            self._norm(name, suffix) for name in ("ih", "in", "hh", "hn")
        )
        # The weights are cut, not the products: the normalizers' kernels take whole rows.
        (w_gates, w_new), (u_gates, u_new) = (
            torch.split(self.get_parameter(f"weight_{name}_{suffix}"), [2 * self.hidden_size, self.hidden_size])
            for name in ("ih", "hh")
        )
        gates, new = of_gates(linear(x, w_gates)), of_new(linear(x, w_new))
        (h,), outputs = state, []
        for (term, keep), new_term in zip(_steps(gates, mask), new.unbind(), strict=True):
            r, z = of_hidden_gates(linear(h, u_gates), term).sigmoid().chunk(2, dim=-1)
            n = torch.addcmul(new_term, r, of_hidden_new(linear(h, u_new))).tanh()
            new_h = torch.addcmul(h, z, n - h)
            outputs.append(new_h)
            h = _kept(keep, new_h, h)
        return outputs, (h,)
