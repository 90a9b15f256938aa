"""What is built where there is a compiler, where there is none, and what the package says then."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("setuptools", minversion="77")
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
VERSION = torch.__version__.partition("+")[0]
# Stands for a compiler: notes how it was called, and makes the file it was asked for.
COMPILER = f"""#!{sys.executable}
import sys
from pathlib import Path
with open(Path(__file__).with_name("calls"), "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


@pytest.fixture
def source(tmp_path):
    """What the wheel is built from, without objects that are already there."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "normscope", folder / "normscope", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def wheel_of(source, **environment):
    """Build, without network and without a compiler on the path; the wheel, and what was said."""
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": ""} | environment
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(source.parent)]
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (wheel,) = source.parent.glob("*.whl")
    return wheel, run.stderr


def test_without_a_compiler_everything_works_and_one_line_says_so(source, tmp_path):
    wheel, said = wheel_of(source)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "normscope: without compiled kernels, a C++20 compiler is missing" in said
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "normscope/kernels/cpp/library.cpp" in archive.namelist()
        archive.extractall(tmp_path / "site")
    program = (
        "import torch, normscope as ns; print(ns.__file__); print(ns.backends())\n"
        "x = torch.randn(4, 6, 5, 5, dtype=torch.float64, requires_grad=True); g = torch.randn_like(x)\n"
        "model = torch.nn.Sequential(torch.nn.BatchNorm2d(6), torch.nn.ReLU()).double()\n"
        "want = torch.autograd.grad(model(x), x, g)\n"
        "ns.accelerate(model, x.detach())\n"
        "torch.testing.assert_close(torch.autograd.grad(model(x), x, g), want)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    where, *lines = run.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert [line.split()[:2] for line in lines] == [["missing", "cpu"], ["missing", "triton"], ["usable", "eager"]]
    assert "not compiled: install torch and a C++20 compiler (g++), then reinstall normscope" in lines[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the names are those of Linux")
def test_with_a_compiler_the_wheel_is_for_every_python_on_this_platform(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    wheel, said = wheel_of(source, CXX=str(compiler))
    assert "without compiled kernels" not in said
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    with zipfile.ZipFile(wheel) as archive:
        objects = sorted(Path(name).name for name in archive.namelist() if name.endswith(".so"))
        assert b"Root-Is-Purelib: false" in archive.read(
            next(n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        )
    assert objects == ["libnormscope.so", f"libnormscope_autograd-{VERSION}.so"]
    calls = (tmp_path / "calls").read_text().splitlines()
    bodies = [call for call in calls if "bodies_" in call and " -c " in call]
    assert len(bodies) == (3 if "x86_64" in sysconfig.get_platform() else 1)
    links = [call for call in calls if "-shared" in call]
    assert not [call for call in links if str(Path(torch.__file__).parent) in call]  # no path of this machine
    assert not [call for call in calls if "-ffast-math" in call]


def test_a_compiler_that_fails_is_named(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!{sys.executable}\nraise SystemExit('no C++20')\n")
    compiler.chmod(0o755)
    wheel, said = wheel_of(source, CXX=str(compiler))
    assert "normscope: without compiled kernels" in said
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("normscope_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_is_found_beside_the_python_that_builds(setup, monkeypatch, tmp_path):
    assert setup.headers() == Path(torch.__file__).parent / "include"
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert setup.headers() is None


@pytest.fixture
def commands(setup, monkeypatch):
    """The commands that would be run."""
    seen = []

    def run(command, **_):
        seen.append(list(map(str, command)))
        return subprocess.CompletedProcess(command, 0, stdout="clang_rt.builtins-x86_64.lib\n")

    monkeypatch.setattr(setup.subprocess, "run", run)
    return seen


def test_windows_links_with_what_torch_brings(setup, commands, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "WINDOWS", True)
    monkeypatch.setattr(setup.sys, "platform", "win32")
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"C:/{name}.exe")
    monkeypatch.delenv("CXX", raising=False)
    assert setup.compiler() == "C:/clang++.exe"  # a g++ would be MinGW's
    include = tmp_path / "torch" / "include"
    setup.link("clang++", include, tmp_path, tmp_path / "x.so", ["a.o"], ["torch_cpu", "c10"])
    *_, link = commands
    assert link[-4:] == [f"-L{tmp_path / 'torch' / 'lib'}", "-ltorch_cpu", "-lc10", "clang_rt.builtins-x86_64.lib"]


def test_macos_finds_torchs_names_when_it_loads(setup, commands, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.sys, "platform", "darwin")
    setup.link("clang++", tmp_path, tmp_path, tmp_path / "x.so", ["a.o"], ["torch_cpu"])
    assert [command[-2:] for command in commands] == [["-undefined", "dynamic_lookup"]]


def test_arm64_has_one_set_of_bodies(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.platform, "machine", lambda: "arm64")
    units = dict(setup.units(tmp_path, tmp_path))
    assert [path.name for path in units] == ["baseline.o", "library.o"]
    assert not [flag for unit in units.values() for flag in unit if flag.startswith("-march")]


def test_building_pulls_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert not [name for name in project["build-system"]["requires"] if name.startswith("torch")]
    wheels = project["tool"]["cibuildwheel"]
    assert "--no-deps" in wheels["before-build"].split()  # its headers
    assert wheels["build-frontend"] == "pip"  # whose isolation leaves them in sight
    assert {"libtorch_cpu.so", "libc10.so"} <= set(wheels["linux"]["repair-wheel-command"].split())
