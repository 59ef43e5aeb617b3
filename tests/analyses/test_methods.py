"""The gallery: every method has a section, an example that runs, a figure that is there, and a proof that exists."""

import ast
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import interp
from analyses.methods import __main__ as gallery
from analyses.methods import _agreement, knockout

FOLDER = Path(gallery.__file__).parent
ROOT = FOLDER.parents[1]
PAGE = (FOLDER / "README.md").read_text()
SHARED, *SECTIONS = PAGE.split("\n## ")
LARGEST = 150_000  # bytes of a figure


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def shared():
    space: dict = {}
    exec(compile(blocks(SHARED)[0], "README.md", "exec"), space)
    assert space["ids"].shape == (8, 14)
    return space


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.splitlines()[0])
def test_the_example_of_a_method_runs(section, shared):
    (example,) = blocks(section)
    assert 3 <= len(example.strip().splitlines()) <= 8
    exec(compile(example, section.splitlines()[0], "exec"), dict(shared))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.splitlines()[0])
def test_a_section_says_what_it_costs_where_it_is_from_and_what_proves_it(section):
    for word in ("**Cost.**", "**Source.**", "**Proof.**"):
        assert word in section
    proofs = re.findall(r"`(tests/[\w/]+\.py)`", section)
    assert proofs and all((ROOT / proof).exists() for proof in proofs)


def test_every_file_that_the_page_names_is_there_and_every_method_has_its_section():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    for target in links:
        assert (FOLDER / target).exists(), target
    titles = [section.splitlines()[0] for section in SECTIONS]
    assert re.findall(r"^\| \[(.+)\]\(#(.+)\) \|", SHARED, re.M) == [(t, t.lower().replace(" ", "-")) for t in titles]
    for name in gallery.methods():
        assert f"({name}.py)" in PAGE, f"{name} has no section"
        assert any(target.startswith(f"figures/{name}") for target in links), f"{name} shows no figure"
    shown = {FOLDER / target for target in links if target.startswith("figures/")}
    assert set((FOLDER / "figures").glob("*.png")) == shown
    for path in shown:
        assert path.stat().st_size < LARGEST, path.name


@pytest.mark.parametrize("name", gallery.methods())
def test_a_method_says_what_it_is_and_has_a_figure(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    assert ast.get_docstring(tree)
    assert any(isinstance(node, ast.FunctionDef) and node.name == "figure" for node in tree.body)


def test_the_command_draws_what_it_is_asked_for(tmp_path, monkeypatch):
    def figure(folder):
        (folder / "drawn.png").write_bytes(b"")
        return [folder / "drawn.png"]

    monkeypatch.setattr(gallery, "figure_of", lambda name: figure)
    found = CliRunner().invoke(gallery.app, ["some", "--out", str(tmp_path / "new")])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "new" / "drawn.png").exists()


def test_an_unknown_method_is_an_error_in_a_sentence(tmp_path):
    found = CliRunner().invoke(gallery.app, ["nonesuch", "--out", str(tmp_path)])
    assert found.exit_code == 2
    assert "no method 'nonesuch'" in found.output


def test_what_the_page_says_of_the_usual_knockout_is_what_its_figure_shows():
    scan, whole = map(knockout.largest, knockout.grids(["scan", "all"]))
    said = f"it changes the answer by {scan:.1f} nats at most, in the mean over its prompts, where the whole knockout"
    assert f"{said} changes it by {whole:.1f}." in PAGE


def test_the_tables_of_agreements_are_those_of_their_results():
    results = json.loads(_agreement.RESULTS.read_text())
    assert _agreement.page(PAGE, results) == PAGE
    assert list(results["sites"]) == list(_agreement.SITES)
    assert not results["provenance"]["commit"].endswith("+changes")
    # what the page says of small and large effects
    base, line = ([f[name]["sizes"] for f in results["sites"].values()] for name in _agreement.ESTIMATES)
    assert all(f["5 to 40 nats"]["slope"] < (0.05 if i < 3 else 0.2) for i, f in enumerate(base))
    assert all(1 / 3 < f["5 to 40 nats"]["slope"] < 0.5 for f in line)
    for size in ("0.02 to 0.3 nats", "0.3 to 1 nats"):
        assert all(0.6 < f[size]["slope"] < 1 and 0.55 < f[size]["error"] < 1.25 for f in base)
        assert all(2 < f[size]["error"] < 5 for f in line)


def test_what_is_said_of_relevance_is_what_was_measured():
    sites = json.loads(_agreement.RESULTS.read_text())["relevance"]
    words, state = sites["embed"], sites["ssm_state"]
    lost, given = words["sums"]["exact"], words["sums"]["relevance"]
    assert f"the words lose {lost:.0f} nats in all, and relevance gives them {given:.1f} of the metric's" in PAGE
    assert f"of the metric's {words['metric']:.1f}, of which biases keep the rest" in PAGE
    assert f"gives {state['on cells that cost below 0.1 nat']:.0%}".replace("%", " %") in PAGE
    ours, theirs = (
        [f"{sites[site][name]['agreement']['pearson'][0]:.2f}" for site in ("embed", "resid_pre", "ssm_state")]
        for name in ("relevance", "gradient x input")
    )
    doc = " ".join(interp.relevance.__doc__.split())
    assert "r is {} for words, {} for the stream and {} for `ssm_state`".format(*ours) in doc
    assert "of gradient x input {}, {} and {} (".format(*theirs) in doc
