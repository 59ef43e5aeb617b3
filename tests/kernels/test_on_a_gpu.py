"""What a GPU will be asked, on a CUDA device that is none: nothing meets a tensor of another device on the way.

The device is that of `pretended.py`, the kernels are the packages' CUDA code compiled for the CPU and their Triton code
in its interpreter. So the tests that are for a GPU, the commands of `make gpu` and every method of the gallery run here
as they would there, at small sizes; what differs is only what differs in arithmetic, and time.
"""

import dataclasses
import importlib.util
import re
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mamba_ssm.ops.selective_scan_interface as interface
import pytest
import torch
from helpers import error, near, slow, tiny
from pretended import HERE, There, here, pretended, there
from stand_ins import layer_norm_fn, register
from torch import Tensor
from torch.utils._pytree import tree_map
from typer.testing import CliRunner

from analyses.benchmarks import fused as timed
from analyses.benchmarks import gpu as promised
from interp import (
    Apply,
    HookedMamba,
    Knockout,
    Mean,
    Scale,
    Set,
    ablate,
    align,
    at,
    attention,
    attribution_grid,
    collect,
    contributions,
    decay_bands,
    direct_logit,
    freeze,
    generate,
    gradients,
    knockout,
    load_edits,
    load_grid,
    logit_diff,
    logit_lens,
    patch_grid,
    receptive_field,
    relevance,
    replay,
    run,
    save_edits,
    state_flow,
    state_lens,
    sweep,
)  # fmt: skip
from kernels_bridge import BACKENDS, resolve
from kernels_bridge.__main__ import app
from kernels_bridge.fused import golden, load
from kernels_bridge.harness.draw import SMALL, draw_model
from kernels_bridge.training import Learner, pad
from minimal_mamba import Mamba, MambaConfig

pytestmark = pytest.mark.skipif(not HERE, reason="the pretended device was not compiled")
ROOT = Path(__file__).parents[2]


class Event:
    def __init__(self, enable_timing: bool):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device, and the extension whose functions torch's dispatcher does not know."""
    real = interface.selective_scan_cuda

    def taken(function: Any) -> Any:
        return lambda *given: tree_map(there, function(*map(here, given)))

    both = types.SimpleNamespace(fwd=taken(real.fwd), bwd=taken(real.bwd))
    monkeypatch.setattr(interface, "selective_scan_cuda", both)
    card = types.SimpleNamespace(multi_processor_count=2, name="pretended")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *given: card)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: 0)
    with pretended():
        yield


def back(value: Any) -> Any:
    return tree_map(lambda x: x.detach().cpu().nan_to_num() if isinstance(x, Tensor) else x, value)


# -- the device itself ------------------------------------------------------------------------------------------------


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    x, y, i = torch.zeros(2, 3, device="cuda"), torch.zeros(2, 3), torch.tensor([0, 1])
    assert (
        x.device == torch.device("cuda:0")
        and (x + 1).is_cuda
        and isinstance(x[i], There)
        and x.tolist() == [[0] * 3] * 2
    )
    assert (x + torch.tensor(1.0)).is_cuda and x[x > 0].is_cuda and not x.cpu().is_cuda
    for refused in (
        lambda: x + y, lambda: torch.cat([x, y]), lambda: x @ y.T, lambda: torch.where(y > 0, x, 0.0),
        lambda: y[i.to("cuda")], lambda: x.index_select(0, i), lambda: x.index_put((i,), y),
        lambda: x.gather(0, i[None]),
        lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        lambda: torch.randn(2, generator=torch.Generator("cuda")),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            refused()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    leaf = torch.ones(3, device="cuda", requires_grad=True)
    (leaf.square() * x).sum().backward()
    assert leaf.grad is not None and leaf.grad.is_cuda


# -- every method -----------------------------------------------------------------------------------------------------

PAGE = (ROOT / "analyses/methods/README.md").read_text()
for more, fewer in (("n=8", "n=3"), ("steps=8", "steps=2"), ("(50, 100, 200)", "(50,)")):
    assert more in PAGE
    PAGE = PAGE.replace(more, fewer)
SHARED, *SECTIONS = PAGE.split("\n## ")
LONG = {"Circuits", "Patch sweep", "Linear probes", "Path patching and edge attribution"}
assert {s.splitlines()[0] for s in SECTIONS} >= LONG


def block(text: str) -> str:
    return re.findall(r"```python\n(.*?)```", text, re.S)[0]


@pytest.fixture
def norms(plain_norms: None, monkeypatch: pytest.MonkeyPatch) -> None:
    register(dataclasses.replace(load(), layer_norm_fn=layer_norm_fn), monkeypatch)


@pytest.mark.parametrize(
    "section", [s if s.splitlines()[0] not in LONG else slow(s)[0] for s in SECTIONS], ids=lambda s: s.splitlines()[0]
)
def test_the_example_of_a_method_runs(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model on the device, the tokens where they were read; on torch's operations, which take less time here."""
    monkeypatch.setitem(BACKENDS, "fused", BACKENDS["torch"])
    space: dict[str, Any] = {}
    exec(compile(block(SHARED), "README.md", "exec"), space)
    space["model"].to("cuda")
    exec(compile(block(section), section.splitlines()[0], "exec"), space)


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize(("backend", "moved"), [*slow(("reference", True)), ("torch", False), ("fused", False)])
def test_a_run_gives_what_it_gives_on_a_cpu(backend: str, moved: bool, tmp_path: Path) -> None:
    """Edits, recordings, padding, carried states, gradients, sweeps and what is saved; tokens on either device."""
    single = tiny().float()
    ids, donor = torch.randint(0, 29, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    record = [at.ssm_state(), at.conv_state(layer=1, pos=2), at.u(layer=0)]
    new = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(1))

    def all_of(model: Mamba, ids: Tensor, donor: Tensor, folder: Path) -> list[Any]:
        how: dict[str, Any] = {"backend": backend if model.device.type == "cuda" else "reference"}
        edits = [
            Set(at.ssm_state(layer=1, pos=3), new), Scale(at.conv_state(layer=0, pos=2), 0.5),
            Mean(at.z(layer=2, pos=1)),
            Scale(at.state_write(layer=0, pos=[1, 4]), 2.0, rows=[0, 2]), Apply(at.dt(layer=2), torch.sqrt),
        ]  # fmt: skip
        first = run(model, ids, edits, record, lengths=[6, 5, 5], keep_state=True, **how)
        found: list[Any] = [first.logits, *(first[a] for a in record), first.last_logits]
        found += [run(model, donor[:, :2], state=first.state, last_only=True, **how).logits]
        found += [generate(model, ids, 3, edits[:2], **how).ids]
        found += [generate(model, ids, 3, edits[:2], temperature=0.0, **how).logits]
        open_end = at.ssm_state(layer=1, pos=slice(2, None))
        stop = int(generate(model, ids, 1, Scale(open_end, 1.1), **how).ids[1, -1])  # row 1 stops at once
        ended = generate(model, ids, 3, Scale(open_end, 1.1), open_end, stop=stop, **how)
        assert ended.lengths[1] == 7 < int(ended.lengths.max())
        found += [ended.logits, ended.last_logits, ended[open_end].nan_to_num(), *ended.state.ssm_state, ended.lengths]
        later = generate(model, ids[:, :1], 2, state=first.state, temperature=1.0, top_k=1, top_p=0.9, **how)
        found += [later.ids, later.last_logits]
        places = [at.ssm_state(layer=0, pos=[1, 4]), at.state_write(layer=1), at.resid_pre(layer=2)]
        made = gradients(model, ids, lambda x: logit_diff(x[:, -1], 3, 5), places, edits=edits[:2], **how)
        found += [made[p] for p in places]
        places, half = [at.ssm_state(), at.embed()], Scale(at.u(layer=0), 0.5)
        shared = relevance(model, donor, lambda x: logit_diff(x[:, -1], 3, 5), places, half, state=first.state, **how)
        found += [*(shared[p] for p in places), *shared.state.ssm_state, *shared.state.conv_state]
        save_edits(edits[:4], folder / "edits")
        found += [run(model, ids, load_edits(folder / "edits"), **how).logits]

        def score(logits: Tensor) -> Tensor:
            return logit_diff(logits, torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8]))

        how |= {"metric": score, "progress": False}
        grid = patch_grid(model, ids, donor, site="recurrent_state", path=folder / "grid", **how)
        again = replay(folder / "grid", model, score, progress=False)
        found += [grid.values, load_grid(folder / "grid").values, again.values]
        cells = [[Scale(at.u(layer=i, pos=p), 0.0)] for i in (0, 2) for p in (0, 3)]
        found += [sweep(model, ids, cells, **how).values]
        model.save_pretrained(folder / "model")
        found += [run(Mamba.from_pretrained(folder / "model", device=model.device), ids, backend=how["backend"]).logits]
        hooked, cache = HookedMamba(model, backend=how["backend"]).run_with_cache(ids)
        return [*back(found), hooked.cpu(), cache["blocks.1.hook_h.3"].cpu()]

    want = all_of(single, ids, donor, tmp_path / "cpu")
    tokens = (ids.to("cuda"), donor.to("cuda")) if moved else (ids, donor)
    for a, b in zip(all_of(tiny().float().to("cuda"), *tokens, tmp_path / "gpu"), want, strict=True):
        near(a, b, 3e-5) if a.is_floating_point() else torch.testing.assert_close(a, b)


def test_what_the_examples_leave_out() -> None:
    """Masks, directions, parts and donors that were made on the CPU, and rows of unequal lengths."""
    ids, donor = torch.randint(0, 29, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    mask, lengths = torch.arange(24 * 5).reshape(24, 5) % 3 == 0, [6, 4, 5]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given_input = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    place = at.ssm_state(layer=1, pos=2)

    def all_of(model: Mamba) -> list[Any]:
        how: dict[str, Any] = {"lengths": lengths, "backend": "torch"}

        def score(logits: Tensor) -> Tensor:
            return logit_diff(logits, 3, 5)

        found: list[Any] = [mask & ~mask, *decay_bands(model, 1, [2.0, 8.0])]
        for change in (ablate(place, "resample", values=values, mask=mask), freeze(layer=2, pos=1, mask=mask)):
            found.append(run(model, ids, change, **how).logits)
        found += [direct_logit(model, ids, direction, **how).total(), state_lens(model, ids, direction, **how).values]
        cells: dict[str, Any] = {"site": "ssm_state", "metric": score, "positions": [1, 3], "progress": False}
        for parts in ({"some": {"e": [1, 2], "n": slice(2)}}, {"masked": mask}):
            for source in ("donor", "mean", "noise"):
                given = donor if source != "noise" else None
                found.append(patch_grid(model, ids, given, parts=parts, source=source, **cells, **how).values)
        cells |= {"positions": [-4, -1]}
        found.append(patch_grid(model, ids, donor, **cells, **how).values)
        for form in ("scan", "block"):
            read = attention(model, ids, layer=1, form=form, targets=[-2, -1], sources=[0, 1, 2], **how)
            found += [read.weights, *([read.reconstruct()] if form == "block" else [])]
        found += [contributions(model, ids, layer=1, targets=[-1], sources=[0, 1], **how).values]
        cuts = [Knockout(1, 3, layer=[0, 1], through=way) for way in ("scan", "conv", "selection", "all")]
        found += [
            knockout(model, ids, [cut], baseline=b, **how).logits for cut in cuts for b in ("zero", "mean", given_input)
        ]
        found += [attribution_grid(model, ids, donor, site=s, metric=score, **how).values for s in ("ssm_state", "dt")]
        kept = collect(model, ids, at.resid_post(layer=1, pos=-1), **how)
        found += [*kept.values(), *logit_lens(model, ids, torch.tensor([[1], [2], [3]]), **how)]
        field = receptive_field(model, ids, layer=1, **how)
        found += [field.share, field.width(0.9), state_flow(model, ids, layer=1, **how).write]
        return back(found)

    want = all_of(tiny())
    for a, b in zip(all_of(tiny().to("cuda")), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize(("backend", "moved"), [("torch", True), *slow(("torch", False)), ("fused", False)])
def test_an_alignment_is_what_it_is_on_a_cpu(backend: str, moved: bool) -> None:
    """The search, its controls and its edits; from a carried memory, in rows of unequal lengths, tokens anywhere."""
    ids, donor = torch.randint(0, 29, (2, 10, 6), generator=torch.Generator().manual_seed(0))
    targets, lengths = torch.arange(10) + 3, torch.tensor([6, 4, 5, 6, 4] * 2)

    def all_of(model: Mamba) -> list[Any]:
        there = model.device.type == "cuda"
        tokens = [x.to(model.device) if moved else x for x in (ids, donor, targets, lengths)]
        how: dict[str, Any] = {"backend": backend if there else "reference", "lengths": tokens[3]}
        how["state"] = run(model, ids[:, :2], backend=how["backend"], keep_state=True).state
        found: list[Any] = []
        for place, scale in ((at.ssm_state(layer=1, pos=-2), True), (at.conv_state(layer=[0, 1], pos=4), False)):
            made = align(model, *tokens[:3], place, 2, scale=scale, epochs=1, batch=4, progress=False, **how)
            scores = [made.held_out, made.fitted, *(one for several in made.controls.values() for one in several)]
            found += [torch.tensor([[s.log_prob, s.accuracy] for s in scores]), made.tested, made.losses, made.spread]
            found += [made.basis.flatten(1).T @ made.basis.flatten(1), made.scale]
            values = [run(model, x, record=[place], **how)[place] for x in (donor, ids)]
            found += [run(model, ids, made.swap(*values), **how).last_logits]
            if not place.layer_axis:
                found += [run(model, ids, made.swap(values[0]), **how).last_logits]
        return back(found)

    dtype, bound = (torch.float32, 2e-3) if backend == "fused" else (torch.float64, 1e-6)
    want = all_of(tiny().to(dtype))
    for a, b in zip(all_of(tiny().to("cuda", dtype)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def test_training_gives_what_it_gives_on_a_cpu() -> None:
    """As `Trainer` calls it: the batch with its padding on the device, a loss, a backward."""
    batch = pad([{"input_ids": [3, 1, 4, 1, 5]}, {"input_ids": [9, 2, 6]}])
    found = []
    for device in ("cpu", "cuda"):
        model = tiny().to(device)
        Learner(model, resolve("torch"))(**{k: v.to(device) for k, v in batch.items()})["loss"].backward()
        found.append([back(p.grad) for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        near(a, b)


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_autocast(dtype: torch.dtype, keep: bool) -> None:
    """float32 weights under autocast err at most twice as the readable model whose weights are rounded; gradients, of
    which a rounding more or less in so small a model moves all, four times.
    """
    ids = torch.randint(0, 29, (2, 17), generator=torch.Generator().manual_seed(17))
    small, exact, single = tiny(seed=5).to(dtype), tiny(seed=5).float().double(), tiny(seed=5).float().to("cuda")
    want, plain = (run(m, ids, backend="reference", keep_state=keep).logits for m in (exact, small))
    with torch.autocast("cuda", dtype):
        got = run(single, ids, backend="fused", keep_state=keep).logits
    assert got.dtype == dtype and error(got.cpu(), want) <= 2 * error(plain, want)
    true, grads, rounded = (
        torch.autograd.grad(x.double().square().sum(), [*m.parameters()])
        for x, m in ((want, exact), (got, single), (plain, small))
    )
    assert all(g.dtype == torch.float32 for g in grads)
    ours, theirs = (sum(error(g.cpu(), t) for g, t in zip(x, true, strict=True)) / len(true) for x in (grads, rounded))
    assert 0 < ours <= 4 * theirs


# -- what is for a GPU ------------------------------------------------------------------------------------------------


def gpu_tests() -> Any:
    """The module of the tests that `make gpu` runs; what it skips by is asked when it is made."""
    spec = importlib.util.spec_from_file_location("gpu_tests", ROOT / "tests/kernels_bridge/test_fused_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("test_every_length", [1]), ("test_every_length", [17]), ("test_every_length", [128]),
        ("test_under_edits", [17]),
        ("test_a_stretch_whose_rows_begin_anywhere", []), ("test_gradients_are_whole", [5]),
        ("test_sixteen_bits", [torch.bfloat16]), ("test_decoding_changes_no_carried_state", []),
        ("test_the_kernels_own_states", []),
    ],
)  # fmt: skip
def test_a_test_that_is_for_a_gpu(name: str, given: list[Any]) -> None:
    assert getattr(gpu_tests(), name)(*given) is None


def test_the_golden_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "LENGTHS", (1, 5, 129))
    told = CliRunner().invoke(app, ["record", str(tmp_path / "new" / "golden.safetensors")])
    assert told.exit_code == 0 and "PASS" in told.output, told.output
    wrong = [
        (c.name, q, e) for c, q, e, bound in golden.replay(tmp_path / "new" / "golden.safetensors") if not e <= bound
    ]
    assert not wrong, wrong


def test_a_fault_of_the_kernels_ends_the_recording_with_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return load().causal_conv1d_fn(x, weight.roll(1, 1), bias)

    real = load()
    monkeypatch.setattr(golden, "cases", lambda: iter([golden.Case("conv", torch.float32, 5)]))
    monkeypatch.setattr(golden, "load", lambda: dataclasses.replace(real, causal_conv1d_fn=shifted))
    told = CliRunner().invoke(app, ["record", str(tmp_path / "golden.safetensors")])
    assert told.exit_code == 1 and "FAIL" in told.output, told.output


@pytest.mark.usefixtures("norms", "few_rows")
def test_the_check_and_its_file(tmp_path: Path) -> None:
    """Of the fused backend, and of mamba-ssm's own model."""
    config = dataclasses.replace(SMALL, d_model=16, dt_rank=4)
    draw_model(config, 0).save_pretrained(tmp_path / "model")
    for target, kinds in (
        ("fused", "operations,mixers,layers,model,edits,gradients,padding"),
        ("mamba_ssm", "mixers,model,gradients"),
    ):
        json = tmp_path / f"{target}.json"
        how = ["--device", "cuda", "--model", str(tmp_path / "model"), "--lengths", "5", "--kinds", kinds]
        told = CliRunner().invoke(app, ["check", "--target", target, "--json", str(json), *how])
        assert told.exit_code == 0, told.output
        assert "PASS" in told.output and '"device": "cuda"' in json.read_text()


@pytest.mark.usefixtures("norms")
def test_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MambaConfig(16, 2, 32)
    monkeypatch.setattr(timed, "bandwidth", lambda device: 1e12)
    found = timed.measure(config, 2, 130, 1, torch.float32)
    assert found["logits against mamba-ssm's, relative"] < 1e-4
    assert max(found["ways"]["against stretches"].values()) < 1e-4
    found["sweep"] = promised.sweep(config, 2, 4, 1, "cuda", "fused")
    found["ratios"]["state sweep, readable over fused"] = found["sweep"]["ratio"]
    found |= {"floor": promised.floor(config, 2, 130, torch.float32, "cuda"), "rehearsal": False}
    assert "training step, mamba-ssm" in promised.table(found)
