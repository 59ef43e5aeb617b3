"""One id a word, with the small tokenizer and with one of transformers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.hidden_reasoning.errors import TokenizerError
from analyses.hidden_reasoning.task import (
    DIRECT,
    DOUBLETHINK,
    MASKED,
    HubTokenizer,
    Task,
    WordTokenizer,
    check,
    draw,
    load_tokenizer,
    text,
)  # fmt: skip

TOKENIZER = MASKED.tokenizer


def test_one_id_a_word_and_nothing_added():
    ids = TOKENIZER.encode("hide one two\n 0 one _ two 3")
    assert [TOKENIZER.words[i] for i in ids] == ["hide", "one", "two", "\n", "0", "one", "_", "two", "3"]
    assert TOKENIZER.encode(" one") == TOKENIZER.encode("one") == [TOKENIZER.ids["one"]]
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.decode(ids) == "hide one two\n 0 one _ two 3"


def test_the_vocabulary_is_all_there_is():
    expected = ["<pad>", "\n", "show", "hide", "_", *"01234", *MASKED.operations]
    assert list(TOKENIZER.words) == expected
    assert TOKENIZER.vocab_size == 17
    assert TOKENIZER.pad_id == 0
    assert "11" in Task(12).tokenizer.ids


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_every_sequence_of_ids_comes_back(ids):
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


def test_unknown_words_are_listed():
    with pytest.raises(TokenizerError, match=r"\['five', 'seven'\]"):
        TOKENIZER.encode("one five two seven five")
    with pytest.raises(TokenizerError, match=r"\[-1, 17\]"):
        TOKENIZER.decode([0, 17, -1])


def test_words_must_be_words():
    with pytest.raises(TokenizerError, match="twice"):
        WordTokenizer(["one", "one"])
    with pytest.raises(TokenizerError, match="white space"):
        WordTokenizer(["one two"])


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path)
    assert WordTokenizer.load(tmp_path) == TOKENIZER
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(TokenizerError, match="does not exist"):
        WordTokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(TokenizerError, match="not a word-level"):
        WordTokenizer.load(tmp_path)


def neox(folder, sentences, vocab_size):
    """A byte-level BPE tokenizer in GPT-NeoX's format, trained on these sentences and saved as a hub would have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    made = GPTNeoXTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    made.save_pretrained(folder)
    return folder


def rows_of(task, n=300):
    batch = draw(6, n, 0, concealed=[True, False] * (n // 2), task=task)
    names = [[task.operations[i] for i in ops] for ops in batch.operations.tolist()]
    return [text(task, row, concealed) for row, concealed in zip(names, batch.concealed.tolist(), strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One that has seen all tasks, so that each word is one token."""
    sentences = [row for task in (MASKED, DOUBLETHINK, DIRECT) for row in rows_of(task)]
    return neox(tmp_path_factory.mktemp("neox"), sentences, 400)


@pytest.mark.parametrize("task", [MASKED, DOUBLETHINK, DIRECT, Task(start=2)], ids=str)
def test_a_tokenizer_of_transformers_gives_the_same_rows(whole, task):
    tokenizer = load_tokenizer(whole)
    assert isinstance(tokenizer, HubTokenizer)
    check(task, tokenizer)
    steps, hidden = [1, 4, 7], [True, False, True]
    ours, theirs = (draw(steps, 3, 1, concealed=hidden, task=task, tokenizer=t) for t in (None, tokenizer))
    for i, s in enumerate(steps):
        names = [task.operations[k] for k in ours.operations[i, :s]]
        ids = theirs.ids[i, : theirs.lengths[i]]
        assert tokenizer.decode(ids) == text(task, names, hidden[i])
        assert tokenizer.encode(text(task, names, hidden[i])) == ids.tolist()
    for name in ("lengths", "hidden", "overt", "reasoning", "answer", "values"):
        assert getattr(ours, name).equal(getattr(theirs, name))
    values = [tokenizer.encode(f" {v}") for v in range(5)]
    assert [[k] for k in theirs.answer_ids.tolist()] == [values[ours.values[i, s - 1]] for i, s in enumerate(steps)]


def test_a_tokenizer_that_splits_words_lists_them(tmp_path):
    sentences = [row for row in rows_of(MASKED) if "triple" not in row and "quad" not in row]
    tokenizer = HubTokenizer(neox(tmp_path, sentences, 400))
    with pytest.raises(TokenizerError, match=r"' triple' is .*' quad' is") as found:
        check(MASKED, tokenizer)
    assert "' double'" not in str(found.value)
    check(Task(operations=("one", "two", "double")), tokenizer)


def test_a_tokenizer_that_joins_words_is_refused(whole, monkeypatch):
    """Such as one that makes one token of a newline and what follows, which no look at single words would show."""
    tokenizer = HubTokenizer(whole)
    joined = tokenizer.vocab_size

    def encode(words, real=tokenizer.encode):
        return [joined if k == "\n0" else i for part in words.replace("\n0", "|\n0|").split("|") if part
                for k, i in ([(part, 0)] if part == "\n0" else [(None, i) for i in real(part)])]  # fmt: skip

    monkeypatch.setattr(tokenizer, "encode", encode)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: str(list(ids)))
    with pytest.raises(TokenizerError, match="6 tokens; this tokenizer makes 5"):
        check(MASKED, tokenizer)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="finds no tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_reader_is_missing(tmp_path, monkeypatch):
    """As transformers 5.5 says it, also of an empty folder: the first line is empty."""

    def refuse(path):
        raise ImportError("\n requires the protobuf library but it was not found.\nInstall it.\n")

    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(TokenizerError, match=r"finds no tokenizer in .* \(requires the protobuf library"):
        load_tokenizer(tmp_path)


def test_training_on_a_pretrained_mamba_with_its_tokenizer(whole, tmp_path):
    """The whole way: a checkpoint in mamba-130m's layout with a tokenizer beside it, its first layer, two steps."""
    import shutil

    import torch

    from analyses.hidden_reasoning.experiments.accuracy import packed, score
    from analyses.hidden_reasoning.organism import load_folder, write_organism
    from analyses.hidden_reasoning.training.settings import Settings
    from analyses.hidden_reasoning.training.train import train
    from minimal_mamba import Mamba, MambaConfig

    base = tmp_path / "base"
    shutil.copytree(whole, base)
    torch.manual_seed(0)
    Mamba(MambaConfig(16, 2, 402, d_state=4)).save_pretrained(base)
    settings = Settings(
        task_name="doublethink", pretrained=str(base), n_layer=1, max_length=2, batch_size=4, steps=2, warmup_steps=1,
        decay_steps=1, log_every=1,
    )  # fmt: skip
    model = train(settings, tmp_path / "run", quiet=True)
    assert len(model.backbone.layers) == 1
    assert model.config.vocab_size == 402
    words = settings.load_tokenizer()
    found = packed({n: score(model, n, 10, 0, task=settings.task, tokenizer=words, written=True) for n in (1, 2)}, 0)
    folder = write_organism(tmp_path / "run", model, words, settings, found)
    again, tokenizer = load_folder(folder)
    assert tokenizer.encode(" one triple") == words.encode(" one triple")
    for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
