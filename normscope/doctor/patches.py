"""Remedies that only the user can apply, as a patch of the user's own file: found through inspect, never applied.

A patch is a unified diff of the file in which a layer is built or called, or a function that was passed is defined.
What cannot be found or would not be exact is not guessed: the remedy then keeps its general advice, with the reason.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import linecache
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from normscope.doctor.measurements import Measurements
from normscope.records import Finding, Remedy

__all__ = ["Source", "patched"]

_INDENT = "    "


class NoPatchError(Exception):
    """Why there is none; never leaves this file."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where the user's code may be.

    Attributes:
        model: The model.
        functions: The user's callables by name; None for those that were not passed.
        measurements: Shapes and names of the calls.
    """

    model: Module
    functions: dict[str, Any]
    measurements: Measurements


def patched(findings: Iterable[Finding], source: Source) -> tuple[Finding, ...]:
    """The same findings, whose remedies for the user's code are patches where that can be done."""
    return tuple(replace(f, remedies=tuple(_with_patch(r, f, source) for r in f.remedies)) for f in findings)


def _with_patch(remedy: Remedy, finding: Finding, source: Source) -> Remedy:
    make = _PATCHES.get(remedy.code)
    if make is None or remedy.safety != "S3":
        return remedy
    try:
        edits = make(finding, source)
        return replace(remedy, command="\n".join(_diff(edits)))
    except NoPatchError as error:
        why = str(error)
    except (OSError, TypeError, SyntaxError, UnicodeError, AttributeError, LookupError) as error:
        why = f"the source cannot be read: {error}".splitlines()[0]
    return replace(remedy, command=f"{remedy.command}\n# no patch: {why}")


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _File:
    """One file of the user's, as text and as a tree."""

    path: str
    text: bytes
    tree: ast.Module
    starts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, thing: Any) -> _File:
        """The file of a function or method."""
        path = inspect.getsourcefile(thing)
        if path is None:
            raise NoPatchError("the source cannot be had: the code has no file")
        lines = linecache.getlines(path)
        if not lines:
            raise NoPatchError(f"the source cannot be had: {path} cannot be read")
        if _installed(path):
            raise NoPatchError(f"{Path(path).name} belongs to an installed package, not to you")
        text = "".join(lines)
        file = cls(path, text.encode(), ast.parse(text))
        ends = [len(line.encode()) for line in lines]
        file.starts = [sum(ends[:k]) for k in range(len(ends) + 1)]
        return file

    def at(self, line: int, column: int = 0) -> int:
        """The place of a line (from 1) and column in the text."""
        return self.starts[line - 1] + column

    def span(self, node: Any) -> tuple[int, int]:
        """Where an expression or statement begins and ends."""
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def source(self, node: Any) -> str:
        """Its text."""
        begin, end = self.span(node)
        return self.text[begin:end].decode()


@dataclass(frozen=True, slots=True)
class _Edit:
    """What takes the place of a piece of a file."""

    file: _File
    begin: int
    end: int
    text: str


def _installed(path: str) -> bool:
    places = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")]
    places += [Path(torch.__file__).parent, Path(__file__).parents[1]]  # wherever these two are run from
    return any(Path(path).resolve().is_relative_to(place.resolve()) for place in places)


def _diff(edits: Sequence[_Edit]) -> Iterator[str]:
    """The unified diff of all edits, file by file."""
    if not edits:
        raise NoPatchError("the code that this is about was not found")
    for path in dict.fromkeys(edit.file.path for edit in edits):
        # A class that is used twice is edited once.
        mine = list({(e.begin, e.end, e.text): e for e in edits if e.file.path == path}.values())
        text = whole = mine[0].file.text
        after = len(whole)
        mine.reverse()  # what goes to one place keeps its order, as the last one is put in first
        for edit in sorted(mine, key=lambda e: -e.begin):
            if edit.end > after:
                raise NoPatchError("one piece of code builds layers that need different ones")
            text = text[: edit.begin] + edit.text.encode() + text[edit.end :]
            after = edit.begin
        ast.parse(text)  # a patch that is no Python is none
        name = os.path.relpath(path)
        name = path if Path(name).parts[:2] == ("..", "..") else name
        old, new = (part.decode().removesuffix("\n").split("\n") for part in (whole, text))
        yield from difflib.unified_diff(old, new, name, name, n=2, lineterm="")


# --- finding the place ------------------------------------------------------------------------------------------------


def _body(function: Any) -> tuple[_File, ast.FunctionDef]:
    """The definition of a function or method."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(getattr(function, "__func__", None), "__code__", None)
    if code is None:
        raise NoPatchError("the source cannot be had: it is no Python function")
    file = _File.of(code)
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
            continue
        if code.co_firstlineno in (node.lineno, *(d.lineno for d in node.decorator_list)):
            return file, node
    raise NoPatchError(f"{code.co_name} is not defined by def")


def _callable(source: Source, name: str) -> tuple[_File, ast.FunctionDef]:
    function = source.functions.get(name)
    if function is None:
        raise NoPatchError(f"{name}= was not passed")
    return _body(function)


def _owner(source: Source, path: str) -> tuple[Module, str]:
    """The module that holds a layer, and under which name."""
    parent, _, own = path.rpartition(".")
    if not own:
        raise NoPatchError("the layer is the model itself")
    return source.model.get_submodule(parent), own


def _built(source: Source, path: str) -> tuple[_File, ast.Call]:
    """The call that builds a layer, in the __init__ of the module that holds it."""
    owner, own = _owner(source, path)
    place: list[int] = []
    while own.isdigit():  # an entry of a Sequential, which somebody else has built
        place.insert(0, int(own))
        path = path.rpartition(".")[0]
        if not path:
            raise NoPatchError("the model is a Sequential, and where that is built is not known")
        owner, own = _owner(source, path)
    file, init = _body(type(owner).__init__)
    found = [
        node.value
        for node in ast.walk(init)
        if isinstance(node, ast.Assign) and any(_is_self(target, own) for target in node.targets)
    ]
    if len(found) != 1:
        raise NoPatchError(f"self.{own} is not assigned once in __init__ of {type(owner).__name__}")
    value: Any = found[0]
    for k in place:
        entries = value.args if isinstance(value, ast.Call) else []
        if len(entries) == 1 and isinstance(entries[0], ast.List):
            entries = entries[0].elts
        if k >= len(entries) or any(isinstance(entry, ast.Starred) for entry in entries):
            raise NoPatchError(f"the entries of self.{own} are not written out in {type(owner).__name__}")
        value = entries[k]
    if not isinstance(value, ast.Call):
        raise NoPatchError(f"self.{own} is not built in {type(owner).__name__}, but handed to it")
    return file, value


def _called(source: Source, path: str, attribute: str = "") -> list[tuple[_File, ast.Call]]:
    """The calls of a layer, or of one of its methods, in the forward of the module that holds it."""
    owner, own = _owner(source, path)
    file, forward = _body(type(owner).forward)

    def fits(function: ast.expr) -> bool:
        if attribute:
            return isinstance(function, ast.Attribute) and function.attr == attribute and _is_self(function.value, own)
        return _is_self(function, own)

    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and fits(node.func)]
    if not calls:
        raise NoPatchError(f"forward of {type(owner).__name__} does not call self.{own} by name")
    return [(file, call) for call in calls]


def _is_self(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _files(source: Source) -> list[_File]:
    """The files of the model's classes and of the user's functions."""
    files: dict[str, _File] = {}
    things: list[Any] = [type(module).forward for module in source.model.modules()]
    things += [inspect.unwrap(f) for f in source.functions.values() if callable(f)]
    for thing in dict.fromkeys(things):
        try:
            file = _File.of(getattr(thing, "__code__", thing))
        except (NoPatchError, OSError, TypeError, SyntaxError):
            continue
        files.setdefault(file.path, file)
    if not files:
        raise NoPatchError("the source cannot be had: none of the code that was passed has a file of yours")
    return list(files.values())


def _only_call(source: Source, names: Sequence[str], fits: Callable[[ast.Call], bool] = bool) -> Any:
    """The one call of a function of these names in the user's files."""
    found = [
        (file, node)
        for file in _files(source)
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call) and _last(node.func) in names and fits(node)
    ]
    if len(found) != 1:
        told = "no call" if not found else f"{len(found)} calls"
        raise NoPatchError(f"{told} of {' or '.join(names)} in the files of your model and functions")
    return found[0]


def _last(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


# --- edits ------------------------------------------------------------------------------------------------------------


def _instead(file: _File, node: Any, text: str) -> _Edit:
    return _Edit(file, *file.span(node), text)


def _keyword(file: _File, call: ast.Call, name: str, value: str) -> _Edit:
    """A keyword of a call, added or changed."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return _instead(file, keyword.value, value)
    if any(keyword.arg is None for keyword in call.keywords):
        raise NoPatchError(f"{name}= may be among the keywords that are handed on with **")
    last: Any = max([*call.args, *(k.value for k in call.keywords)], key=lambda n: file.span(n)[1], default=None)
    end = file.span(call)[1] - 1 if last is None else file.span(last)[1]
    return _Edit(file, end, end, f"{', ' if last is not None else ''}{name}={value}")


def _first_lines(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a function behind its docstring."""
    documented = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if documented else function.body
    if not body or body[0].lineno == function.lineno:
        raise NoPatchError(f"{function.name} is written in one line")
    return body


def _before(file: _File, statement: ast.stmt, lines: Sequence[str]) -> _Edit:
    place = file.at(statement.lineno)
    indent = " " * statement.col_offset
    return _Edit(file, place, place, "".join(f"{indent}{line}\n" for line in lines))


def _parameter(function: ast.FunctionDef) -> str:
    named = [a.arg for a in (*function.args.posonlyargs, *function.args.args) if a.arg != "self"]
    if not named:
        raise NoPatchError(f"{function.name} has no parameter for the model")
    return named[0]


# --- remedy by remedy -------------------------------------------------------------------------------------------------


def _eval_mode(finding: Finding, source: Source) -> list[_Edit]:
    """The body of evaluate or predict in evaluation mode, and the old mode afterwards."""
    if finding.code not in _EVALUATES:
        raise NoPatchError("which statement calls the reference network is not known")
    file, function = _callable(source, _EVALUATES[finding.code])
    body = _first_lines(function)
    model, indent = _parameter(function), " " * body[0].col_offset
    first, last = body[0].lineno, body[-1].end_lineno or body[-1].lineno
    strings = (
        n for n in ast.walk(function) if isinstance(n, (ast.Constant, ast.JoinedStr)) and n.end_lineno != n.lineno
    )
    if any(first <= node.lineno <= last for node in strings):
        raise NoPatchError(f"{function.name} holds text of several lines, which indenting would change")
    begin, end = file.at(first), file.at(last + 1) if last < len(file.starts) else len(file.text)
    lines = file.text[begin:end].decode().splitlines()
    made = [f"{indent}was = {model}.training", f"{indent}{model}.eval()", f"{indent}try:"]
    made += [_INDENT + line if line.strip() else line for line in lines]
    made += [f"{indent}finally:", f"{indent}{_INDENT}{model}.train(was)"]
    return [_Edit(file, begin, end, "\n".join(made) + "\n")]


_EVALUATES = {"NRM201": "predict", "NRM208": "evaluate"}


def _train_mode(_: Finding, source: Source) -> list[_Edit]:
    file, function = _callable(source, "train_step")
    return [_before(file, _first_lines(function)[0], [f"{_parameter(function)}.train()"])]


def _functional(_: Finding, source: Source) -> list[_Edit]:
    """F.batch_norm by the mode, with running statistics where there were none."""
    edits: list[_Edit] = []
    for where in dict.fromkeys(call.where for call in source.measurements.functional if call.batch):
        owner = source.model.get_submodule(where)
        file, forward = _body(type(owner).forward)
        for call in (n for n in ast.walk(forward) if isinstance(n, ast.Call) and _last(n.func) == "batch_norm"):
            edits += _by_mode(file, call, owner)
    return edits


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training")


def _by_mode(file: _File, call: ast.Call, owner: Module) -> Iterator[_Edit]:
    given: dict[Any, Any] = dict(zip(_BATCH_NORM, call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords}
    if "training" not in given:
        raise NoPatchError("the call takes its mode from elsewhere")
    yield _instead(file, given["training"], "self.training")
    without = [n for n in ("running_mean", "running_var") if _is_none(given.get(n))]
    if not without:
        return
    like = given.get("weight")
    if len(without) < 2 or like is None or not file.source(like).startswith("self."):
        raise NoPatchError("how many channels there are does not stand in the call")
    _, init = _body(type(owner).__init__)
    last, indent = init.body[-1], " " * init.body[-1].col_offset
    end = file.span(last)[1]
    for name, maker in (("running_mean", "zeros_like"), ("running_var", "ones_like")):
        yield _instead(file, given[name], f"self.{name}")
        text = f'\n{indent}self.register_buffer("{name}", torch.{maker}({file.source(like)}.detach()))'
        yield _Edit(file, end, end, text)


def _is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _loader(**keywords: str) -> Callable[[Finding, Source], list[_Edit]]:
    def make(_: Finding, source: Source) -> list[_Edit]:
        file, call = _only_call(source, ("DataLoader",))
        return [_keyword(file, call, name, value) for name, value in keywords.items()]

    return make


def _transpose(finding: Finding, source: Source) -> list[_Edit]:
    """The channels to axis 1 and back, and a normalizer of their number."""
    edits = []
    for name in finding.layers:
        site = next(s for s in source.measurements.sites if s.layer == name)
        channels = site.shape[site.axis] if site.axis is not None else 0
        file, built = _built(source, name)
        if not built.args or not channels:
            raise NoPatchError(f"the number of channels of {name} is not its first argument")
        edits.append(_instead(file, built.args[0], str(channels)))
        for where, call in _called(source, name):
            edits.append(_instead(where, call, _moved(where, call, site.axis or 1)))
    return edits


def _moved(file: _File, call: ast.Call, axis: int) -> str:
    if len(call.args) != 1 or call.keywords:
        raise NoPatchError("the normalizer is called with more than its input")
    x = file.source(call.args[0])
    x = x if isinstance(call.args[0], (ast.Name, ast.Attribute, ast.Call)) else f"({x})"
    return f"{file.source(call.func)}({x}.transpose(1, {axis})).transpose(1, {axis})"


def _identity(finding: Finding, source: Source) -> list[_Edit]:
    made = []
    for name in finding.layers:
        file, built = _built(source, name)
        prefix = file.source(built.func).rpartition(".")[0]
        if not prefix:
            raise NoPatchError(f"{name} is built by a bare name; its Identity would need an import")
        made.append(_instead(file, built, f"{prefix}.Identity()"))
    return made


def _fewer_groups(finding: Finding, source: Source) -> list[_Edit]:
    """GroupNorm with groups of 16 channels or as many as there are."""
    edits = []
    for name in finding.layers:
        layer: Any = source.model.get_submodule(name)
        if not isinstance(layer, torch.nn.GroupNorm):
            raise NoPatchError(f"which axis {name} should normalize is for you to say")
        file, built = _built(source, name)
        groups = next(g for g in range(max(1, layer.num_channels // 16), 0, -1) if layer.num_channels % g == 0)
        if built.args:
            edits.append(_instead(file, built.args[0], str(groups)))
        else:
            edits.append(_keyword(file, built, "num_groups", str(groups)))
    return edits


def _groups(_: Finding, source: Source) -> list[_Edit]:
    """decay_groups in place of all parameters."""

    def decays(call: ast.Call) -> bool:
        first = call.args[0] if call.args else None
        parameters = isinstance(first, ast.Call) and _last(first.func) == "parameters" and not first.args
        return parameters and any(k.arg == "weight_decay" for k in call.keywords)

    names = [name for name in dir(torch.optim) if name[:1].isupper()]
    file, call = _only_call(source, names, decays)
    decay = next(k for k in call.keywords if k.arg == "weight_decay")
    model = file.source(call.args[0].func.value)
    text = f"normscope.optim.decay_groups({model}, weight_decay={file.source(decay.value)})"
    return [_instead(file, call.args[0], text), *_import(file, "normscope")]


def _import(file: _File, name: str) -> Iterator[_Edit]:
    """An import of a module that is not imported yet, in front of the first one."""
    imports = [node for node in file.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = [node for node in imports if getattr(node, "module", "") != "__future__"]
    known = {alias.asname or alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    if name in known:
        return
    if not imports:
        raise NoPatchError(f"there is no place for an import of {name}")
    yield _before(file, imports[-1], [f"import {name}"])


def _calls(finding: Finding, source: Source) -> list[_Edit]:
    """The module in place of its forward method."""
    return [
        _instead(file, call.func, file.source(call.func).removesuffix(".forward"))
        for name in finding.layers
        for file, call in _called(source, name, "forward")
    ]


def _dropout(_: Finding, source: Source) -> list[_Edit]:
    """F.dropout by the mode."""
    edits, seen = [], set()
    for module in source.model.modules():
        forward = type(module).forward
        if forward in seen:
            continue
        seen.add(forward)
        try:
            file, body = _body(forward)
        except (NoPatchError, OSError, TypeError):
            continue
        for call in (n for n in ast.walk(body) if isinstance(n, ast.Call) and _last(n.func) == "dropout"):
            bare = len(call.args) < 3 and all(k.arg != "training" for k in call.keywords)
            if bare and isinstance(call.func, ast.Attribute) and not _is_self(call.func, "dropout"):
                edits.append(_keyword(file, call, "training", "self.training"))
    return edits


def _whole_state(_: Finding, source: Source) -> list[_Edit]:
    """state_dict in place of the parameters alone."""

    def parameters(call: ast.Call) -> bool:
        first = call.args[0] if len(call.args) == 1 else None
        return isinstance(first, ast.Call) and _last(first.func) == "named_parameters"

    file, call = _only_call(source, ("dict",), parameters)
    return [_instead(file, call, f"{file.source(call.args[0].func.value)}.state_dict()")]


def _with_buffers(_: Finding, source: Source) -> list[_Edit]:
    file, call = _only_call(source, ("AveragedModel",))
    return [_keyword(file, call, "use_buffers", "True")]


def _export(_: Finding, source: Source) -> list[_Edit]:
    file, call = _only_call(source, ("export",), lambda call: bool(call.args) and "torch" in ast.unparse(call.func))
    return [_instead(file, call.args[0], f"{file.source(call.args[0])}.eval()")]


_PATCHES: dict[str, Callable[[Finding, Source], list[_Edit]]] = {
    "eval-mode": _eval_mode,
    "train-mode": _train_mode,
    "functional-batch-norm": _functional,
    "drop-last": _loader(drop_last="True"),
    "shuffle": _loader(shuffle="True"),
    "transpose": _transpose,
    "remove-norm": _identity,
    "other-axis": _fewer_groups,
    "param-groups": _groups,
    "call-modules": _calls,
    "dropout": _dropout,
    "load-buffers": _whole_state,
    "fix-reference": _with_buffers,
    "export-eval": _export,
}
