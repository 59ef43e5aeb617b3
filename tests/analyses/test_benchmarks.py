"""The benchmarks at toy sizes: every kind of work runs, and nothing wrong is ever timed."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import needs_hf_scan

pytest.importorskip("transformers")

from analyses.benchmarks import cpu, floor, fused, gpu, growth, memory, peers, report, rounds
from analyses.benchmarks.cpu import LABELS, Piece
from analyses.pages import PageError, placed

HERE = ("HF transformers", "mambapy sequential")


@pytest.mark.parametrize("kind", LABELS)
def test_every_kind_of_work_is_checked_and_timed(kind):
    if kind == "ssm_state":
        needs_hf_scan()
    piece = Piece(kind, "tiny", 2, 6, new=3 if kind == "decode" else 0)
    found = cpu.measure(piece, HERE, seconds=0.0)
    assert "mambascope torch" in found["seconds"]
    assert all(t["rounds"] in (1, 3) and 0 < t["q1"] <= t["median"] <= t["q3"] for t in found["seconds"].values())
    assert set(found["error_against_float64"]) == set(found["seconds"]) and not found["refused"]
    assert set(HERE) == set(found["seconds"]) & set(HERE) | set(found["left_out"])
    assert min(found["controls"].values()) > cpu.DIFFER > 1e-5 > max(found["error_against_float64"].values())
    assert 0 < found["floor"]["floor_s"] < found["seconds"]["mambascope torch"]["median"]


def test_threads_are_measured_in_turn_and_left_as_they_were():
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        steps = {"mambascope torch": (lambda ids: seen.append(torch.get_num_threads()), 1.0)}
        found = rounds.scaling(steps, lambda: torch.zeros(1), 0.0, "work")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 12 and seen.count(1) == seen.count(2)  # 3 rounds, each step once before it is timed
    assert all(t["rounds"] == 3 for t in found["mambascope torch"].values())


class Deaf(peers.HF):
    """A peer whose hooks do not fire."""

    def cell(self, site, ids, donor, clean):
        return lambda layer, pos: self.forward(ids)[:, -1]


class Raises(peers.HF):
    """A peer that says what is wrong."""

    def cell(self, site, ids, donor, clean):
        raise KeyError("blocks.0.mixer.hook_ssm_state")


class Shifted(peers.HF):
    """A peer whose weights are not the model's."""

    def __init__(self, model):
        super().__init__(model)
        self.hf.backbone.layers[0].mixer.D.data.add_(0.01)


@pytest.mark.parametrize("kind", ["ssm_state", "resid_post"])
def test_a_peer_whose_hooks_do_not_fire_is_named_and_not_timed(kind, monkeypatch):
    if kind == "ssm_state":
        needs_hf_scan()
    monkeypatch.setattr(peers, "KINDS", {"deaf": Deaf, "raises": Raises, "shifted": Shifted, "right": peers.HF})
    found = cpu.measure(Piece(kind, "tiny", 2, 5), tuple(peers.KINDS), seconds=0.0)
    assert set(found["seconds"]) == {f"mambascope {b}" for b in peers.ours_here()} | {"right"}
    assert "does not agree" in found["refused"]["deaf"] and "does not agree" in found["refused"]["shifted"]
    assert "hook_ssm_state" in found["refused"]["raises"]


@pytest.mark.parametrize("kind", ["forward", "train", "states", "ssm_state", "decode"])
def test_a_fault_of_ours_stops_everything(kind, monkeypatch):
    made = peers.Ours.__init__

    def wrong(self, model, backend):
        made(self, model if backend == "reference" else copy.deepcopy(model), backend)
        if backend == "torch":
            self.model.backbone.layers[1].mixer.A_log.data[0, 0] += 0.1

    monkeypatch.setattr(peers.Ours, "__init__", wrong)
    with pytest.raises(RuntimeError, match=r"torch: the grid|mambascope torch"):
        cpu.measure(Piece(kind, "tiny", 2, 6, new=3 if kind == "decode" else 0), (), seconds=0.0)


def test_weights_that_are_blind_to_the_scan_stop_everything(monkeypatch):
    def blind(size, seed=0):
        model = cpu.Mamba(cpu.MambaConfig(16, 2, vocab_size=32))
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.data.mul_(1e-3)
        return model

    monkeypatch.setattr(cpu, "make", blind)
    with pytest.raises(RuntimeError, match="scan zeroed"):
        cpu.measure(Piece("forward", "tiny", 2, 6), (), seconds=0.0)


def test_a_grid_that_is_not_that_of_its_cells_stops_everything(monkeypatch):
    right = peers.Ours.grid
    monkeypatch.setattr(peers.Ours, "grid", lambda self, *a: right(self, *a).roll(1, 1))
    with pytest.raises(RuntimeError, match="one run a cell"):
        cpu.measure(Piece("ssm_state", "tiny", 2, 5), (), seconds=0.0)


def test_the_quantities_of_the_floor():
    c = cpu.MambaConfig(128, 4, vocab_size=512)
    of_a_token = sum(2 * k * n * times for k, n, times in floor.products(c))
    weights = sum(p.numel() for name, p in cpu.Mamba(c).named_parameters() if p.dim() == 2 and "A_log" not in name)
    assert of_a_token == 2 * weights  # every matrix once a token; embedding and lm_head are one
    forward, train = (floor.floor(kind, c, 1, 16) for kind in ("forward", "train"))
    assert train["floor_s"] == 3 * train["forward_s"]
    assert forward["floor_s"] > forward["matrix_products_s"] > 0


def test_the_floor_of_a_sweep(monkeypatch):
    """By hand, in multiply-adds: 3 layers, of 2 tokens a cell 1.5 on average."""
    c = cpu.MambaConfig(16, 3, vocab_size=32, d_state=4, dt_rank=2)  # e 32
    rates = {"in_proj_s": 16 * 64, "x_proj_s": 32 * 10, "dt_proj_s": 2 * 32, "out_proj_s": 32 * 16}
    products = sum(rates.values())
    shared = {"multiply_adds_per_s": 1.0, "exponentials_per_s": 0.1}

    def counted(c, tokens):
        every = {"matrix_products_s": tokens * (3 * products + 16 * 32)}
        return {name: t * tokens for name, t in rates.items()} | every | shared

    monkeypatch.setattr(floor, "rates", counted)
    scan = 32 * 4 * (4 + 10)
    carried, last = 512 + 2 * 128, 512 + 320 * 6 / 10 + 64 + scan - 128
    for kind, cells in (("ssm_state", (products + scan) + 2 * (last + carried)), ("resid_post", last + carried)):
        found = floor.floor(kind, c, 1, 2)
        assert found["floor_s"] == pytest.approx(2 * found["forward_s"] + 2 * 1.5 * cells)


def test_memory_is_that_of_what_is_held():
    def hold(mb):
        return lambda: torch.zeros(mb * 2**18)

    few, many = (memory.alone(lambda mb=mb: memory.cost(hold(mb), hold(1)))["mb"] for mb in (40, 200))
    assert 38 < few < 60 and 195 < many < 240  # below 32 MB the heap may have room that earlier tests left
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        memory.alone(lambda: 1 / 0)


def test_the_scan_holds_nothing_that_grows_with_the_length_but_its_output():
    found = memory.alone(lambda: growth.point("scan, length", 16384, "torch", calls=0))  # a tensor of its inputs: 16 MB
    assert found["mb"] - found["output"] < growth.BEYOND


def test_growth_is_measured_and_judged(tmp_path):
    axes = {"scan, length": (64, 256), "length": (16, 32), "batch": (2,), "layers": (2,),
            "edited positions a layer": (0, 2)}  # fmt: skip
    found = growth.measure("torch", axes, "tiny", calls=1)
    assert {a: [p["x"] for p in points] for a, points in found["axes"].items()} == {a: [*xs] for a, xs in axes.items()}
    assert found["checks"]["constant"]
    made = growth.figure([found], tmp_path / "growth")
    assert all(path.stat().st_size > 1000 for path in made)
    square = {"scan, length": [{"x": x, "seconds": x**2, "mb": x, "output": 0.0} for x in (10, 100)]}
    assert growth.checks(square) | {"slope": 0} == {"slope": 0, "linear": False, "beyond_mb": 100, "constant": False}


def result(work, environment, peer, seconds, **more):
    stats = {n: {"median": s, "q1": s, "q3": s, "min": s, "rounds": 3} for n, s in seconds.items()}
    ratio = {n: seconds[peer] / s for n, s in seconds.items() if n.startswith("mambascope")}
    return {"work": work, "environment": environment, "threads": 1, "seconds": stats, "ratio": ratio,
            "fastest_peer": peer, "floor": {"floor_s": 0.05}, "error_against_float64": dict.fromkeys(seconds, 1e-7),
            "controls": {"scan zeroed": 1.0}, "left_out": {}, "refused": {}} | more  # fmt: skip


def test_the_tables_take_the_fastest_peer_of_any_environment(tmp_path):
    work = "forward S, batch 8, length 256"
    (tmp_path / "cpu").mkdir()
    for r in (
        result(work, "peers", "HF transformers", {"mambascope torch": 0.1, "HF transformers": 0.6},
               left_out={"MambaLens": "-"}),
        result(work, "lens", "MambaLens", {"mambascope torch": 0.1, "MambaLens": 0.4}, left_out={"nnsight": "why"}),
        result(f"{work}, all threads", "peers", "HF transformers", {"mambascope torch": 0.05, "HF transformers": 0.6}),
    ):  # fmt: skip
        if r["work"].endswith("all threads"):
            of = r["seconds"]["mambascope torch"]
            r["threads_over_one"] = {"mambascope torch": {"one": of | {"median": 0.09}, "all": of}}
        name = r["work"].replace(" ", "-") + f".{r['environment']}.json"
        (tmp_path / "cpu" / name).write_text(json.dumps(r))
    found = report.load(tmp_path)
    assert report.best(found[work]) == ("mambascope torch", pytest.approx(4.0), "MambaLens")
    assert report.summary(found[work])["left_out"] == {"nnsight": "why"}
    assert f"| {work} | 100 ms | MambaLens, 400 ms | 4.0x | 50 ms |" in report.markdown(found)
    assert "4.0x    8.0x  mambascope torch, MambaLens  MISSED" in report.targets(found)
    assert report.speedups(found[f"{work}, all threads"]) == {"mambascope torch": pytest.approx(1.8)}  # in turn
    assert report.speedups(found[work]) == {} and f"| {work} | 1.80x |" in report.markdown(found)
    assert "1.7x     1.8x       -  mambascope torch, one thread" in report.targets(found)
    assert "HF transformers" in report.table(found)


def test_the_results_that_ship_say_where_they_come_from():
    for path in Path(report.RESULTS).rglob("*.json"):
        made = json.loads(path.read_text())
        assert made["provenance"]["packages"]["torch"], path
    for work, several in report.load().items():
        assert work.removeprefix("memory, ") in cpu.PIECES or work.startswith("memory, "), work
        assert all(max(r.get("error_against_float64", {"": 0}).values()) < 1e-3 for r in several)


def test_the_command_for_a_gpu_rehearses_on_a_cpu_and_says_what_is_missing():
    from typer.testing import CliRunner

    from analyses.benchmarks.__main__ import app

    rehearsed = CliRunner().invoke(app, ["gpu", "--device", "cpu", "--rounds", "1"])
    assert rehearsed.exit_code == 0, rehearsed.output
    assert "rehearsal" in rehearsed.output and "8 states set, over clean" in rehearsed.output
    if not torch.cuda.is_available():
        refused = CliRunner().invoke(app, ["gpu"])
        assert refused.exit_code == 1 and "no CUDA device" in refused.output


def test_sixteen_bits_of_many_layers_are_timed():
    """Two roundings of them lie far apart; that the models are the same is judged in float32."""
    found = fused.measure(cpu.MambaConfig(16, 24, 32), 2, 70, 1, torch.bfloat16, "cpu", "torch")
    assert found["logits against mamba-ssm's in bfloat16"] > 0.05
    assert found["logits against mamba-ssm's, relative"] < 1e-4 and min(found["ratios"].values()) > 0


def test_models_that_differ_are_not_timed(monkeypatch):
    real = fused.models

    def other(*how):
        ours, theirs = real(*how)
        theirs.backbone.layers[0].mixer.D.data *= 1.5
        return ours, theirs

    monkeypatch.setattr(fused, "models", other)
    with pytest.raises(RuntimeError, match="differ"):
        fused.measure(cpu.MambaConfig(16, 2, 32), 2, 70, 1, torch.bfloat16, "cpu", "torch")


def test_a_sweep_that_does_not_agree_is_not_timed(monkeypatch):
    right = gpu.patch_grid

    def wrong(*a, backend, **kw):
        made = right(*a, backend=backend, **kw)
        made.values.add_(backend == "torch")
        return made

    monkeypatch.setattr(gpu, "patch_grid", wrong)
    with pytest.raises(RuntimeError, match="differ"):
        gpu.sweep(cpu.MambaConfig(16, 2, 32), 2, 6, 1, "cpu", "torch")


def test_tables_are_put_between_the_marks():
    first, last = "<!-- times -->\n", "\n<!-- /times -->"
    assert placed(f"a\n{first}old{last}\nb", "times", "new") == f"a\n{first}new{last}\nb"
    with pytest.raises(PageError, match="<!-- times -->"):
        placed("no marks", "times", "new")
