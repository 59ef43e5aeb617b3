"""Golden vectors: what a GPU's kernels gave, against the readable model; recording is tested on stand-ins."""

import dataclasses
from pathlib import Path

import pytest
import torch
from stand_ins import STAND_INS
from torch import Tensor
from typer.testing import CliRunner

from kernels_bridge.__main__ import app
from kernels_bridge.fused import golden

RESULTS = Path(__file__).parents[2] / "kernels_bridge" / "fused" / "golden.safetensors"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the stand-ins, as no GPU is needed for the recording to be right."""
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    golden.record(path, STAND_INS)
    return path


def hold(path: Path) -> None:
    found = list(golden.replay(path))
    assert {case for case, *_ in found} == set(golden.cases())
    assert {case.l for case, *_ in found if case.kind == "scan"} == set(golden.LENGTHS)
    wrong = [
        f"{case.name} {name}: {error:.1e} > {bound:.1e}" for case, name, error, bound in found if not error <= bound
    ]
    assert not wrong, wrong


def test_what_was_recorded_replays(recorded: Path) -> None:
    hold(recorded)
    assert recorded.stat().st_size < 3e6


def test_the_real_kernels_as_recorded() -> None:
    """Once a GPU session has committed the file."""
    if RESULTS.exists():
        hold(RESULTS)
        assert RESULTS.stat().st_size < 3e6


def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        told = CliRunner().invoke(app, ["record", str(tmp_path / "x.safetensors")])
        assert told.exit_code == 2 and "torch sees no CUDA device here" in told.output
        assert not [*tmp_path.iterdir()]


def test_the_command_fails_a_quantity_that_is_not_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one of two lengths, beside one that is right; the steps of the table are those of the file."""

    def broken(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = STAND_INS.causal_conv1d_fn(x, weight, bias)
        return y * torch.nan if x.shape[-1] == 5 else y

    some = [golden.Case("conv", torch.float32, l) for l in (7, 5)] + [golden.Case("conv_step", torch.float16, 1)]
    monkeypatch.setattr(golden, "cases", lambda: iter(some))
    monkeypatch.setattr(golden, "load", lambda: dataclasses.replace(STAND_INS, causal_conv1d_fn=broken))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(golden, "provenance", dict)  # which would ask the GPU
    asked: list[tuple[str, ...]] = []  # first whether the kernels can run, then products without TF32
    monkeypatch.setattr("kernels_bridge.harness.cli.resolve", lambda *what: asked.append(what))
    monkeypatch.setattr("kernels_bridge.harness.cli.exact_products", lambda: asked.append(("exact",)))
    told = CliRunner().invoke(app, ["record", str(tmp_path / "new" / "x.safetensors")])
    assert told.exit_code == 1 and asked == [("fused", "cuda"), ("exact",)], told.output
    lines = {tuple(line.split()[:3]): line for line in told.output.splitlines()}
    assert "FAIL" in lines["conv", "float32", "y"] and "nan" in lines["conv", "float32", "y"]
    assert "pass" in lines["conv_step", "float16", "window"]
    found = [*golden.replay(tmp_path / "new" / "x.safetensors")]
    wrong = sum(not error <= bound for *_, error, bound in found)
    assert 0 < wrong < len(found) and f"FAIL: {wrong} of {len(found)} outputs" in told.output
    monkeypatch.setattr(golden, "load", lambda: STAND_INS)
    told = CliRunner().invoke(app, ["record", str(tmp_path / "new" / "x.safetensors")])
    assert told.exit_code == 0 and f"PASS: 0 of {len(found)} outputs" in told.output


def test_a_fault_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the replay of a scan that keeps its state in bfloat16, and of a conv that is off by one."""

    def forgetful(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kw: bool) -> tuple[Tensor, Tensor]:
        y, h = STAND_INS.selective_scan_fn(u, dt, A, B, C, return_last_state=True)
        return y, h.bfloat16().to(h.dtype)

    def shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return STAND_INS.causal_conv1d_fn(x, weight.roll(1, 1), bias)

    faulty = dataclasses.replace(STAND_INS, selective_scan_fn=forgetful, causal_conv1d_fn=shifted)
    few = [golden.Case("scan", torch.float32, 5), golden.Case("conv", torch.float32, 5)]
    monkeypatch.setattr(golden, "cases", lambda: iter(few))
    golden.record(tmp_path / "x.safetensors", faulty)
    wrong = {
        (case.kind, name) for case, name, error, bound in golden.replay(tmp_path / "x.safetensors") if error > bound
    }
    assert ("scan", "last") in wrong and ("conv", "y") in wrong and ("scan", "y") not in wrong
