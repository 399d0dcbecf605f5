"""A hook of mkdocs that turns LaTeX into MathML when the site is built.

Browsers render MathML themselves, so a page needs no script and no other host. A formula that cannot be read ends the
build.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace what pymdownx.arithmatex has marked."""

    def written(found: re.Match[str]) -> str:
        block = found[1] == "div"
        latex = html.unescape(found[2]).strip()[2:-2]  # without \( \) or \[ \]
        try:
            math = convert(latex, display="block" if block else "inline")
        except Exception as error:
            raise ValueError(f"{page.file.src_path}: cannot read the formula {latex!r}: {error!r}") from error
        return f'<div class="formula">{math}</div>' if block else math

    return FORMULA.sub(written, content)
