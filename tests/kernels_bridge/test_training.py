"""The training entry: the same numbers however a batch is cut, on every backend, resumed, in one process or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny

from kernels_bridge import resolve
from minimal_mamba import Mamba
from minimal_mamba.errors import BackendUnavailable, CheckpointError, InputError

transformers = pytest.importorskip("transformers")
from kernels_bridge.training import Learner, MambaTrainer, pad  # noqa: E402

ROOT = Path(__file__).parents[2]


def rows(n=48, seed=0):
    """Token sequences of 4 to 9 tokens in which each token follows from the last but one."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        ids = torch.randint(0, 29, (2,), generator=rng).tolist()
        for _ in range(int(torch.randint(2, 8, (), generator=rng))):
            ids.append((ids[-2] + 3) % 29)
        found.append({"input_ids": ids})
    return found


def trainer(out, *, model=None, backend="torch", dtype=torch.float64, data=None, eval_data=None, **how):
    options = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "save_strategy": "no", "seed": 0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = transformers.TrainingArguments(str(out), **options | how)
    model = tiny(dtype=dtype, seed=3) if model is None else model
    return MambaTrainer(model, args, train_dataset=data or rows(), eval_dataset=eval_data, backend=backend)


def curve(out, *, resume=None, **how):
    """The loss of every step, and the trained model."""
    made = trainer(out, **how)
    made.train(resume_from_checkpoint=resume)
    return [h["loss"] for h in made.state.log_history if "loss" in h], made.learner.model


def mean_loss(model, data):
    """-log p of every token after the first of its row, each row by itself, over their number."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            p = model(ids).logits[0, :-1].log_softmax(-1)
            total -= float(p[torch.arange(len(p)), ids[0, 1:]].sum())
            count += len(p)
    return total / count


def test_the_loss_is_the_mean_over_labelled_tokens():
    model, batch = tiny(), pad(rows(5))
    with torch.no_grad():
        found = Learner(model, resolve("torch"))(**batch)["loss"]
    assert float(found) == pytest.approx(mean_loss(model, rows(5)), rel=1e-12)


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)])
def test_trainers_loss_and_gradient_are_of_that_mean(tmp_path, sizes):
    """Not of as many labels as ids: nothing comes before a row's first token, nor is padding a token."""
    data = [*rows(8)[:6], *({"input_ids": [3, 4, 5, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},) * 2]
    model = tiny(seed=3)
    truth = mean_loss(model, [*data[:6], *({"input_ids": [3, 4, 5]},) * 2])
    grads = torch.autograd.grad(Learner(model, resolve("torch"))(**pad(data))["loss"], [*model.parameters()])
    norm = float(torch.stack([g.norm() for g in grads]).norm())
    made = trainer(
        tmp_path, model=model, data=data, eval_data=data, max_steps=1, learning_rate=0.0, max_grad_norm=1e9,
        per_device_train_batch_size=sizes[0], gradient_accumulation_steps=sizes[1], per_device_eval_batch_size=8,
    )  # fmt: skip
    made.train()
    log = made.state.log_history[0]
    assert log["loss"] == pytest.approx(truth, rel=1e-4) and log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert made.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-5)


@torch.no_grad()
def test_padding_has_no_labels():
    model = tiny()
    learner = Learner(model, resolve("torch"))
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 1]])
    found = learner(ids, labels=ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1.0] * 5]))["loss"]
    truth = mean_loss(model, [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7, 8, 9, 1]}])
    assert float(found) == pytest.approx(truth, rel=1e-12)
    assert float(learner(ids, labels=torch.full_like(ids, -100))["loss"]) == 0
    assert float(learner(ids[:, :1], labels=ids[:, :1])["loss"]) == 0


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, r"labels of shape \(2,\)"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "attention_mask of shape"),
        ({"input_ids": [1, 2, 3], "label": [1, 2, 3]}, "Did you mean 'labels'"),
        ({"input_ids": [[1, 2, 3]]}, "give ints"),
        ({"input_idx": [1, 2, 3]}, "Did you mean 'input_ids'"),
        ({"labels": [1, 2, 3]}, "has no 'input_ids'"),
    ],
)
def test_rows_that_cannot_be_collated(row, text):
    with pytest.raises(InputError, match=text):
        pad([{"input_ids": [4, 5]}, row])


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_are_read_as_any_other_and_the_best_comes_back(tmp_path, tied):
    model = tiny(seed=3, tie_embeddings=tied)
    made = trainer(
        tmp_path, model=model, eval_data=rows(8, seed=1), max_steps=4, learning_rate=0.5, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", per_device_eval_batch_size=8,
    )  # fmt: skip
    made.train()
    losses = [h["eval_loss"] for h in made.state.log_history if "eval_loss" in h]
    best = Mamba.from_pretrained(made.state.best_model_checkpoint)
    assert min(losses) < max(losses) and made.state.best_model_checkpoint.endswith(f"-{1 + losses.index(min(losses))}")
    assert mean_loss(best, rows(8, seed=1)) == pytest.approx(min(losses), rel=1e-5)
    made.save_model(str(tmp_path / "last"))
    last = Mamba.from_pretrained(tmp_path / "last")
    for name, tensor in made.learner.model.state_dict().items():
        assert torch.equal(tensor, best.state_dict()[name]) and torch.equal(tensor, last.state_dict()[name]), name


@pytest.mark.parametrize("sizes", [{"mixer_rms_eps": 1e-3}, {"norm_eps": 1e-3}])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_in_hfs_layout_are_read_by_transformers_too(tmp_path, sizes, tied):
    """They had HF's config beside an embedding of mamba-ssm's name, in whose place transformers drew one."""

    def fresh():
        return tiny(dtype=torch.float32, seed=3, tie_embeddings=tied, **sizes)

    losses, model = curve(tmp_path, model=fresh(), save_strategy="steps", save_steps=3)
    ids = torch.arange(12).view(2, 6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    with torch.no_grad():
        want = model.eval()(ids).logits
        assert torch.allclose(theirs(ids).logits, want, rtol=1e-3, atol=1e-3)
        assert torch.equal(Mamba.from_pretrained(tmp_path / "checkpoint-6")(ids).logits, want)
    going, again = curve(tmp_path, model=fresh(), save_strategy="no", resume=str(tmp_path / "checkpoint-3"))
    assert going == losses and all(map(torch.equal, again.parameters(), model.parameters()))


def test_labels_that_are_ignored_and_padding_give_no_gradient():
    model, batch = tiny(), pad(rows(4))
    learner = Learner(model, resolve("torch"))
    batch["labels"][1:] = -100
    alone = pad(rows(4)[:1])
    for name, grad in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(learner(**batch)["loss"] - learner(**alone)["loss"], list(model.parameters())),
        strict=True,
    ):
        assert grad.abs().max() < 1e-12, name


def test_every_backend_trains_the_same(tmp_path):
    one, a = curve(tmp_path / "a", backend="reference")
    two, b = curve(tmp_path / "b", backend="torch")
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-9, atol=0)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-7, atol=1e-9)


def test_training_learns(tmp_path):
    losses, _ = curve(tmp_path, max_steps=60, learning_rate=1e-2)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Rows differ in length: a mean of means is another loss. Adam and clipping hide a factor: the norms tell."""
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    made = []
    for i, how in enumerate(({}, parts)):  # accelerate keeps one number of parts for all trainers, the latest's
        made.append(trainer(tmp_path / str(i), **how))
        made[-1].train()
    for logged in ("loss", "grad_norm"):
        whole, cut = (torch.tensor([h[logged] for h in m.state.log_history if logged in h]) for m in made)
        assert len(whole) == 6
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=0)
    a, b = (each.learner.model.state_dict() for each in made)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-6, atol=1e-8)


def test_mixed_precision_stays_near_float32(tmp_path):
    exact, _ = curve(tmp_path / "a", dtype=torch.float32)
    mixed, model = curve(tmp_path / "b", dtype=torch.float32, bf16=True)
    assert model.dtype == torch.float32
    gap = torch.tensor(mixed) / torch.tensor(exact) - 1
    assert 1e-6 < gap.abs().max() < 0.05  # bfloat16 keeps 8 bits


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole, a = curve(tmp_path / "a")
    curve(tmp_path / "b", max_steps=3, save_strategy="steps", save_steps=3)
    rest, b = curve(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-3"))
    assert rest == pytest.approx(whole, rel=1e-12) and len(rest) == 6
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    """torchrun with two CPU processes of batch 4, against one process of batch 8; no code of ours for it."""
    one, _ = curve(tmp_path / "one", max_steps=4)
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from test_training import curve\n"
        "losses, _ = curve(sys.argv[1], max_steps=4, per_device_train_batch_size=4)\n"
        "if os.environ['RANK'] == '0':\n"
        "    open(sys.argv[2], 'w').write(json.dumps(losses))\n"
        "torch.distributed.destroy_process_group()\n"  # what is left of gloo aborts some exits
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
         str(tmp_path / "two"), str(tmp_path / "losses.json")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "losses.json").read_text())
    assert two == pytest.approx(one, rel=1e-6)


def test_what_cannot_be_trained(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(BackendUnavailable, match="fused"):
        MambaTrainer(tiny(), args, train_dataset=rows(), backend="fused")
    batch = pad(rows(4))
    with pytest.raises(InputError, match="pad on the right"):
        Learner(tiny(), resolve("torch"))(**batch | {"attention_mask": batch["attention_mask"].flip(1)})
    curve(tmp_path / "a", max_steps=1, save_strategy="steps", save_steps=1)
    other = Learner(Mamba(tiny(n_layer=1).config), resolve("torch"))
    with pytest.raises(CheckpointError, match="other tensors"):
        other.load(tmp_path / "a" / "checkpoint-1")
    wider = Learner(Mamba(tiny(d_state=7).config), resolve("torch"))
    with pytest.raises(CheckpointError, match=r"A_log, .* 6 in all"):
        wider.load(tmp_path / "a" / "checkpoint-1")
    for name, value in (("label_smoothing_factor", 0.1), ("gradient_checkpointing", True), ("neftune_noise_alpha", 5)):
        asked = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        setattr(asked, name, value)
        with pytest.raises(InputError, match=name):
            MambaTrainer(tiny(), asked, train_dataset=rows())
    asked = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    asked.torch_compile = True
    for backend in ("torch", "auto"):
        with pytest.raises(InputError, match="cannot trace the operations of"):
            MambaTrainer(tiny(), asked, train_dataset=rows(), backend=backend)
    MambaTrainer(tiny(), asked, train_dataset=rows(), backend="reference")
    with pytest.raises(InputError, match="a Learner has its operations"):
        MambaTrainer(Learner(tiny(), resolve("torch")), args, train_dataset=rows(), backend="reference")
    ids = batch["input_ids"]
    with pytest.raises(InputError, match=r"labels .* for input_ids"):
        Learner(tiny(), resolve("torch"))(ids, labels=ids[:, :2])


def test_without_transformers_it_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import kernels_bridge.training"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ModuleNotFoundError: training needs transformers" in told.stderr
    assert told.stderr.rstrip().endswith("pip install 'mambascope[train]'.")
