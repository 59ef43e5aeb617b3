"""The README's examples run, and say what the README says they say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_first_example_is_short_and_hands_over_the_value():
    printed = io.StringIO()
    assert len(BLOCKS[0].strip().splitlines()) <= 22
    with contextlib.redirect_stdout(printed):
        exec(compile(BLOCKS[0], "README.md", "exec"), {})
    answer, shape = printed.getvalue().splitlines()[:2]
    assert answer == "4"
    assert shape == "torch.Size([1, 192, 3])"


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_the_other_examples_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_every_file_that_it_names_is_there():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target
