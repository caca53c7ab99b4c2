"""Generated source to loaded machine code, once for each machine.

The folder is keyed by the hash of text, flags, compiler and CPU. An entry is written beside its place and moved there,
so that any number of processes may build at once; one that is damaged is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvpass.progress import counted

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)


class NoCompiler(RuntimeError):
    """There is no C++ compiler on this machine, or it cannot compile our source."""


def cache_folder() -> Path:
    """``$KVPASS_CACHE``, or ``kvpass`` in the user's cache folder."""
    given = os.environ.get("KVPASS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(given) if given else Path(base) / "kvpass"


@functools.cache
def compiler() -> str:
    """The C++ compiler: ``$CXX``, ``g++`` or ``clang++``.

    Raises:
        NoCompiler: none of them is there.
    """
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if found := shutil.which(name):
            return found
    raise NoCompiler("no C++ compiler was found: install g++ or clang++, or set CXX")


@functools.cache
def _compiler_version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]


@functools.cache
def _cpu() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return platform.machine() + "".join(line for line in lines[:40] if line.startswith(("flags", "model", "Features")))


@functools.cache
def openmp() -> tuple[str, ...]:
    """Flags that share torch's own threads: a second pool of threads beside them would fight for the cores.

    Torch brings GNU's run-time library under a name of its own; the kernel is linked to that very file.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ()
    loaded = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    found = sorted(loaded, key=lambda path: "torch" not in path)
    gnu = "g++" in os.path.basename(compiler()) or "GCC" in _compiler_version(compiler())
    return ("-fopenmp", found[0]) if found and gnu else ()


def _place(source: str, flags: tuple[str, ...] = ()) -> tuple[Path, list[str]]:
    """Where the library of a source belongs, and the flags that make it."""
    path, link = compiler(), openmp()
    words = [*FLAGS, *link[:1], *flags, *shlex.split(os.environ.get("KVPASS_CXXFLAGS", ""))]
    key = hashlib.sha256("\0".join((source, *words, *link[1:], _compiler_version(path), _cpu())).encode()).hexdigest()
    return cache_folder() / "cpp" / key[:2] / f"{key}.so", words


def shared_library(source: str, flags: tuple[str, ...] = ()) -> Path:
    """The path of the compiled source; compiled now if it is not there.

    ``$KVPASS_CXXFLAGS`` is added to the flags.

    Raises:
        NoCompiler: no compiler, or an error of the compiler, which is in the message.
    """
    library, words = _place(source, flags)
    if library.exists():
        return library
    path, link, folder = compiler(), openmp(), library.parent
    folder.mkdir(parents=True, exist_ok=True)
    text = library.with_suffix(".cpp")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        inner = Path(scratch) / "kernel.cpp"
        inner.write_text(source)
        object_file, made = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
        compile_words = [path, *(w for w in words if w != "-shared"), "-c", str(inner), "-o", str(object_file)]
        _call(compile_words)
        sanitized = [flag for flag in flags if flag.startswith("-fsanitize")]
        _call([path, "-shared", *sanitized, str(object_file), *link[1:], "-o", str(made)])
        inner.replace(text)
        made.replace(library)
    return library


def shared_libraries(sources: Iterable[str]) -> None:
    """Compile those that are not there yet side by side, with a bar on a terminal.

    What fails is left for `shared_library` to report.
    """
    missing = [source for source in dict.fromkeys(sources) if not _place(source)[0].exists()]
    if len(missing) < 2:
        return

    def build(source: str) -> None:
        with contextlib.suppress(NoCompiler, OSError):
            shared_library(source)
        done()

    with counted("compiling kernels", len(missing)) as done, ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, missing))


def _call(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"{' '.join(words[:2])} failed:\n{done.stderr[-4000:]}")


def name_of(source: str) -> str:
    """A short name for a source, the same on every machine."""
    return hashlib.sha256(source.encode()).hexdigest()[:10]


def load(source: str) -> ctypes.CDLL:
    """The compiled source in this process; a file that cannot be loaded is built again.

    Raises:
        NoCompiler: it cannot be built.
    """
    library = shared_library(source)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(shared_library(source)))
