"""A hook of mkdocs: where a docstring names a page as `docs/math.md`, the site has a link to that page."""

import re
from pathlib import Path
from typing import Any

NAMED = re.compile(r"(?<![\w/\"])docs/([\w-]+)\.md")


def on_page_content(content: str, page: Any, config: Any, **_: Any) -> str:
    """Replace the names of pages that exist."""
    up = "../" * page.url.count("/")

    def linked(found: re.Match[str]) -> str:
        name = found[1]
        if not (Path(config["docs_dir"]) / f"{name}.md").exists():
            return found[0]
        return f'<a href="{up}{name}/">{found[0]}</a>'

    return NAMED.sub(linked, content)
