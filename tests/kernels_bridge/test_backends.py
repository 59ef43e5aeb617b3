"""The table of backends: what there is, what is refused and with which words, and the command that prints it."""

import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny

from interp import run
from kernels_bridge import BACKENDS, backends, resolve, table
from kernels_bridge.torch_ops import TORCH
from minimal_mamba import READABLE, MambascopeError
from minimal_mamba.errors import BackendUnavailable

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[1, 2, 3]])
AUTO = "torch" if BACKENDS["compiled"].missing(torch.device("cpu")) else "compiled"


def test_the_table_names_what_is_promised() -> None:
    assert list(BACKENDS) == ["reference", "torch", "compiled", "fused"]
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert all(b.ops.name == b.name for b in BACKENDS.values())
    assert not BACKENDS["reference"].needs and not BACKENDS["torch"].needs


def test_names_resolve() -> None:
    assert resolve("reference") is READABLE and resolve("torch") is TORCH
    assert resolve() is resolve("auto", "cpu") is resolve("auto", torch.device("cpu")) is BACKENDS[AUTO].ops


@pytest.mark.parametrize("name", ["auto", "torch", "reference"])
def test_a_run_says_which_backend_ran(name: str) -> None:
    assert run(tiny(), IDS, backend=name).backend == (AUTO if name == "auto" else name)


@pytest.mark.parametrize(
    ("name", "near"), [("troch", "torch"), ("refrence", "reference"), ("Fused", "fused"), ("xyz", None)]
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        resolve(name)
    text = str(caught.value)
    assert text.startswith(f"no backend {name!r}.") and text.endswith(
        "There are auto, reference, torch, compiled, fused."
    )
    assert f"Did you mean {near!r}?" in text if near else "Did you mean" not in text
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, MambascopeError)


def test_fused_on_a_cpu_says_what_is_missing_and_what_to_do() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        resolve("fused", "cpu")
    text = str(caught.value)
    assert text.startswith("backend='fused' cannot run on cpu: it lacks a model on a CUDA device")
    assert "model.to('cuda')" in text and text.endswith(
        "Here: reference, torch." if AUTO == "torch" else "Here: reference, torch, compiled."
    )


def test_every_need_that_is_not_met_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backends, "installed", lambda name: None)
    with pytest.raises(
        BackendUnavailable,
        match=r"the package mamba-ssm, .* and the package causal-conv1d, .* \(pip install [^()]*\)\.",
    ):
        resolve("fused", "cuda")
    text = table("cpu")
    assert "lacks a model on a CUDA device; the package mamba-ssm, 2.3.1 or newer; the package causal-conv1d" in text
    assert "extension" not in text
    assert "mamba-ssm (none)" in text and "for a model on a CUDA device: move the model with" in text
    assert text.count("pip install --no-build") == 1


@pytest.mark.parametrize(
    ("mamba", "conv", "lacks"),
    [
        ("2.2.6.post3", "1.7.0", ["mamba-ssm"]),
        ("2.3.0", "1.5.2", ["mamba-ssm", "causal-conv1d"]),
        ("2.3.1", "1.5.3.post1", []),
        ("2.3.2.post1+cu13", "1.10.0", []),
        ("2.10.0", None, ["causal-conv1d"]),
    ],
)
def test_versions_that_are_known_bad_are_refused(
    mamba: str, conv: str | None, lacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(backends, "installed", {"mamba-ssm": mamba, "causal-conv1d": conv}.get)
    missing = [need.name.split(",")[0] for need in BACKENDS["fused"].missing(torch.device("cuda"))]
    assert missing == [f"the package {name}" for name in lacks]


def test_a_stub_of_an_extension_is_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed", lambda name: "9")
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(
        BackendUnavailable, match=r"lacks mamba-ssm's extension and causal-conv1d's .*\(it was installed without"
    ):
        resolve("fused", "cuda")


def test_nothing_falls_back_unasked() -> None:
    with pytest.raises(BackendUnavailable, match="cannot run on cpu"):
        run(tiny(), IDS, backend="fused")


def test_auto_takes_the_fastest_that_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = replace(BACKENDS["fused"], needs=BACKENDS["fused"].needs[:1], ops=replace(READABLE, name="fused"))
    monkeypatch.setitem(BACKENDS, "fused", ready)
    assert resolve("auto", "cuda").name == "fused"
    assert resolve("auto", "cpu").name == AUTO


def test_without_numba_auto_is_torch_and_compiled_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed", lambda name: None)
    assert resolve("auto", "cpu") is TORCH
    with pytest.raises(BackendUnavailable, match=r"lacks the package numba, .* \(pip install 'mambascope\[fast\]'\)"):
        resolve("compiled", "cpu")
    monkeypatch.setattr(backends, "installed", lambda name: "0.68.1")
    assert resolve("auto", "cpu").name == "compiled"
    with pytest.raises(BackendUnavailable, match="lacks a model on the CPU"):
        resolve("compiled", "cuda")


def test_the_table_prints_a_line_a_backend() -> None:
    lines = table("cpu").splitlines()[: len(BACKENDS)]
    assert [line.split()[0] for line in lines] == list(BACKENDS)
    assert lines[0].endswith("available") and lines[1].endswith("available")
    assert re.search(r"lacks .*a model on a CUDA device", lines[3])


def test_the_command_prints_the_table() -> None:
    command = [sys.executable, "-m", "kernels_bridge", "backends"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert done.stdout.strip() == table(device).strip()


def test_a_numba_that_cannot_be_imported_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses a NumPy that is newer than it knows when it is imported, and not before."""
    if AUTO != "compiled":
        pytest.skip("numba is not here")
    monkeypatch.setitem(sys.modules, "numba", None)
    backends._imports.cache_clear()
    try:
        assert resolve("auto").name == "torch"
        with pytest.raises(BackendUnavailable, match=r"a numba that can be imported \(`python -c"):
            resolve("compiled")
    finally:
        backends._imports.cache_clear()
