"""The study's experiments: what they count is what they say, on models whose inner working is known."""

import json

import numpy as np
import pytest
import torch

from analyses.hidden_reasoning import DOUBLETHINK, MASKED, Task, draw
from analyses.hidden_reasoning.experiments import accuracy, aligning, channels, handover, patching, probing
from analyses.hidden_reasoning.experiments.results import VERSION, Results, ResultsError, fingerprint, plain, read
from analyses.hidden_reasoning.organism import load_organism
from analyses.hidden_reasoning.task import held_out, pairs
from interp import Set, align, at, run
from interp import accuracy as right
from kernels_bridge.torch_ops import TORCH
from minimal_mamba import Mamba, MambaConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Mamba(MambaConfig(16, 2, MASKED.tokenizer.vocab_size, d_state=4)).eval()


# -- accuracy ---------------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Answers as told: right, but of prompts whose last operation is `wrong`."""

    def __init__(self, task, wrong=None):
        super().__init__()
        self.task, self.wrong = task, wrong
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, use_cache=False):
        words, logits = self.task.tokenizer.words, torch.zeros(*input_ids.shape, 20)
        for i, row in enumerate(input_ids):
            names = [words[k] for k in row]
            names = names[: names.index("\n")] if "\n" in names else names
            names = [n for n in names if n in self.task.operations]
            value = 0
            for name in names:
                value = int(self.task.table[self.task.operations.index(name), value])
            said = (value + (names[-1] == self.wrong)) % 5
            logits[i, -1, self.task.value_ids[said]] = 1.0
        return type("Out", (), {"logits": logits})


@pytest.mark.parametrize("task", [MASKED, DOUBLETHINK], ids=lambda t: t.name)
@pytest.mark.parametrize("num_steps", [2, 5])
def test_accuracy_counts_right_answers(task, num_steps):
    assert accuracy.score(Oracle(task), num_steps, 60, 0, task=task).right == min(60, 49 if num_steps == 2 else 60)
    found = accuracy.score(Oracle(task, "quad"), num_steps, 10_000, 0, task=task)
    batch = accuracy.fresh(num_steps, 10_000, 0, task)
    last = batch.operations[:, -1] == task.operations.index("quad")
    assert found.prompts == len(batch.ids)
    assert found.right == int((~last).sum()) < found.prompts


def test_fresh_prompts_are_held_out_and_different():
    for steps, most in ((1, 7), (2, 49), (4, None), (6, None)):
        batch = accuracy.fresh(steps, 500, 3)
        ops = [tuple(o) for o in batch.operations.tolist()]
        assert len(set(ops)) == len(ops) == (most or min(500, len(ops)))
        if steps >= 4:
            assert held_out(batch.operations.numpy(), np.full(len(ops), steps)).all()
    assert 150 < len(accuracy.fresh(4, 500, 3).ids) < 330  # of 2401 prompts, a tenth
    one, again = accuracy.fresh(9, 50, 1), accuracy.fresh(9, 50, 1)
    assert torch.equal(one.ids, again.ids)
    assert held_out(one.operations.numpy(), np.full(50, 9)).all()


def test_what_a_model_writes_alone_is_compared_whole(model):
    found = accuracy.score(model, 2, 20, 0, written=True)
    assert found.written == 0  # it was never trained
    batch = accuracy.fresh(2, 20, 0)
    length = int(batch.prompt_length[0])
    written = accuracy._write(model, batch.ids, length)
    with torch.no_grad():
        for t in range(length, batch.ids.shape[1]):
            logits = model(written[:, :t]).logits[:, -1, : MASKED.tokenizer.vocab_size]
            assert torch.equal(logits.argmax(-1), written[:, t])


@pytest.mark.parametrize(("right_", "n"), [(0, 10), (5, 10), (10, 10), (1999, 2000), (0, 0)])
def test_the_interval_holds_the_share_and_is_wilsons(right_, n):
    low, high = accuracy.wilson(right_, n)
    assert 0 <= low <= (right_ / n if n else 0.5) <= high <= 1
    for end in (low, high):
        if n and 0 < end < 1:  # the ends solve |share - p| = 1.96 sqrt(p (1 - p) / n)
            assert abs(right_ / n - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5, rel=1e-6)


# -- hand-overs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [MASKED, Task(start=2), Task(7), Task(acts="s5")], ids=str)
def test_the_accounts_of_a_hand_over(task):
    base, donor = (draw(5, 60, seed, task=task).operations.numpy() for seed in (0, 1))
    for step in range(1, 5):
        found = handover.accounts(base, donor, step, task)
        for i in range(60):
            value = task.start
            for op in [*donor[i, :step], *base[i, step:]]:
                value = int(task.table[op, value])
            assert found["running value"][i] == value
        assert (found["base"] == task.values(base)[:, -1]).all()
        assert (found["done"] == task.values(donor)[:, -1]).all()
        assert ("partial sum" in found) == (task.acts == "arithmetic")
        same = handover.accounts(base, base, step, task)
        assert all((v == same["base"]).all() for v in same.values())


def test_a_partial_sum_foretells_what_its_terms_add_up_to():
    """By hand: the donor is one, triple; the base two, double. After the first step 1 * 3 of the donor's is there."""
    names = MASKED.operations
    base, donor = ([[names.index(a), names.index(b)]] for a, b in (("two", "double"), ("one", "triple")))
    found = handover.accounts(np.array(base), np.array(donor), 1, MASKED)
    assert {k: int(v[0]) for k, v in found.items()} == {
        "base": 4, "running value": 2, "done": 3, "partial sum": 3,
    }  # fmt: skip


def test_answers_are_counted_where_an_account_stands_alone():
    foretold = {"base": np.array([0, 1, 2, 3]), "running value": np.array([0, 2, 2, 4]), "done": np.array([1, 2, 0, 0])}
    found = handover._count(np.array([0, 2, 0, 4]), foretold)
    assert found["none"] == 0
    assert (found["base"]["alone"], found["base"]["of"]) == (0, 2)  # rows 1 and 3
    assert (found["running value"]["alone"], found["running value"]["of"]) == (1, 1)  # row 3
    assert (found["done"]["alone"], found["done"]["of"]) == (1, 3)  # rows 0, 2 and 3


def test_a_hand_over_is_the_edit_that_it_says(model):
    found = handover.handover(model, MASKED, num_steps=3, n=6, seed=0)
    base, donor = (draw(3, 6, [handover.STREAM, 0, i]) for i in range(2))
    ids, others = base.ids[:, :-1], donor.ids[:, :-1]
    assert len(found["ssm_state"]) == 4
    place = at.ssm_state(layer=slice(None), pos=3 + 3 + 2)  # the word of the second operation
    out = run(model, ids, edits=[Set(place, run(model, others, record=[place])[place])])
    said = [MASKED.value_ids.tolist().index(k) if k in MASKED.value_ids else -1 for k in out.last_logits.argmax(-1)]
    row = next(r for r in found["ssm_state"] if (r["step"], r["word"]) == (2, "operation"))
    expected = handover._count(
        np.array(said), handover.accounts(base.operations.numpy(), donor.operations.numpy(), 2, MASKED)
    )
    assert {k: v for k, v in row.items() if k not in ("step", "word", "mean")} == expected
    whole = {r["step"]: r for r in found["recurrent_state"] if r["word"] == "after"}
    cells = handover.shifted(model, MASKED, num_steps=3, n=6, seed=0)
    for r in cells:
        assert r["of"] == 6
        if r["from"] == r["to"]:  # the same hand-over, counted where no other account foretells the same
            assert whole[r["to"]]["running value"]["alone"] <= r["right"]
    assert {(r["from"], r["to"]) for r in cells} == {(i, j) for i in (1, 2) for j in (1, 2)}


def test_an_alignment_asks_for_what_the_bases_operations_make_of_the_donors_value(model, tmp_path):
    kept = Results(tmp_path / "align.json", "align", {}, command="")
    given = {"site": "conv_state", "num_steps": 3, "step": 2, "n": 20, "dimensions": (1, 4), "epochs": 1}
    aligning.aligning(kept, model, MASKED, seeds=2, progress=False, **given)
    parts = kept.made["parts"]
    assert list(parts) == [f"{k} dimensions, seed {seed}" for seed in (0, 1) for k in (1, 4)]
    base, donor = (draw(3, 20, [handover.STREAM, 1, i]) for i in range(2))
    value = MASKED.table[base.operations[:, 2], donor.values[:, 1]]  # the operation that is left, on the donor's value
    place = at.conv_state(layer=slice(None), pos=3 + 3 + 3)  # behind the echo of the second operation
    found = align(model, base.ids[:, :-1], donor.ids[:, :-1], MASKED.value_ids[torch.from_numpy(value)], place, 4,
                  dims=64, epochs=1, seed=1, progress=False)  # fmt: skip
    one = parts["4 dimensions, seed 1"]
    assert one["held_out"]["log_prob"] == pytest.approx(found.held_out.log_prob, rel=1e-5)
    assert one["held_out"]["right"] / one["held_out"]["of"] == pytest.approx(found.held_out.accuracy)
    assert set(one["controls"]) == set(found.controls)
    assert set(parts["1 dimensions, seed 1"]["controls"]) == {"nothing", "whole", "searched", "varying"}


def test_the_mean_memory_of_a_value_is_one_for_all_who_have_come_to_it():
    """In the model that ships: the answers follow it in the conv states and in nothing else."""
    organism = load_organism("masked")[0]
    found = handover.handover(organism, MASKED, num_steps=3, n=60, seed=1)
    for site, least, most in (("conv_state", 60, 60), ("ssm_state", 0, 12)):
        for r in found[site]:
            assert least <= r["mean"]["right"] <= most and r["mean"]["of"] == 60, (site, r)
    untrained = handover.handover(Mamba(organism.config).eval(), MASKED, num_steps=3, n=60, seed=1)
    assert max(r["mean"]["right"] for r in untrained["conv_state"]) < 40


# -- patching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [MASKED, DOUBLETHINK], ids=lambda t: t.name)
def test_words_name_the_positions_of_a_pair(task):
    found = pairs(4, 3, 0, which_step=1, task=task)
    words = patching.words(task, 4, 1)
    assert len(words) == found.base_ids.shape[1]
    assert [i for i, word in enumerate(words) if word == "op2*"] == found.positions[0].tolist()
    assert probing.places(task, 4) == [i for i, word in enumerate(words) if word.startswith("op")][4:]


def test_a_map_is_one_run_a_cell(model):
    found = pairs(2, 8, 0, which_step=0)
    part = patching.maps(model, found, "ssm_state", [0, (0, 1)], progress=False)
    assert part["layers"] == (0, (0, 1))
    place = at.ssm_state(layer=[0, 1], pos=6)
    out = run(model, found.base_ids, edits=[Set(place, run(model, found.donor_ids, record=[place])[place])])
    flip = 1 - right(out, found.base_answer)
    assert part["flip"][1, 6] == flip.mean()
    assert part["share"].shape == part["error"].shape == part["flip"].shape == (2, found.base_ids.shape[1])


def test_a_mean_put_in_is_the_mean_over_the_pairs(model):
    found = pairs(2, 8, 0, which_step=0)
    part = patching.necessity(model, found, "conv_state", [1], progress=False)
    place = at.conv_state(layer=1, pos=5)
    mean = run(model, found.base_ids, record=[place])[place].mean(0, keepdim=True).expand(8, -1, -1)
    out = run(model, found.base_ids, edits=[Set(place, mean)])
    assert part["right"][0, 5] == right(out, found.base_answer).mean()


def test_without_its_state_a_model_is_one_that_writes_none():
    torch.manual_seed(3)
    whole = Mamba(MambaConfig(16, 2, MASKED.tokenizer.vocab_size, d_state=4)).eval()
    for block in whole.backbone.layers:
        block.mixer.x_proj.weight.data *= 8
    bare = Mamba(whole.config).eval()
    bare.load_state_dict(whole.state_dict())
    for block in bare.backbone.layers:
        block.mixer.x_proj.weight.data[-8:] = 0  # B and C
    found = accuracy.fresh(3, 200, 0)
    ids = found.ids[:, : int(found.answer_at[0]) + 1]
    hits = [int(right(run(m, ids, last_only=True), found.answer_ids).sum()) for m in (whole, bare)]
    made = patching.without(whole, MASKED, 3, 200, seed=0)
    assert [made[what]["answers"]["right"] for what in ("nothing", "SSM state")] == hits
    assert hits[0] != hits[1]
    assert made["conv state"]["answers"]["right"] not in hits
    words = whole.config.vocab_size
    guesses = [run(m, ids).logits[..., :words].argmax(-1) for m in (whole, bare)]
    echo = [sum(int((guess[:, p - 1] == ids[:, p]).sum()) for p in (6, 8, 10)) for guess in guesses]
    assert [made[what]["echo"]["right"] for what in ("nothing", "SSM state")] == echo
    assert made["nothing"]["echo"]["prompts"] == 3 * len(ids)


def test_windows_are_all_runs_of_neighbours():
    assert patching.windows(3) == [(0,), (0, 1), (0, 1, 2), (1,), (1, 2), (2,)]


def test_the_next_overt_value_is_read_where_it_is_written(model):
    value, overt = (
        pairs(3, 6, 0, which_step=0, task=DOUBLETHINK, same_value=same, overt=shown)
        for same, shown in ((False, "same"), (True, "differ"))
    )
    pos, coming = 5, 6  # after the first operation's overt value; the second operation
    made = channels.next_overt(model, DOUBLETHINK, overt, "recurrent_state", pos, 3, rows=[(0, 1)])
    place = at.recurrent_state(layer=[0, 1], pos=pos)
    given = run(model, overt.donor_ids, record=[place])[place]
    out = run(model, overt.base_ids, edits=[Set(place, given)])
    base = DOUBLETHINK.value_ids[overt.base_overt[:, coming]]
    assert made["flip"][0] == (out.logits[:, coming].argmax(-1) != base).float().mean()
    assert "share" in made
    assert "share" not in channels.next_overt(model, DOUBLETHINK, value, "ssm_state", pos, 3)
    assert channels.next_overt(model, DOUBLETHINK, overt, "ssm_state", value.base_ids.shape[1] - 1, 3) is None
    assert channels.next_overt(model, DOUBLETHINK, overt, "conv_state", 8, 3) is None  # it changes later tokens only


# -- probes -----------------------------------------------------------------------------------------------------------


def test_the_labels_of_the_two_accounts():
    names = ["one", "triple", "two", "double"]
    batch = draw(4, 50, 0)
    found = probing.labels(MASKED, batch)
    for i in range(50):
        ops = [MASKED.operations[k] for k in batch.operations[i]]
        factor = [{"double": 2, "triple": 3, "quad": 4}.get(name, 1) for name in ops]
        shift = [{"one": 1, "two": 2, "three": 3, "four": 4}.get(name, 0) for name in ops]
        for j in range(4):
            rest = int(np.prod(factor[j + 1 :]))
            assert found["product"][i, j] == np.prod(factor[: j + 1]) % 5
            assert found["rest"][i, j] == rest % 5
            terms = [shift[m] * int(np.prod(factor[m + 1 :])) for m in range(j + 1)]
            assert found["partial"][i, j] == sum(terms) % 5
            assert found["answer"][i, j] == batch.values[i, -1]
    assert names  # the words above are operations
    letters = probing.labels(DOUBLETHINK, draw(3, 5, 0, task=DOUBLETHINK))
    assert letters.keys() == {"value", "overt"}
    assert probing.labels(Task(acts="s5"), draw(3, 5, 0, task=Task(acts="s5"))).keys() == {"value", "answer"}


def test_erasing_takes_what_is_read_and_a_random_space_does_not():
    """Of a model that is taught to repeat the value that it is shown: the next overt value is the last one's echo."""
    torch.manual_seed(0)
    task, made = Task(name="doublethink"), Mamba(MambaConfig(32, 1, 17, d_state=4))
    batch = draw(3, 400, 1, task=task)
    wanted = torch.where(batch.overt >= 0, task.value_ids[batch.overt.clamp(min=0)], -100)  # at every position
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(made(batch.ids, ops=TORCH).logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = probing.erase(made.eval(), task, 3, 200, 0, "overt", 0)
    assert found["dimensions"] == 4
    assert found["nothing"]["overt"] > 0.9
    assert len(found["controls"]) == probing.CONTROLS
    assert all(0 < control["variance"] < 1 for control in found["controls"])
    assert found["space"]["overt"] < 0.3 < 0.5 < np.mean([control["overt"] for control in found["controls"]])


# -- results ----------------------------------------------------------------------------------------------------------


def test_results_are_written_part_by_part_and_resumed(tmp_path):
    path, calls = tmp_path / "deep" / "r.json", []

    def compute():
        calls.append(1)
        return {"a": torch.tensor([1.0, float("1.23456789")]), (1, 2): [3]}

    one = Results(path, "patch", {"n": 1}, command="c")
    assert one.part("x", compute) == {"a": [1.0, 1.23457], "(1, 2)": [3]}
    again = Results(path, "patch", {"n": 1}, command="c")
    assert again.part("x", compute) == one.part("x", compute)
    assert len(calls) == 1
    with pytest.raises(ZeroDivisionError):
        again.part("y", lambda: 1 / 0)
    assert read(path, "patch")["parts"].keys() == {"x"}
    assert read(path, "patch")["provenance"]["command"] == "c"
    assert "continued" not in read(path, "patch")
    for name in "zw":  # by another command: its parts say so, the first one's do not
        Results(path, "patch", {"n": 1}, command="d").part(name, lambda: 2)
    made = read(path, "patch")
    assert made["provenance"]["command"] == "c" and len(made["continued"]) == 1
    assert made["continued"][0]["parts"] == ["z", "w"] and made["continued"][0]["provenance"]["command"] == "d"


def test_results_of_another_kind_version_or_key_are_refused(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(ResultsError, match="does not exist"):
        read(path, "patch")
    Results(path, "patch", {"n": 1}, command="").part("x", lambda: 1)
    with pytest.raises(ResultsError, match=r"n=1 \(now 2\)"):
        Results(path, "patch", {"n": 2}, command="")
    with pytest.raises(ResultsError, match="of kind 'patch'"):
        Results(path, "probe", {"n": 1}, command="")
    made = json.loads(path.read_text())
    path.write_text(json.dumps(made | {"version": VERSION + 1}))
    with pytest.raises(ResultsError, match=f"version {VERSION + 1}"):
        read(path, "patch")
    path.write_text("[]")
    with pytest.raises(ResultsError, match="no results file"):
        read(path, "patch")


def test_numbers_are_rounded_and_a_model_is_known_by_its_weights(model):
    assert plain({"x": (0.1234567, [torch.tensor(2.0)])}) == {"x": [0.123457, [2.0]]}
    torch.manual_seed(0)
    again = Mamba(model.config)
    assert fingerprint(again) == fingerprint(model)
    with torch.no_grad():
        again.backbone.embedding.weight[0, 0] += 1
    assert fingerprint(again) != fingerprint(model)
