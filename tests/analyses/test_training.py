"""A run that was stopped or killed and resumed is the run that was not; settings that cannot be trained raise."""

import dataclasses
import json

import pytest
import torch

from analyses.hidden_reasoning.errors import TaskError, TrainingError
from analyses.hidden_reasoning.training.settings import Settings, only_one

TINY = Settings(
    max_length=3, d_model=16, n_layer=1, d_state=4, batch_size=16, steps=24, warmup_steps=3, decay_steps=6, memory=20,
    solved=0.3, start_length=1, log_every=4, save_every=6,
)  # fmt: skip
TWIN = dataclasses.replace(TINY, architecture="transformer", d_model=32, n_layer=2)
TIMES = ("seconds",)


@pytest.fixture(scope="module")
def training():
    """The module, imported once: transformers takes seconds."""
    from analyses.hidden_reasoning.training import train

    return train


@pytest.fixture(scope="module")
def whole(training, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return training.train(TINY, out, quiet=True), out


def log_of(out):
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if k not in TIMES} for r in rows}


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_run_is_logged_and_written(whole):
    model, out = whole
    log = log_of(out)
    assert list(log) == [4, 8, 12, 16, 20, 24]
    assert not model.training
    for row in log.values():
        assert row.keys() >= {"loss", "limit", "accuracy", "learning_rate"}
        assert len(row["accuracy"]) == 3
    assert log[24]["loss"] < log[4]["loss"]
    assert log[24]["limit"] > 1
    rates = [row["learning_rate"] for row in log.values()]
    assert rates[:4] == [1.5e-3] * 4
    assert rates[3] > rates[4] > rates[5] > 0
    assert sorted(p.name for p in out.iterdir()) == [".lock", "checkpoint-24", "settings.json", "train_log.jsonl"]


def test_stop_and_resume_give_the_same_curve(training, whole, tmp_path):
    out = tmp_path / "run"
    training.train(TINY, out, stop_at=12, quiet=True)
    assert list(log_of(out)) == [4, 8, 12]
    model = training.train(TINY, out, resume=True, quiet=True)
    assert same(model, whole[0])
    assert log_of(out) == log_of(whole[1])


def test_killed_between_checkpoints_or_while_writing_one(training, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as m:  # killed at step 16, between a checkpoint at 12 and one at 18
        m.setattr(
            training,
            "draw_batch",
            lambda s, step, *more, real=training.draw_batch: real(s, step, *more) if step < 16 else die(),
        )
        with pytest.raises(Killed):
            training.train(TINY, out, quiet=True)
    with monkeypatch.context() as m:  # killed again while step 18 is written
        m.setattr("transformers.Trainer._save_rng_state", die)
        with pytest.raises(Killed):
            training.train(TINY, out, resume=True, quiet=True)
    assert training.newest(out).name == "checkpoint-12"
    model = training.train(TINY, out, resume=True, quiet=True)
    assert same(model, whole[0])
    assert log_of(out) == log_of(whole[1])
    assert sorted(p.name for p in out.iterdir()) == [".lock", "checkpoint-24", "settings.json", "train_log.jsonl"]


def test_the_number_of_steps_can_be_changed_until_the_decay_begins(training, whole, tmp_path):
    out = tmp_path / "run"
    training.train(dataclasses.replace(TINY, steps=100), out, stop_at=12, quiet=True)
    model = training.train(TINY, out, resume=True, quiet=True)
    assert same(model, whole[0])
    assert log_of(out) == log_of(whole[1])
    with pytest.raises(TrainingError, match="before that only"):
        training.train(dataclasses.replace(TINY, steps=40), out, resume=True, quiet=True)


def test_a_finished_run_is_taken_as_it_is(training, whole):
    model, out = whole
    before = log_of(out)
    assert same(training.train(TINY, out, resume=True, quiet=True), model)
    assert log_of(out) == before


def test_all_lengths_solved_start_the_decay(training, tmp_path):
    early = dataclasses.replace(TINY, early=0.01, max_length=1, steps=1000, save_every=1000)
    training.train(early, tmp_path / "run", quiet=True)
    assert training.newest(tmp_path / "run").name in {f"checkpoint-{n}" for n in range(9, 40)}


def test_data_are_those_of_seed_step_and_curriculum(training):
    one, again = (training.draw_batch(TINY, 3, TINY.curriculum()) for _ in range(2))
    assert torch.equal(one.ids, again.ids)
    for other in (dataclasses.replace(TINY, seed=1), TINY):
        assert not torch.equal(training.draw_batch(other, 4, other.curriculum()).ids, one.ids)


def learner_of(settings):
    from analyses.hidden_reasoning.training.learners import TaskLearner, build

    return TaskLearner(build(settings, settings.task.tokenizer), None)


def test_weight_decay_spares_what_is_no_matrix(training):
    names = training._Trainer.get_decay_parameter_names(None, learner_of(TINY))
    parts = {n.removesuffix(".weight").rsplit(".", 1)[-1] for n in names}
    assert parts == {"embedding", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"}
    names = training._Trainer.get_decay_parameter_names(None, learner_of(TWIN))
    parts = {n.removesuffix(".weight").rsplit(".", 1)[-1] for n in names}
    assert parts == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}


def test_folders_that_do_not_fit(training, whole, tmp_path):
    with pytest.raises(TrainingError, match="--resume"):
        training.train(TINY, whole[1])
    with pytest.raises(TrainingError, match="nothing to resume"):
        training.train(TINY, tmp_path / "none", resume=True)
    with pytest.raises(TrainingError, match="batch_size=16"):
        training.train(dataclasses.replace(TINY, batch_size=8), whole[1], resume=True)


def test_only_one_process_trains_in_a_folder(training, whole):
    with only_one(whole[1]), pytest.raises(TrainingError, match="another process"):
        training.train(TINY, whole[1], resume=True)


def test_how_often_a_run_is_written_down_may_always_change(training, whole):
    other = dataclasses.replace(TINY, log_every=5, save_every=7)
    assert same(training.train(other, whole[1], resume=True, quiet=True), whole[0])


def test_a_loss_that_is_not_finite_raises(training, tmp_path):
    with pytest.raises(TrainingError, match="lower learning rate"):
        training.train(dataclasses.replace(TINY, learning_rate=1e30), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"steps": 0}, TrainingError),
        ({"steps": 5}, TrainingError),
        ({"max_length": 0}, TrainingError),
        ({"learning_rate": 0.0}, TrainingError),
        ({"hidden_share": 1.5}, TrainingError),
        ({"answer_weight": 2.0}, TrainingError),
        ({"seed": -1}, TrainingError),
        ({"modulus": 2}, TaskError),
        ({"task_name": "maskd"}, TaskError),
        ({"d_model": 0}, TrainingError),
        ({"architecture": "rnn"}, TrainingError),
        ({"architecture": "transformer", "max_length": 30}, TrainingError),
        ({"architecture": "transformer", "pretrained": "x"}, TrainingError),
        ({"loss": "answer"}, TrainingError),
    ],
)
def test_settings_that_cannot_be_trained(bad, error):
    with pytest.raises(error):
        dataclasses.replace(TINY, **bad)


@pytest.mark.parametrize("kind", [{}, {"task_name": "doublethink"}, {"task_name": "direct", "loss": "all"}], ids=str)
def test_every_task_and_the_transformer_train_and_resume(training, tmp_path, kind):
    for base in (TINY, TWIN):
        settings = dataclasses.replace(base, **kind)
        whole, parted = tmp_path / f"whole-{base.architecture}", tmp_path / f"parted-{base.architecture}"
        model = training.train(settings, whole, quiet=True)
        training.train(settings, parted, stop_at=12, quiet=True)
        assert same(training.train(settings, parted, resume=True, quiet=True), model)
        log = log_of(whole)
        assert log == log_of(parted)
        assert log[24]["loss"] < log[4]["loss"]


@pytest.mark.parametrize(("n_layer", "d_model"), [(4, 96), (6, 96), (2, 96)])
def test_the_transformer_has_as_many_parameters_and_layers(n_layer, d_model):
    sizes = {}
    for name in ("mamba", "transformer"):
        settings = dataclasses.replace(TINY, architecture=name, n_layer=n_layer, d_model=d_model, d_state=16)
        model = learner_of(settings).model
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert abs(sizes["transformer"] / sizes["mamba"] - 1) < 0.05
    assert model.config.n_layer == n_layer


def test_the_transformer_does_not_see_padding_or_what_comes_later():
    from analyses.hidden_reasoning.organism import logits_of
    from analyses.hidden_reasoning.task import draw

    model, batch = learner_of(TWIN).model.double().eval(), draw([2, 3], 2, 0)
    with torch.no_grad():
        found = logits_of(model)(batch.ids, batch.lengths)
        short = logits_of(model)(batch.ids[:1, :9], batch.lengths[:1])
    assert torch.allclose(found[:1, :9], short, atol=1e-12)


def test_the_first_layers_of_a_pretrained_checkpoint(training, tmp_path):
    """Its layout is that of `state-spaces/mamba-130m`: the first layers' weights are taken over, and are trained."""
    from minimal_mamba import Mamba, MambaConfig

    torch.manual_seed(5)
    base = Mamba(MambaConfig(16, 3, TINY.task.tokenizer.vocab_size, d_state=4))
    base.save_pretrained(tmp_path / "base")
    settings = dataclasses.replace(TINY, pretrained=str(tmp_path / "base"), n_layer=2, tokenizer=None)
    from analyses.hidden_reasoning.training.learners import build

    start = build(settings, settings.task.tokenizer)
    assert len(start.backbone.layers) == 2
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, base.state_dict()[name]), name


def test_a_pretrained_checkpoint_of_fewer_words_raises(tmp_path):
    from analyses.hidden_reasoning.training.learners import build
    from minimal_mamba import Mamba, MambaConfig

    Mamba(MambaConfig(16, 1, 8, d_state=4, pad_vocab_size_multiple=1)).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="has 8 tokens, and the tokenizer 17"):
        build(dataclasses.replace(TINY, pretrained=str(tmp_path)), TINY.task.tokenizer)
