"""Imports point downwards only: the table of layers, held against the imports of every file.

A row lists all that a layer may import from this repository and from packages outside the standard library. An import
inside a function or under ``TYPE_CHECKING`` counts like any other. Back ends in ``codegen`` name torch in the source that
they generate, which is text, not an import.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SOLVERS = {"numpy", "scipy", "networkx"}

LAYERS: dict[str, set[str]] = {  # layer: what it may import, itself aside
    "deepseed.ir": set(),
    "deepseed.rules": {"deepseed.ir", "sympy"},
    "deepseed.cost": {"deepseed.ir", "sympy"},
    "deepseed.plan": {"deepseed.ir", "sympy"},
    "deepseed.counts": {"deepseed.ir", "deepseed.cost"},
    "deepseed.speed": {"deepseed.ir", "deepseed.counts"},
    "deepseed.closed_forms": {"deepseed.ir", "deepseed.cost", "sympy"},
    "deepseed.ops.adam": {"deepseed.adam", "torch"},
    "deepseed.ops": {"deepseed.ir", "torch"},
    "deepseed.check": {"deepseed.ir", "deepseed.rules", "deepseed.ops", "torch"},
    "deepseed.solver": {"deepseed.ir", "deepseed.rules", "deepseed.cost", "deepseed.speed", *SOLVERS},
    "deepseed.passes": {"deepseed.ir", "deepseed.rules", "deepseed.cost", "deepseed.counts", "deepseed.speed", "deepseed.solver", *SOLVERS, "sympy"},  # never another pass
    "deepseed.codegen": {"deepseed.ir"},
    "deepseed.capture": {"deepseed.ir", "deepseed.ops", "torch"},
    "deepseed.logs": set(),
    "deepseed.runtime": {"deepseed.ir", "deepseed.logs", "deepseed.ops", "torch", "numpy"},
    "deepseed.closures": {"torch"},
    "deepseed.adam": {"deepseed.closures", "torch"},
    "deepseed.lion": {"deepseed.closures", "torch"},
    "deepseed.muon": {"deepseed.closures", "torch"},
    "deepseed.lr_schedules": {"torch"},
    "deepseed.config": {"deepseed.adam", "deepseed.lion", "deepseed.muon", "deepseed.lr_schedules", "pydantic", "torch"},
    "deepseed.launcher": {"deepseed.logs", "torch"},
}
FRONT_FOLDERS = {"engine", "importing", "inference", "serve", "utils"}  # front doors of several files
FRONT = "the front doors: deepseed.pipeline, compile, cli and so on; they see everything and no layer sees them"

# A back end may need torch where it runs or compiles what it made; each such file is named here.
ALSO: dict[str, set[str]] = {"deepseed.codegen.inductor": {"torch", "deepseed.ops"}, "deepseed.codegen.cpp_files": {"torch", "deepseed.ops"}, "deepseed.codegen.cpp_chain": {"torch"}, "deepseed.codegen.ahead_of_time": {"triton"}, "deepseed.codegen.agreement": {"torch", "deepseed.ops"}, "deepseed.codegen.autotune": {"torch"}, "deepseed.codegen.triton_files": {"torch", "triton"}}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("passes", "codegen"):
        parts = ("deepseed", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> dict[str, Path]:
    """Module -> real file; the symlinked folders are read once, where they are."""
    found = [p for top in ("deepseed", "passes", "codegen") for p in sorted((ROOT / top).rglob("*.py"))]
    return {module_of(p): p for p in found if p.resolve() == p}


def is_pass(module: str) -> bool:
    """Does the file define a pass? The other files of the folder are helpers, which a pass may import."""
    path = files().get(module)
    tree = ast.parse(path.read_text()) if path is not None else ast.Module([], [])
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    return any(ast.unparse(d).startswith("program_pass(") for f in functions for d in f.decorator_list)


def layer_of(module: str) -> str | None:
    """The row that a module belongs to, None for a front door."""
    return next((layer for layer in LAYERS if module == layer or module.startswith(layer + ".")), None)


def imported(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, relative ones resolved; ``from a import b`` gives ``a.b``."""
    out: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            out += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            out += [(node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return out


def faults(module: str, text: str, is_package: bool = False) -> list[str]:
    """What a file imports against the table, one line each."""
    layer = layer_of(module)
    if layer is None:
        return []
    may = LAYERS[layer] | ALSO.get(module, set())
    tree = ast.parse(text)
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "deepseed"}
    out = []
    for line, name in imported(tree, module, is_package):
        if name == "deepseed" and all(attr.startswith("__") for attr in used):
            continue  # deepseed.__file__, deepseed.__version__: the package, not a front door
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top in ("passes", "codegen"):
            out.append(f"{where}; import deepseed.{top}, so that no module is loaded twice")
        elif top == "deepseed":
            target = layer_of(name)
            candidate = ".".join(name.split(".")[:3])
            if target == layer == "deepseed.passes" and candidate != module and is_pass(candidate):
                out.append(f"{where}; a pass never imports another pass")
            elif target != layer and target not in may:
                out.append(f"{where}; {layer} may import {', '.join(sorted(may)) or 'the standard library only'}")
        elif top not in sys.stdlib_module_names and top not in may:
            out.append(f"{where}; {layer} may import {', '.join(sorted(may)) or 'the standard library only'}")
    return out


@pytest.mark.parametrize("module", sorted(files()))
def test_imports_point_downwards(module: str) -> None:
    path = files()[module]
    assert not (found := faults(module, path.read_text(), path.name == "__init__.py")), "\n".join(found)


def test_no_file_is_outside_the_table_by_a_slip() -> None:
    """A front door lies directly in deepseed/, or in a folder of FRONT_FOLDERS; any other new folder needs a row."""
    strays = sorted({m.split(".")[1] for m, p in files().items() if layer_of(m) is None and p.parent != ROOT / "deepseed"} - FRONT_FOLDERS)
    assert not strays, f"deepseed/{strays[0]}/ has no row in LAYERS ({FRONT})"


@pytest.mark.parametrize(
    ("module", "line", "says"),
    [
        ("deepseed.ir.mesh", "import torch", "the standard library only"),
        ("deepseed.ir.mesh", "import numpy as np", "the standard library only"),
        ("deepseed.ir.mesh", "from deepseed.rules import table", "the standard library only"),
        ("deepseed.rules.table", "def f():\n    import torch", "deepseed.ir, sympy"),
        ("deepseed.passes.canonicalize", "import torch.fx", "deepseed.cost"),
        ("deepseed.passes.canonicalize", "from deepseed.passes.localize import localize", "never imports another pass"),
        ("deepseed.passes.canonicalize", "from deepseed.passes import localize", "never imports another pass"),
        ("deepseed.passes.canonicalize", "from . import localize", "never imports another pass"),
        ("deepseed.passes.canonicalize", "from passes.localize import localize", "loaded twice"),
        ("deepseed.passes.canonicalize", "from deepseed.check.typing import check", "deepseed.rules"),
        ("deepseed.passes.canonicalize", "import deepseed.pipeline", "deepseed.rules"),
        ("deepseed.capture.trace", "from deepseed.runtime import run", "deepseed.ops"),
        ("deepseed.runtime.run", "from deepseed import capture", "deepseed.ops"),
        ("deepseed.check.typing", "import deepseed\ndeepseed.compile", "deepseed.ops"),
        ("deepseed.check.typing", "from deepseed.passes.localize import localize", "deepseed.ops"),
    ],
)
def test_each_kind_of_fault_is_found(module: str, line: str, says: str) -> None:
    assert says in "\n".join(faults(module, line))


def test_what_is_allowed_passes() -> None:
    assert not faults("deepseed.passes.solve_placements", "import numpy\nfrom scipy.optimize import milp\nfrom deepseed.ir.mesh import Mesh\nimport deepseed.cost\n")
    assert not faults("deepseed.passes.canonicalize", "from deepseed.passes.group import Group")
    assert not faults("deepseed.ops.table", "import torch\nfrom deepseed.ops.random import bits")
    assert not faults("deepseed.check.typing", "import deepseed\ndeepseed.__file__")
    assert not faults("deepseed.cli", "import torch, typer\nimport deepseed.passes.localize")


@pytest.mark.parametrize("layer", ["deepseed.ir", "deepseed.rules", "deepseed.plan", "deepseed.cost", "deepseed.solver", "deepseed.passes"])
def test_layers_without_torch_load_without_it(layer: str) -> None:
    """Every module of the layer, in a fresh process: none pulls torch in, by whatever way."""
    modules = [m for m in sorted(files()) if layer_of(m) == layer]
    if not modules:
        pytest.skip(f"{layer} has no files")
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{layer} loads torch: {done.stderr or 'see its imports and deepseed/__init__.py'}"
