"""Pages whose numbers come from results files: what is made of them stands between marks."""

from minimal_mamba.errors import MambascopeError


class PageError(MambascopeError, ValueError):
    """A page without the marks that something goes between."""


def placed(page: str, name: str, made: str) -> str:
    """A page with what was made between the marks of a name, `<!-- name -->` and `<!-- /name -->` on their own lines.

    Raises:
        PageError: the page has no such marks.
    """
    first, last = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    if first not in page or last not in page:
        raise PageError(f"put {first.strip()} and {last.strip()} on lines of their own where {name} goes.")
    return page[: page.index(first) + len(first)] + made + page[page.index(last) :]
