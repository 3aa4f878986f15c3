"""G8: the core does not import torch; rooms call downwards only; importing is light; the public surface is whole and documented."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import leanreplay as lr

PACKAGE = os.path.dirname(os.path.abspath(lr.__file__))

# Which rooms each room may import. A new file has to be given its place here. `keys` hashes.
BOTTOM = {"errors", "arguments", "arrays", "kernels", "keys"}
CORE = BOTTOM | {"samples", "storage", "policies", "buffers", "merge"}
MAY_IMPORT = {
    "errors": set(),
    "arguments": {"errors", "arrays"},
    "arrays": set(),
    "kernels": set(),
    "keys": set(),
    "samples": {"errors", "arguments", "arrays"},
    "storage": BOTTOM | {"samples"},
    "policies": BOTTOM,
    "buffers": BOTTOM | {"samples", "storage", "policies"},
    "merge": CORE - {"merge"},
    "plot": CORE,
    "cli": CORE | {"plot", "__init__"},
    "__main__": CORE | {"cli"},
    "__init__": CORE,
    "torch": CORE | {"torch", "plot", "__init__"},
}


def files():
    """(dotted name within the package, path) of every module."""
    for folder, _, names in os.walk(PACKAGE):
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                parts = os.path.relpath(path, PACKAGE)[: -len(".py")].split(os.sep)
                yield ".".join(parts), path


FILES = sorted(files())


@functools.cache
def nodes(path):
    """All nodes of a file's tree, the module first."""
    return list(ast.walk(ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))))


@functools.cache
def imports(name, path):
    """Absolute dotted name of everything that a module imports, wherever it does so."""
    return list(_imports(name, path))


def _imports(name, path):
    package = ["leanreplay", *name.split(".")[:-1]]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                there = os.path.join(os.path.dirname(PACKAGE), *inner.split("."))
                yield inner if os.path.isdir(there) or os.path.isfile(there + ".py") else module


def room(dotted):
    """The room that an absolute name within the package lies in."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_the_walk_sees_the_package():
    """The other tests here mean something only if they look at all files."""
    found = {name for name, _ in FILES}
    assert {"__init__", "buffers.base", "storage.store", "kernels.rows", "torch.__init__"} <= found
    assert "leanreplay.kernels" in {".".join(i.split(".")[:2]) for n, p in FILES if n.startswith("storage.") for i in imports(n, p)}


def every_file(prefix=""):
    """A test of (name, path), made for all files of the package whose names begin so; what fails says which file it is."""

    def decorate(check):
        @functools.wraps(check)
        def test():
            for name, path in FILES:
                if name.startswith(prefix):
                    check(name, path)

        del test.__wrapped__  # pytest would ask for fixtures `name` and `path`
        return test

    return decorate


@every_file()
def test_directions(name, path):
    """G8: every import goes downwards."""
    mine = name.split(".")[0]
    assert mine in MAY_IMPORT, f"{name}: a new room; say in MAY_IMPORT what it may import"
    inside = {i for i in imports(name, path) if i.split(".")[0] == "leanreplay"}
    wrong = sorted(i for i in inside if room(i) not in MAY_IMPORT[mine] | ({mine} if os.path.isdir(os.path.join(PACKAGE, mine)) else set()))
    assert not wrong, f"{name} may import {sorted(MAY_IMPORT[mine])}, but imports {wrong}"


@every_file()
def test_foreign_imports(name, path):
    """G8: torch is imported by leanreplay.torch alone, h5py by `storage`, numba by the kernels."""
    outside = {i.split(".")[0] for i in imports(name, path)} - set(sys.stdlib_module_names) - {"leanreplay"}
    allowed = {"numpy"}
    mine = name.split(".")[0]
    special = {"torch": {"torch"}, "kernels": {"numba", "llvmlite"}, "storage": {"_typeshed", "h5py"}}
    allowed |= {**special, "cli": {"h5py", "matplotlib"}}.get(mine, set())
    assert outside <= allowed, f"{name} imports {sorted(outside - allowed)}"


@every_file("kernels.")
def test_kernels_stand_alone(name, path):
    """Kernels import nothing of ours but decorators and helpers; the files of helpers, those below."""
    helpers = ["kernels", "kernels.hashing", "kernels.memory", "kernels.heaps", "kernels.checksums"]
    mine = name.removesuffix(".__init__")
    below = helpers[: helpers.index(mine)] if mine in helpers else helpers
    allowed = {f"leanreplay.{helper}" for helper in below}
    assert {i for i in imports(name, path) if i.startswith("leanreplay")} <= allowed, name


@every_file()
def test_python_calls_no_helper_of_kernels(name, path):
    """Helpers have no entry from Python: a call of one would crash the interpreter."""
    if name.startswith("kernels."):
        return
    modules = {}
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("kernels"):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            kernel = getattr(importlib.import_module(f"leanreplay.kernels.{modules[node.value.id]}"), node.attr)
            assert not getattr(kernel, "targetoptions", {}).get("no_cpython_wrapper"), f"{name}:{node.lineno}: {node.attr}"


# Within `torch`: `training` stands on everything, and nothing but the picture on it.
WITHIN_TORCH = {
    "nests": set(),
    "models": {"nests"},
    "data": {"nests"},
    "distributed": {"nests"},
    "features": {"data", "distributed", "models", "nests"},
    "loading": {"data", "distributed"},
    "learners": {"data", "distributed", "loading", "models", "nests"},
    "training": {"data", "distributed", "learners", "loading", "models", "nests"},
    "plot": {"training"},
}


@every_file("torch.")
def test_directions_within_torch(name, path):
    """Training, evaluation and what they stand on import downwards; learners and loaders do without them."""
    if name == "torch.__init__":
        return
    mine = name.split(".")[1]
    used = {i.split(".")[2] for i in imports(name, path) if i.startswith("leanreplay.torch.")}
    allowed = WITHIN_TORCH[mine]
    assert used <= allowed | {mine}, f"{name} may import {sorted(allowed)} of leanreplay.torch, but imports {sorted(used)}"


@every_file("torch.learners.")
def test_learners_do_not_use_each_others_internals(name, path):
    """A learner may build on a public name of another one, not on its underscored ones."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not [a.name for a in node.names if a.name.startswith("_")], name


LIGHT = """
import sys
import leanreplay
heavy = sorted({m.split(".")[0] for m in sys.modules} & {"torch", "h5py", "matplotlib", "sklearn", "tqdm"})
assert not heavy, heavy
from numba.core.dispatcher import Dispatcher
compiled = [f"{m}.{k}" for m, v in list(sys.modules.items()) if m.startswith("leanreplay") for k, f in vars(v).items()
            if isinstance(f, Dispatcher) and (f.signatures or f._make_finalizer and f.stats.cache_misses)]
assert not compiled, compiled
kernels = [k for m, v in sys.modules.items() if m.startswith("leanreplay.kernels") for k, f in vars(v).items() if isinstance(f, Dispatcher)]
assert len(kernels) > 10, kernels
import numpy as np
buffer = leanreplay.ReservoirBuffer(4)
buffer.add(np.arange(9))
buffer.sample(2)
assert "torch" not in sys.modules
print("light")
"""


def test_importing_is_light():
    """G8: `import leanreplay` imports neither torch nor h5py and compiles nothing; using the core imports no torch either."""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_DISABLE_JIT"}
    command = [sys.executable, "-c", LIGHT]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ran.returncode == 0 and ran.stdout == "light\n", ran.stderr


@pytest.mark.parametrize("module", ["leanreplay", "leanreplay.torch"])
def test_all_is_sorted_and_complete(module):
    """__all__ is sorted, holds what exists, and every public class and function that the module shows; none hides one of Python's own."""
    if module == "leanreplay.torch":
        pytest.importorskip("torch")
    loaded = importlib.import_module(module)
    if not hasattr(loaded, "__all__"):
        pytest.skip(f"{module} shows nothing yet")
    assert list(loaded.__all__) == sorted(set(loaded.__all__))
    assert all(hasattr(loaded, name) for name in loaded.__all__)
    shown = {
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("leanreplay")
    }
    assert shown - {"open", "open_buffer"} == {name for name in loaded.__all__ if not inspect.ismodule(getattr(loaded, name))}
    assert not set(loaded.__all__) & set(dir(builtins))


def test_errors_are_one_family():
    """Every exception is a LeanReplayError and public."""
    from leanreplay import errors

    classes = {k for k, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, Exception) and not issubclass(v, Warning)}
    used = "".join(pathlib.Path(path).read_text(encoding="utf-8") for name, path in FILES if name.startswith("torch."))
    assert {k for k in classes - set(lr.__all__) if k not in used} == set(), "neither public nor of leanreplay.torch alone"
    assert all(issubclass(getattr(errors, k), lr.LeanReplayError) for k in classes)


def public(value):
    """(dotted name, object) of the public names of the package and the public methods of its classes."""
    for name in value.__all__:
        thing = getattr(value, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        yield name, thing
        if inspect.isclass(thing):
            for key, member in vars(thing).items():
                if not key.startswith("_") and (callable(member) or isinstance(member, (property, classmethod, staticmethod))):
                    yield f"{name}.{key}", member


@pytest.mark.parametrize("module", ["leanreplay", "leanreplay.torch"])
def test_docstrings(module):
    """Every public class, function, method and property says what it does; an override may leave that to its base."""
    if module == "leanreplay.torch":
        pytest.importorskip("torch")
    loaded = importlib.import_module(module)
    if not hasattr(loaded, "__all__"):
        pytest.skip(f"{module} shows nothing yet")
    bare = []
    for name, thing in public(loaded):
        inherited = (
            [getattr(base, name.split(".")[1], None) for base in getattr(loaded, name.split(".")[0]).__mro__] if "." in name else [thing]
        )
        if not any(inspect.getdoc(t) for t in [thing, *inherited] if t is not None):
            bare.append(name)
    assert not bare


@every_file()
def test_modules_say_what_they_are(name, path):
    """Every file that holds code begins with a docstring."""
    module = nodes(path)[0]
    assert not module.body or ast.get_docstring(module), name


@every_file()
def test_asserts_only_narrow_types(name, path):
    """Input is never checked by `assert` (python -O drops it): what is left says `is not None` or `isinstance` to the type checker."""
    for node in nodes(path):
        if isinstance(node, ast.Assert):
            text = ast.unparse(node.test)
            assert "is not None" in text or text.startswith("isinstance("), f"{name}:{node.lineno}: assert {text}"


def test_nothing_that_runs_code_from_a_file():
    """G7: no pickle, eval or exec in the core: a file is data."""
    for name, path in FILES:
        if name.startswith("torch"):
            continue
        used = {i.split(".")[0] for i in imports(name, path)} & {"pickle", "marshal", "shelve", "dill"}
        called = {n.func.id for n in nodes(path) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)} & {
            "eval",
            "exec",
            "compile",
        }
        assert not used | called, name


def test_typed():
    """The package ships its types."""
    assert os.path.isfile(os.path.join(PACKAGE, "py.typed"))
