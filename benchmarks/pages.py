"""Tables that scripts put into pages of docs/."""

from __future__ import annotations

from collections.abc import Mapping


def filled(page: str, tables: Mapping[str, str]) -> str:
    """`page` with every table between its marks, `<!-- table NAME -->` and `<!-- end -->`, a line each, made anew."""
    for name, table in tables.items():
        before, start, rest = page.partition(f"<!-- table {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert start and end, name
        page = f"{before}{start}{table}\n{end}{after}"
    return page
