"""Data flows one way: the imports of every file, read from its syntax, against the rooms of the design."""

import ast
from pathlib import Path

import pytest

import normscope

PACKAGE = Path(normscope.__file__).parent

# room → rooms it may import. Third-party packages: None means any of the package's dependencies.
ROOMS = {
    "errors": set(),
    "records": set(),
    "scope": {"errors"},
    "oracle": {"scope"},
    "kernels": {"scope", "errors"},
    "functional": {"kernels", "scope", "errors"},
    "nn": {"functional", "kernels", "scope", "errors"},
    "parametrizations": {"functional", "errors"},
    "optim": {"nn", "errors"},
    "surgery": {"nn", "parametrizations", "functional", "kernels", "scope", "errors", "records"},
    "states": {"surgery", "nn", "functional", "kernels", "scope", "errors"},
    "statistics": set(),
    "doctor": {"surgery", "statistics", "nn", "functional", "kernels", "scope", "errors", "records", "report"},
    "data": {"records", "errors"},
    "report": {"records", "errors"},
    "integrations": {"doctor", "surgery", "records", "errors"},
    "bench": {"normscope", "statistics", "records", "errors"},
    "lab": {"normscope", "statistics", "data", "records", "errors"},
    "cli": {"normscope", "doctor", "surgery", "report", "bench", "lab", "data", "records", "errors"},
    "__main__": {"cli"},
}
THIRD_PARTY = {
    "errors": set(),
    "records": set(),
    "scope": set(),
    "oracle": {"numpy"},
    "kernels": {"torch", "triton"},
    "functional": {"torch"},
    "nn": {"torch"},
    "parametrizations": {"torch"},
    "optim": {"torch"},
    "surgery": {"torch", "numpy", "rich", "onnxruntime"},
    "states": {"torch", "numpy"},
    "statistics": {"numpy", "scipy"},
    "doctor": {"torch", "numpy", "tomli"},
    "data": {"numpy", "PIL"},
    "report": {"rich", "jinja2", "markupsafe", "matplotlib", "numpy"},
    "integrations": {"torch", "lightning", "pytorch_lightning", "transformers"},
    "bench": {"torch", "liger_kernel"},
    "lab": {"torch", "numpy", "ray"},
    "cli": {"click", "rich", "torch"},
    "__main__": set(),
}
STDLIB = set(__import__("sys").stdlib_module_names)


def imports(path):
    """(module, line) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            if node.module == "normscope":
                yield from ((f"normscope.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(path, room):
    for module, line in imports(path):
        top, *rest = module.split(".")
        if top == "normscope":
            target = rest[0] if rest else "normscope"
            if room == "lab" and not rest:
                continue
            if target != room and target not in ROOMS[room]:
                # `from normscope import name` of a public name counts as the public API
                if "normscope" in ROOMS[room] and target not in ROOMS and target in normscope.__all__:
                    continue
                yield f"{path.name}:{line}: {room} imports {module}"
        elif top not in STDLIB and top not in THIRD_PARTY[room]:
            yield f"{path.name}:{line}: {room} imports {top}"


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts != ("__init__.py",))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_above_it(path):
    room = room_of(path)
    assert room in ROOMS, f"{path} lies in no room of the design"
    assert not list(violations(path, room))


def test_a_forbidden_import_is_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\nfrom normscope.functional import batch_norm\n")
    assert len(list(violations(bad, "scope"))) == 2


def test_no_file_names_a_norm_in_the_kernels():
    names = ("batchnorm", "batch_norm", "layernorm", "layer_norm", "groupnorm", "group_norm", "instancenorm", "rmsnorm")
    for path in (PACKAGE / "kernels").rglob("*.py"):
        code = ast.unparse(ast.parse(path.read_text(encoding="utf-8"))).lower()
        assert not [name for name in names if name in code], path
