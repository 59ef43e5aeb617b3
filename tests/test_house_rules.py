"""Rules of the house that a reader relies on: who imports whom, what an import costs, sizes, no prints, no paths."""

import ast
import inspect
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
ORDER = ("minimal_mamba", "kernels_bridge", "interp", "analyses")  # each imports only those before it
FILES = sorted(p for package in ORDER for p in (ROOT / package).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in FILES]
HEAVY = ("transformers", "matplotlib", "sklearn", "pandas", "scipy", "mamba_ssm", "causal_conv1d", "triton", "numba",
         "torch._dynamo")  # fmt: skip
LONGEST = 400


def imported(tree: ast.AST, package: str) -> set[str]:
    """Top-level names that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level else (node.module or "").split(".")[0])
    return found


def at_import(body: list[ast.stmt]) -> set[str]:
    """Top-level names imported when the module is, as against inside a function."""
    plain = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imported(ast.Module(plain, []), "")


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20 and {p.relative_to(ROOT).parts[0] for p in FILES} == set(ORDER)


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_one_way(name: str) -> None:
    package = name.split("/")[0]
    allowed = ORDER[: ORDER.index(package) + 1]
    found = imported(ast.parse((ROOT / name).read_text()), package) & {*ORDER, "tests", "helpers"}
    assert found <= set(allowed), f"{name} imports {sorted(found - set(allowed))}; it may import {', '.join(allowed)}"


def test_an_import_the_wrong_way_would_be_seen() -> None:
    tree = ast.parse("import torch\ndef f():\n    from interp.run import run\n    from . import x; import analyses.a")
    assert imported(tree, "minimal_mamba") == {"torch", "interp", "minimal_mamba", "analyses"}
    assert at_import(tree.body) == {"torch"}


# training is imported by who trains, the compiled loops when the first runs, the labels of plots when one is drawn, and
# none of them by a package
LATE = (
    "interp/plots/labels.py",
    "kernels_bridge/training.py",
    *(f"kernels_bridge/compiled/{name}.py" for name in ("kernels", "token_kernels", "functions", "mixer_kernels")),
)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("analyses") and n not in LATE])
def test_no_module_of_the_library_imports_at_once_what_few_need(name: str) -> None:
    assert not at_import(ast.parse((ROOT / name).read_text()).body) & set(HEAVY)


def test_the_packages_import_lightly() -> None:
    """In a process of its own: no package brings a heavy library along, and torch is nearly all of the time."""
    code = f"""
import sys, time
import torch, einops, safetensors.torch
before = set(sys.modules)
first = time.process_time()
for name in {ORDER!r}:
    __import__(name)
    found = sorted(set({HEAVY!r}) & (set(sys.modules) - before))
    assert not found, f"import {{name}} imports {{found}}"
print(time.process_time() - first)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2  # seconds of CPU beyond torch; measured 0.05


def test_every_plot_is_at_the_front_door():
    import interp
    from interp import plots

    drawing = {function for path in (ROOT / "interp" / "plots").glob("*.py") for function in _plots(path)}
    assert drawing == set(plots.__all__) <= set(interp.__all__)
    for name in plots.__all__:
        assert inspect.isfunction(getattr(plots, name)) and getattr(interp, name) is getattr(plots, name)


def _plots(path: Path) -> list[str]:
    """The public functions of a file that return the axes they have drawn on, an argument of their own."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if f.name[0] != "_" and "ax" in {a.arg for a in f.args.kwonlyargs}]


@pytest.mark.parametrize("name", NAMES)
def test_files_can_be_read_in_one_sitting(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) < LONGEST


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("analyses")])
def test_library_modules_do_not_print(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    calls = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
    assert not calls or name.endswith("__main__.py"), f"print( in lines {calls}"


# an absolute path on the machine where this was written
MACHINE = re.compile(r"(?<![\w./:])/(?:work|root|mnt|scratch)/")


def test_no_file_names_a_machine_path() -> None:
    assert MACHINE.search("open('/work" + "/x')") and not MACHINE.search("https://host/work/x ./tmp/x")
    kinds = {".py", ".md", ".toml", ".json", ".yml", ".yaml", ".cfg", ".txt"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT / f for f in listed] or [*FILES, *(ROOT / "tests").rglob("*.py")]
    found = []
    for path in files:
        if path.suffix in kinds and path.exists():
            lines = path.read_text(errors="replace").splitlines()
            found += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if MACHINE.search(line)]
    assert not found


def test_what_is_pinned_for_python_3_10_runs_there():
    pinned = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    there = [pin for pin in pinned if pin.marker is None or pin.marker.evaluate({"python_version": "3.10"})]
    checked = 0
    for pin in there:
        try:
            told = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if told["Version"] in pin.specifier:
            checked += 1
            assert SpecifierSet(told["Requires-Python"] or "").contains("3.10"), (
                f"{pin} needs {told['Requires-Python']}"
            )
    assert checked > 20
