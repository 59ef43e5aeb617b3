"""One id a word."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.hidden_reasoning.errors import TokenizerError
from analyses.hidden_reasoning.task import MASKED, Task, WordTokenizer

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
