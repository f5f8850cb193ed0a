"""Generated parts of a page that is otherwise written by hand: each is between two markers."""


def replaced(page: str, name: str, content: str) -> str:
    """Return the page with `content` between the markers of that name; raise ValueError without markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page needs {begin} and, after it, {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
