"""What a model is made of, bit for bit: reach all of it, keep it, hash it, bring it back.

A model is more than its parameters: buffers, gradients, flags, hooks, the classes of its modules, the order of its
attributes, tensors and modules in plain lists, and the random generators that its dropout draws from. `reach` walks
over all of that once; `Snapshot` and `state_hash` are two uses of the walk. Objects of classes unknown to torch (a
meter, a trainer) are kept by reference and not looked into: the walk would leave the model.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
import pickle
import random
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

__all__ = ["Record", "Snapshot", "reach", "state_hash", "uninterrupted"]

# Dictionaries in which a module keeps its members: their names do not belong to a path.
REGISTRIES = ("_modules", "_parameters", "_buffers")
_CONTAINERS = (dict, list, tuple, set, collections.deque)
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def reach(model: Module) -> Iterator[tuple[str, Any]]:
    """Every module, tensor, container and generator that a model holds, once, with the first path that leads to it."""
    seen: dict[int, Any] = {}
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        path, thing = stack.pop()
        if id(thing) in seen or not isinstance(thing, (Module, Tensor, torch.Generator, *_CONTAINERS)):
            continue
        seen[id(thing)] = thing  # held, because an id is only unique among the living
        yield path, thing
        stack.extend(reversed(list(_inside(path, thing))))


def _inside(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, torch.jit.ScriptModule):  # its registries live in C++ and cannot be edited from here
        members = [thing.named_parameters("", False), thing.named_buffers("", False), thing.named_children()]
        yield from ((_join(path, name), member) for group in members for name, member in group)
    elif isinstance(thing, Module):
        yield path, vars(thing)
    elif isinstance(thing, Tensor):
        if thing.is_leaf:  # reading the gradient of other tensors warns
            yield _join(path, "grad"), thing.grad
        yield _join(path, "hooks"), thing._backward_hooks
        yield _join(path, "hooks"), getattr(thing, "_post_accumulate_grad_hooks", None)
        yield path, vars(thing)
    elif isinstance(thing, dict):
        yield from ((path if key in REGISTRIES else _join(path, key), value) for key, value in list(thing.items()))
    elif isinstance(thing, (list, tuple, collections.deque)):
        yield from ((_join(path, k), value) for k, value in enumerate(thing))


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


# --- keeping and bringing back ------------------------------------------------------------------------------------


class Record(Protocol):
    """One thing as it was."""

    path: str

    def changed(self) -> bool:
        """Whether it is otherwise now."""

    def restore(self) -> None:
        """Make it what it was."""


class Snapshot:
    """A model as it is now, to be brought back bit for bit.

    Restores parameters and buffers (data, dtype, device, identity), gradients, flags and every other attribute with
    its order, hooks (their handles stay valid), the classes and identity of modules, tensors and modules in plain
    containers, and the random generators of torch, NumPy and Python. As a context manager it restores on leaving,
    whatever happened. Costs a copy of the model's tensors.

    Args:
        model: The model.
        rng: Bring back the global random generators, too.

    Example:
        >>> import torch
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> with Snapshot(layer):
        ...     _ = layer(torch.randn(8, 2))
        >>> layer.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: Module, *, rng: bool = True) -> None:
        self._modes: _Modes | None = _Modes()
        self._rng = _Rng() if rng else None
        self._records: list[Record] = []
        memory: dict[int, _Memory] = {}
        for path, thing in reach(model):
            self._records.extend(_records(path, thing))
            if isinstance(thing, Tensor):
                for storage in _storages(thing):
                    memory.setdefault(storage._cdata, _Memory(path, storage))
        # Bytes come last: a tensor must look at its old memory again before that is filled.
        self._records.extend(memory.values())

    def watch(self, record: Record) -> None:
        """Bring back, too, something outside the model, such as an optimizer's lists of parameters."""
        self._records.append(record)

    def changed(self) -> tuple[str, ...]:
        """Paths of what is otherwise now than it was, generators aside."""
        return tuple(dict.fromkeys(record.path for record in self._records if record.changed()))

    def restore(self) -> None:
        """Bring everything back; an interrupt waits until that is done."""
        with uninterrupted():
            for record in self._records:
                if record.changed():
                    record.restore()
            if self._modes is not None:
                self._modes.restore()
            if self._rng is not None:
                self._rng.restore()

    def keep_changes(self) -> None:
        """Forget what is not changed now, so that `restore` takes back the changes made so far and nothing else.

        What happens to the rest of the model afterwards (training, new submodules) then survives `restore`.
        """
        self._modes = self._rng = None
        self._records = [record for record in self._records if record.changed()]
        for record in self._records:
            if isinstance(record, _Mapping):
                record.after = dict(record.thing)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _records(path: str, thing: Any) -> Iterator[Record]:
    if isinstance(thing, (Module, Tensor)):
        yield _Class(path, thing, type(thing))
    if isinstance(thing, torch.jit.ScriptModule):
        yield _Flag(path, thing, thing.training)
    elif isinstance(thing, Tensor):
        yield _Data(path, thing)
        yield _RequiresGrad(path, thing, thing.requires_grad)
        yield _TensorHooks(path, thing, thing._backward_hooks)
        if thing.is_leaf:  # reading the gradient of other tensors warns
            yield _Grad(path, thing, thing.grad)
    elif isinstance(thing, dict):
        yield _Mapping(path, thing, dict(thing))
    elif isinstance(thing, (list, set, collections.deque)):
        yield _Members(path, thing, list(thing))
    elif isinstance(thing, torch.Generator):
        yield _Generator(path, thing, thing.get_state())


@dataclass(slots=True)
class _Class:
    path: str
    thing: Any
    was: type

    def changed(self) -> bool:
        return type(self.thing) is not self.was

    def restore(self) -> None:
        self.thing.__class__ = self.was


@dataclass(slots=True)
class _Flag:
    path: str
    thing: torch.jit.ScriptModule
    was: bool

    def changed(self) -> bool:
        return bool(self.thing.training) != self.was

    def restore(self) -> None:
        self.thing.training = self.was


@dataclass(slots=True)
class _Mapping:
    """A dictionary, restored in place: handles of hooks and `__dict__` refer to the object itself."""

    path: str
    thing: dict[Any, Any]
    was: dict[Any, Any]
    after: dict[Any, Any] | None = None

    def changed(self) -> bool:
        return not _same_items(self.thing, self.was)

    def restore(self) -> None:
        if self.after is None or _same_items(self.thing, self.after):
            self.thing.clear()
            self.thing.update(self.was)
            return
        # Others have changed it since: take back single entries and leave theirs.
        for key in (*self.was, *self.after):
            if key not in self.was:
                self.thing.pop(key, None)
            elif key not in self.after or not _same(self.was[key], self.after[key]):
                self.thing[key] = self.was[key]


@dataclass(slots=True)
class _Members:
    path: str
    thing: list[Any] | set[Any] | collections.deque[Any]
    was: list[Any]

    def changed(self) -> bool:
        now = list(self.thing)
        if isinstance(self.thing, set):
            return self.thing != set(self.was)
        return len(now) != len(self.was) or not all(map(_same, now, self.was))

    def restore(self) -> None:
        self.thing.clear()
        if isinstance(self.thing, set):
            self.thing.update(self.was)
        else:
            self.thing.extend(self.was)


@dataclass(slots=True)
class _Generator:
    path: str
    thing: torch.Generator
    was: Tensor

    def changed(self) -> bool:
        return not torch.equal(self.thing.get_state(), self.was)

    def restore(self) -> None:
        self.thing.set_state(self.was)


class _Data:
    """Which memory a tensor looks at and how; the bytes themselves are kept by `_Memory`."""

    __slots__ = ("data", "layout", "path", "thing")

    def __init__(self, path: str, thing: Tensor) -> None:
        self.path, self.thing = path, thing
        self.data, self.layout = _data(thing), _layout(thing)

    def changed(self) -> bool:
        return _layout(self.thing) != self.layout

    def restore(self) -> None:
        grad = self.thing.grad if self.thing.is_leaf else None
        if grad is not None:
            self.thing.grad = None  # of another dtype or shape, it would refuse the data
        self.thing.data = self.data
        if grad is not None:
            _give_grad(self.thing, grad)


@dataclass(slots=True)
class _RequiresGrad:
    path: str
    thing: Tensor
    was: bool

    def changed(self) -> bool:
        return self.thing.requires_grad != self.was

    def restore(self) -> None:
        if self.thing.is_leaf:
            self.thing.requires_grad_(self.was)


@dataclass(slots=True)
class _Grad:
    path: str
    thing: Tensor
    was: Tensor | None

    def changed(self) -> bool:
        return self.thing.grad is not self.was

    def restore(self) -> None:
        if self.was is None:
            self.thing.grad = None
        else:
            _give_grad(self.thing, self.was)


def _give_grad(thing: Tensor, grad: Tensor) -> None:
    """A gradient must fit its tensor; whether that was so at the time of the snapshot, its own record settles later."""
    if grad.layout == torch.strided:
        grad.data = grad.data.to(thing.data) if grad.shape == thing.shape else torch.empty_like(thing.data)
    elif grad.dtype != thing.dtype or grad.device != thing.device:
        grad.data = grad.data.to(device=thing.device, dtype=thing.dtype)
    thing.grad = grad


@dataclass(slots=True)
class _TensorHooks:
    """Hooks of a tensor live in a dictionary that is made with the first of them."""

    path: str
    thing: Tensor
    was: dict[int, Any] | None

    def changed(self) -> bool:
        return self.thing._backward_hooks is not self.was

    def restore(self) -> None:
        self.thing._backward_hooks = self.was


class _Memory:
    """The bytes of a storage: one copy, however many tensors look at it, and NaN compares like any other number."""

    __slots__ = ("path", "storage", "was")

    def __init__(self, path: str, storage: torch.UntypedStorage) -> None:
        self.path, self.storage = path, storage
        self.was = _bytes(storage).clone()

    def changed(self) -> bool:
        return self.storage.nbytes() != self.was.numel() or not torch.equal(_bytes(self.storage), self.was)

    def restore(self) -> None:
        if self.storage.nbytes() != self.was.numel():
            self.storage.resize_(self.was.numel())
        _bytes(self.storage).copy_(self.was)


class _Modes:
    """Torch's global switches, which an interrupt between a context manager's last line and its exit leaves turned."""

    def __init__(self) -> None:
        self.gradients = torch.is_grad_enabled()
        self.functions = torch._C._len_torch_function_stack()
        self.stance = self._compiler("_stance")
        self.saving = _hooks_on_saved()

    def restore(self) -> None:
        torch.set_grad_enabled(self.gradients)
        while torch._C._len_torch_function_stack() > self.functions:
            torch._C._pop_torch_function_stack()
        if self._compiler("_stance") != self.stance:
            self._compiler("_set_stance")(self.stance or self._compiler("DynamoStance")())
        while (top := _hooks_on_saved()) is not None and top != self.saving:
            torch._C._autograd._pop_saved_tensors_default_hooks()

    @staticmethod
    def _compiler(name: str) -> Any:
        # torch.compiler.set_stance has no reader, and importing the compiler to find it untouched costs a second.
        return getattr(sys.modules.get("torch._dynamo.eval_frame"), name, None)


def _hooks_on_saved() -> Any:
    """The newest pair of hooks on what autograd saves; None without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Rng:
    """The global random generators."""

    def __init__(self) -> None:
        self.python, self.numpy, self.cpu = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def _same_items(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return list(a) == list(b) and all(_same(a[key], b[key]) for key in b)


def _same(a: Any, b: Any) -> bool:
    # Numbers by their spelling: NaN is itself, and 0.0 is not -0.0.
    return a is b or (type(a) is type(b) and isinstance(a, _SCALARS) and repr(a) == repr(b))


def _parts(t: Tensor) -> list[Tensor]:
    """The strided tensors behind a tensor."""
    if t.layout == torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    return [t] if t.layout == torch.strided else []


def _storages(t: Tensor) -> list[torch.UntypedStorage]:
    if t.device.type == "meta":
        return []
    try:
        return [part.untyped_storage() for part in _parts(_data(t))]
    except (NotImplementedError, RuntimeError):  # wrapper subclasses have no memory of their own
        return []


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _data(t: Tensor) -> Tensor:
    """The tensor's memory without its history; lazy parameters refuse most questions."""
    if not is_lazy(t):
        return t.data
    with torch._C.DisableTorchFunctionSubclass():
        return t.data.as_subclass(Tensor)


def _layout(t: Tensor) -> tuple[Any, ...]:
    data = _data(t)
    where = [(part.shape, part.stride(), part.storage_offset()) for part in _parts(data)]
    return data.dtype, data.device, tuple(where), tuple(storage._cdata for storage in _storages(data))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block has ended: half a restored model would be worse than a late interrupt."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])


# --- hashing ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Digest:
    hash: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, *facts: object) -> None:
        self.hash.update(repr(facts).encode())

    def tensor(self, t: Tensor) -> None:
        data = _data(t)
        self.add(t.dtype, t.device, t.requires_grad, tuple(data.shape), t.layout)
        if t.device.type == "meta" or not _storages(t):
            return
        for part in _parts(data):
            self.add(part.stride(), math.prod(part.shape))
            if not _backed(part):
                continue
            # A copy, because numpy() would leave the model's own storage unable to be resized, as sharding does.
            flat = part.resolve_conj().resolve_neg().contiguous().cpu().reshape(-1).clone()
            self.hash.update(flat.view(torch.uint8).numpy().tobytes())


def _backed(t: Tensor) -> bool:
    """Whether the memory is there: sharding and offloading shrink the storage under a living tensor."""
    if t.numel() == 0:
        return False
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def state_hash(model: Module, *, rng: bool = False) -> str:
    """A fingerprint of a model, bit for bit: equal before and after means that nothing was touched.

    Covers parameters, buffers and gradients (bits, dtype, layout), flags and every other attribute with its order,
    hooks, and the classes and identity of modules and tensors. Identities make it a comparison within one process; it
    says nothing about a model loaded elsewhere.

    Args:
        model: The model.
        rng: Include the global random generators.

    Example:
        >>> import torch
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> before = state_hash(layer)
        >>> _ = layer.eval()
        >>> state_hash(layer) == before
        False
    """
    digest = _Digest()
    for path, thing in reach(model):
        digest.add(path, id(type(thing)), 0 if isinstance(thing, (dict, tuple)) else id(thing))
        if isinstance(thing, torch.jit.ScriptModule):
            digest.add(thing.training)
        elif isinstance(thing, Tensor):
            digest.tensor(thing)
        elif isinstance(thing, torch.Generator):
            digest.tensor(thing.get_state())
        elif isinstance(thing, dict):
            digest.add(*((key if _plain(key) else id(key), _identity(value)) for key, value in thing.items()))
        elif isinstance(thing, set):
            digest.add(sorted(map(repr, map(_identity, thing))))
        elif not isinstance(thing, Module):
            digest.add(*map(_identity, thing))
    if rng:
        state = _Rng()
        digest.add(state.python, pickle.dumps(state.numpy))
        for generator in (state.cpu, *state.cuda):
            digest.tensor(generator)
    return str(digest.hash.hexdigest())


def _plain(value: object) -> TypeGuard[object]:
    return isinstance(value, _SCALARS)


def _identity(value: object) -> object:
    return (type(value).__name__, repr(value)) if _plain(value) else id(value)
