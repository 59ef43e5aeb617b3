"""What `make gpu` asks for can be read, fits the card, and can be gone on with: a session on a GPU is short."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kernels_bridge.__main__ import app
from kernels_bridge.harness.check import LENGTHS, TOKENS
from kernels_bridge.harness.cli import LARGE_LENGTHS
from kernels_bridge.harness.draw import LARGE
from minimal_mamba import provenance

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """Without the name of Python before each."""
    if not shutil.which("make"):
        pytest.skip("no make here")
    told = subprocess.run(
        ["make", "-n", "--no-print-directory", "gpu", "GPU_PYTHON=python3"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.split()[1:] for line in told.stdout.splitlines()]


def test_each_check_is_one_that_the_command_line_takes(commands: list[list[str]]) -> None:
    checks = [c[2:] for c in commands if c[:3] == ["-m", "kernels_bridge", "check"]]
    files = [c[c.index("--json") + 1] for c in checks]
    assert len(checks) > 8 and len({*files}) == len(files)
    for asked in checks:
        if not torch.cuda.is_available():  # where there is one, all of them would run
            told = CliRunner().invoke(app, asked)
            assert told.exit_code == 2 and "torch sees no CUDA device here" in told.output, told.output
    for kind in (["--dtype", dtype] for dtype in ("float32", "bfloat16", "float16")):
        assert lengths_of(checks, kind) == {*LENGTHS}
    assert lengths_of(checks, ["--size", "odd"]) == {*LENGTHS}


def lengths_of(checks: list[list[str]], given: list[str]) -> set[int]:
    """Of the checks of `fused` that are given this."""
    mine = [c for c in checks if given[1] in c and c[c.index("--target") + 1] == "fused"]
    return {int(n) for c in mine for n in c[c.index("--lengths") + 1].split(",")}


def test_the_tests_for_a_gpu_are_all_that_are_collected(commands: list[list[str]]) -> None:
    """Other files may need what a machine with a GPU has not, and one that cannot be imported stops all."""
    (asked,) = (c for c in commands if c[:2] == ["-m", "pytest"])
    marked = [
        p for p in (ROOT / "tests").rglob("test_*.py") if re.search(r"^pytestmark.*mark\.gpu", p.read_text(), re.M)
    ]
    assert {ROOT / name for name in asked if name.endswith(".py")} == {*marked} and marked
    assert not any((ROOT / name).is_dir() for name in asked)


def test_gradients_by_every_state_of_130m_fit_a_gpu_of_80_gb() -> None:
    """They hold 10.4 times what the states take in float64, as counted at one layer of these sizes."""
    c = LARGE
    for l in LARGE_LENGTHS["cuda"]:
        rows = max(2, TOKENS // l)
        assert 10.4 * 8 * rows * l * c.n_layer * c.d_inner * c.d_state < 60e9


def test_results_do_not_count_as_changes_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that was interrupted is gone on with by the same commit: its own file, in the checkout, is no other."""

    def git(*asked: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *asked], cwd=tmp_path, check=True)

    (tmp_path / "package").mkdir()
    code = tmp_path / "package" / "provenance.py"
    code.write_text("x = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    monkeypatch.setattr(provenance, "__file__", str(code))
    clean = provenance.provenance()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "check.json").write_text("{}")
    assert provenance.provenance()["commit"] == clean
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "code.py").write_text("")
    assert provenance.provenance()["commit"] == clean + "+changes"
    (tmp_path / "new" / "code.py").unlink()
    code.write_text("x = 2\n")
    assert provenance.provenance()["commit"] == clean + "+changes"
