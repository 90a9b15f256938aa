"""Compile the CPU kernels while the package is built.

One shared object serves every Python and every torch from 2.10 on: it uses only the stable ABI of the torch whose
headers lie in the target environment, and links against the libtorch_cpu that `import torch` has loaded. A second,
small one, the steps of autograd between the kernels, is for that version of torch alone. Building never installs a
torch. Without its headers or without a compiler the package is built without the objects and says so.

GCC or Clang, on Windows the clang++ of LLVM: the bodies are written with their vector types, which MSVC does not have.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SOURCES = Path(__file__).parent / "normscope" / "kernels" / "cpp"
OBJECT = SOURCES / "libnormscope.so"
AUTOGRAD = "libnormscope_autograd-{version}.so"  # kernels/cpu.py looks for the running torch's

WINDOWS = sys.platform == "win32"

# Never -ffast-math: linked with it, the object would set flush-to-zero for the whole process when it loads.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # stable ABI of torch 2.10
FLAGS += [] if WINDOWS else ["-fPIC", "-fvisibility=hidden"]
FLAGS += os.environ.get("NORMSCOPE_CXXFLAGS", "").split()  # make sanitize adds its own
X86 = {"baseline": "x86-64", "v3": "x86-64-v3", "v4": "x86-64-v4"}


def headers():
    """The include folder of the torch in the target environment; inside an isolated build it cannot be imported."""
    for kind in ("platlib", "purelib"):
        include = Path(sysconfig.get_path(kind)) / "torch" / "include"
        if (include / "torch" / "csrc" / "stable" / "library.h").exists():
            return include
    return None


def compiler():
    """The C++ compiler to use."""
    names = ("clang++",) if WINDOWS else ("g++", "clang++", "c++")  # a g++ there builds for another C++ library
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, names)), None)


def units(include, folder):
    """(object, command arguments) of every translation unit."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    for name in X86 if x86 else ["baseline"]:
        march = [f"-march={X86[name]}"] if x86 else []
        yield folder / f"{name}.o", [*march, "-c", str(SOURCES / f"bodies_{name}.cpp")]
    yield folder / "library.o", [f"-isystem{include}", "-c", str(SOURCES / "library.cpp")]


def build(cxx, include):
    """Compile all units at once and link them."""
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        steps = pool.submit(build_autograd, cxx, include, Path(temporary) / "autograd")
        folder = Path(temporary) / "kernels"
        folder.mkdir()
        jobs = dict(units(include, folder))
        list(pool.map(lambda job: subprocess.run([cxx, *FLAGS, *job[1], "-o", str(job[0])], check=True), jobs.items()))
        link(cxx, include, folder, OBJECT, jobs, ["torch_cpu"])
        try:
            steps.result()
        except subprocess.CalledProcessError as error:
            print(f"normscope: autograd between the kernels stays in Python, {error}", file=sys.stderr)


def build_autograd(cxx, include, folder):
    """The object for this version of torch: against its C++ interface, of which the stable one is a small part."""
    folder.mkdir()
    version = runpy.run_path(str(include.parent / "version.py"))["__version__"].partition("+")[0]
    unit = folder / "autograd.o"
    flags = [flag for flag in FLAGS if not flag.startswith("-DTORCH_TARGET_VERSION")]
    source = ["-O1", f"-isystem{include}", "-c", str(SOURCES / "autograd.cpp")]
    subprocess.run([cxx, *flags, *source, "-o", str(unit)], check=True)
    link(cxx, include, folder, SOURCES / AUTOGRAD.format(version=version), [unit], ["torch_cpu", "c10"])


def link(cxx, include, folder, target, units, libraries):
    """Link against the names of torch's libraries; what they lack shows when the object is loaded."""
    command = [cxx, *FLAGS, "-shared", "-o", str(target), *map(str, units)]
    names = [f"-l{name}" for name in libraries]
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    elif WINDOWS:  # torch comes with import libraries; what tells the processor's abilities is Clang's own
        asked = [cxx, "--rtlib=compiler-rt", "-print-libgcc-file-name"]
        builtins = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        command += [f"-L{include.parent / 'lib'}", *names, builtins]
    else:  # stubs of the right names: no path of the build machine gets into the object
        (folder / "stub.cpp").touch()
        for name in libraries:
            stub = [f"-Wl,-soname,lib{name}.so", str(folder / "stub.cpp"), "-o", str(folder / f"lib{name}.so")]
            subprocess.run([cxx, "-shared", "-fPIC", *stub], check=True)
        command += [f"-L{folder}", "-Wl,-z,now", "-Wl,--no-as-needed", *names]
    subprocess.run(command, check=True)


class BuildWithKernels(build_py):
    """Put the shared object beside the sources of the kernels, then build as always."""

    def run(self):
        """Compile if that is possible here."""
        for old in (OBJECT, *SOURCES.glob(AUTOGRAD.format(version="*"))):
            old.unlink(missing_ok=True)
        cxx, include = compiler(), headers()
        if not cxx or not include:
            lacking = "a C++20 compiler" if not cxx else "torch (install it first)"
            print(f"normscope: without compiled kernels, {lacking} is missing", file=sys.stderr)
        else:
            try:
                build(cxx, include)
            except (subprocess.CalledProcessError, OSError) as error:
                print(f"normscope: without compiled kernels, {error}", file=sys.stderr)
        super().run()


class AnyPython(bdist_wheel):
    """The wheel is for any Python 3, and for one platform where it holds the kernels."""

    def get_tag(self):
        """py3-none-platform."""
        return ("py3", "none", super().get_tag()[2])


class WithObject(Distribution):
    """What decides whether the wheel is for one platform."""

    def has_ext_modules(self):
        """Whether the shared object will be in it."""
        return bool(compiler() and headers())


setup(distclass=WithObject, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython})
