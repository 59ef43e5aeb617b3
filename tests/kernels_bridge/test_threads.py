"""Work in parts on several threads: each part once, on torch's threads or on others, and the same results."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny
from torch import Tensor

from kernels_bridge import resolve, threads, torch_scan
from kernels_bridge.backends import BACKENDS

HERE = [name for name in ("torch", "compiled") if not BACKENDS[name].missing(torch.device("cpu"))]


@pytest.fixture(params=["torch's threads", "others", "after a fork"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which threads take part."""
    if request.param == "others":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif request.param == "after a fork":
        monkeypatch.setattr(threads, "PROCESS", os.getpid() + 1)
    elif threads._openmp() is None:
        pytest.skip("torch came without GNU OpenMP")
    return str(request.param)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_part_is_done_once(kind: str, count: int) -> None:
    done: list[int] = []
    at_once, seen = threading.Barrier(count, timeout=20), set[int]()

    def do(part: int) -> None:
        if part < count:
            at_once.wait()  # the first parts need as many threads as were asked for
        seen.add(threading.get_ident())
        done.append(part)

    threads.over(range(20), do, count)
    assert sorted(done) == [*range(20)] and len(seen) == count and threading.get_ident() in seen


def test_more_threads_than_there_are_miss_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP may give fewer than it was asked for, one inside of a region of its own."""
    done: list[int] = []
    monkeypatch.setattr(threads, "_openmp", lambda: lambda call, data, count, flags: call(None))
    threads.over(range(7), done.append, 4)
    assert done == [*range(7)]


def test_what_fails_on_a_thread_is_raised_here(kind: str) -> None:
    at_once = threading.Barrier(2, timeout=20)

    def do(part: int) -> None:
        at_once.wait()
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError("there")

    with pytest.raises(ZeroDivisionError, match="there"):
        threads.over(range(2), do, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_threads_that_are_not_there() -> None:
    """In a process of its own, for as long as it would hang; the parent has used torch's threads before."""
    code = """
import os, time
from kernels_bridge.threads import over
over(range(4), lambda part: time.sleep(0.01), 2)
child = os.fork()
done = []
over(range(4), done.append, 2)
assert sorted(done) == [0, 1, 2, 3]
if child:
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_modes_are_the_callers(kind: str, mode: type) -> None:
    at_once, found = threading.Barrier(2, timeout=20), list[tuple[bool, bool]]()

    def do(part: int) -> None:
        at_once.wait()
        found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with mode():
        want = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        threads.over(range(2), do, 2)
    assert found == [want] * 2


@pytest.fixture
def several() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_inside_of_a_part_there_is_one_thread(kind: str, several: None) -> None:
    """So that what a part does is not cut again; alone, a work that asked for one thread keeps the others free."""
    torch.set_num_threads(3)
    found = list[int]()
    threads.over(range(4), lambda part: threads.over([part], lambda part: found.append(threads.free()), 1), 2)
    assert found == [1] * 4
    threads.over([0], lambda part: found.append(threads.free()), 1)
    assert found[4:] == [3] and threads.free() == 3


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
@pytest.mark.parametrize("backend", HERE)
def test_a_model_does_not_depend_on_them(
    rows: int, backend: str, kind: str, several: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and all gradients, with fewer rows than threads too; the blocks of `torch` are cut otherwise."""
    monkeypatch.setattr(torch_scan, "FEW", 0)
    if backend == "compiled":
        from kernels_bridge.compiled import loop

        monkeypatch.setattr(loop, "FEW", 0)
    model, ids = tiny(n_layer=2), torch.randint(0, 29, (rows, 70), generator=torch.Generator().manual_seed(0))

    def everything(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        out = model(ids, keep_state=True, ops=resolve(backend))
        values = [out.logits, *out.state.ssm_state]
        g = torch.Generator().manual_seed(1)
        loss = sum((v * torch.randn(v.shape, generator=g, dtype=torch.float64)).sum() for v in values)
        with torch.inference_mode():
            values.append(model(ids, ops=resolve(backend)).logits.clone())
        return [*values, *torch.autograd.grad(loss, list(model.parameters()))]

    one = everything(1)
    for count in (2, 4):
        for got, want in zip(everything(count), one, strict=True):
            assert (got - want).norm() <= 1e-12 * want.norm()
