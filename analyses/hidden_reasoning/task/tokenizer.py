"""Tokenizers: one id a word. A small word-level one that ships with the study, and any of Hugging Face's."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from minimal_mamba.files import write_json

from ..errors import TokenizerError

PAD = "<pad>"
FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """What the study asks of a tokenizer."""

    vocab_size: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""

    def save(self, folder: str | Path) -> None:
        """Write it into a folder."""

    def __hash__(self) -> int: ...


class WordTokenizer:
    """A word-level tokenizer; id 0 is padding.

    Args:
        words: the vocabulary in the order of the ids 1, 2, ...; none holds a space, and only the newline itself is one.
    Raises:
        TokenizerError: a word that is given twice, is empty, or holds white space.
    """

    pad_id = 0

    def __init__(self, words: Sequence[str]):
        self.words = (PAD, *words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words)
        if len(self.ids) != len(self.words):
            twice = sorted({w for w in self.words if self.words.count(w) > 1})
            raise TokenizerError(f"the words {twice} are in the vocabulary twice; give each once ({PAD!r} is added).")
        if bad := [w for w in words if w != "\n" and (not w or re.search(r"\s", w))]:
            raise TokenizerError(f"the words {bad} are empty or hold white space; give words without.")

    def encode(self, text: str) -> list[int]:
        """One id a word and a newline; spaces only part words.

        Raises:
            TokenizerError: words that are not in the vocabulary, all of them listed.
        """
        words = re.findall(r"\n|\S+", text)
        if unknown := sorted(set(words) - self.ids.keys()):
            raise TokenizerError(f"unknown words {unknown}; the vocabulary is {self._shown()}.")
        return [self.ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The words with a space before each but the first and the newlines.

        Raises:
            TokenizerError: ids outside 0..vocab_size-1.
        """
        ids = [int(i) for i in ids]
        if outside := sorted({i for i in ids if not 0 <= i < self.vocab_size}):
            raise TokenizerError(f"ids {outside} are outside the vocabulary 0..{self.vocab_size - 1}.")
        return " ".join(self.words[i] for i in ids).replace(" \n", "\n")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into a folder, whole or not at all."""
        write_json(Path(folder) / FILE, {"type": "word", "words": self.words[1:]})

    @classmethod
    def load(cls, folder: str | Path) -> "WordTokenizer":
        """Read what `save` wrote.

        Raises:
            TokenizerError: there is no such file, or it is not a word-level tokenizer.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise TokenizerError(f"{path} does not exist; give a folder that WordTokenizer.save wrote to.")
        try:
            raw = json.loads(path.read_text())
            if raw["type"] != "word":
                raise KeyError
            return cls(raw["words"])
        except (KeyError, TypeError, json.JSONDecodeError):
            raise TokenizerError(f"{path} is not a word-level tokenizer; WordTokenizer.save writes one.") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordTokenizer) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)

    def _shown(self) -> str:
        return ", ".join(repr(w) if w == "\n" else w for w in self.words)


class HubTokenizer:
    """A tokenizer of transformers, from a folder or a hub id; no special tokens are added.

    Args:
        path: what `AutoTokenizer.from_pretrained` takes.
    Raises:
        TokenizerError: transformers is not here, or finds no tokenizer there.
    """

    def __init__(self, path: str | Path):
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            raise TokenizerError(
                "a pretrained tokenizer needs transformers: pip install 'mambascope[train]'."
            ) from None
        try:
            self.inner: Any = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError, ImportError) as error:  # the last: of what would read another kind of file
            why = (str(error).strip() or repr(error)).splitlines()[0]
            raise TokenizerError(
                f"transformers finds no tokenizer in {path} ({why}); give a folder or hub id."
            ) from None
        self.vocab_size = len(self.inner)
        self.pad_id = 0 if self.inner.pad_token_id is None else int(self.inner.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added."""
        return list(self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, as it was."""
        return str(self.inner.decode([int(i) for i in ids], clean_up_tokenization_spaces=False))

    def save(self, folder: str | Path) -> None:
        """Write transformers' files into a folder."""
        self.inner.save_pretrained(str(folder))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder, of either kind.

    Raises:
        TokenizerError: there is none.
    """
    path = Path(folder) / FILE
    if path.is_file() and '"type": "word"' in path.read_text()[:200]:
        return WordTokenizer.load(folder)
    return HubTokenizer(folder)
