"""WordTokenizer: one id a word. The newline is a word of its own."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from minimal_mamba.files import write_json

from .errors import TokenizerError

PAD = "<pad>"
FILE = "tokenizer.json"


class WordTokenizer:
    """A word-level tokenizer; id 0 is padding.

    Args:
        words: the vocabulary in the order of the ids 1, 2, ...; none holds a space, and only the newline itself is one.
    Raises:
        TokenizerError: a word that is given twice, is empty, or holds white space.
    """

    def __init__(self, words: Sequence[str]):
        self.words = (PAD, *words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            twice = sorted({w for w in self.words if self.words.count(w) > 1})
            raise TokenizerError(f"the words {twice} are in the vocabulary twice; give each once ({PAD!r} is added).")
        if bad := [w for w in words if w != "\n" and (not w or re.search(r"\s", w))]:
            raise TokenizerError(f"the words {bad} are empty or hold white space; give words without.")

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return len(self.words)

    @property
    def pad_id(self) -> int:
        """The id that fills up shorter rows."""
        return 0

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

    __hash__ = None  # type: ignore[assignment]

    def _shown(self) -> str:
        return ", ".join(repr(w) if w == "\n" else w for w in self.words)
