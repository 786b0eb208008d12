"""What the site's notebooks need beyond their conversion: links among them, words for pictures."""

import html
import json
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r'href="((?:\.\./)*)(?:docs/)?(\w+)\.(?:ipynb|md)"')
_NO_ALT = "No description has been provided for this image"


def on_page_content(content: str, page: Any, **kwargs: object) -> str:
    """Mends a converted notebook: a link to `b.ipynb`, and the `alt` of each picture's cell."""
    path = Path(page.file.abs_src_path)
    if path.suffix != ".ipynb":
        return content
    metadata = [cell["metadata"] for cell in json.loads(path.read_text())["cells"]]
    alts = (html.escape(cell["alt"]) for cell in metadata if "alt" in cell)
    content = re.sub(_NO_ALT, lambda _: next(alts), content)
    return _LINK.sub(r'href="../\1\2/"', content)  # each page is a directory
