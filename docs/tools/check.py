"""Reads the built site: every link inside leads somewhere, and nothing is loaded from anywhere else.

python docs/tools/check.py build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}
LINK_RELATIONS = {"canonical", "next", "prev"}  # named, not loaded


class Page(HTMLParser):
    """What a page links to, what it loads, and where in it one can link to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADS and LOADS[tag] in found and found.get("rel") not in LINK_RELATIONS:
            self.loads.append(found[LOADS[tag]])


def problems(site: Path) -> list[str]:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} loads {url}" for url in page.loads if urlsplit(url).netloc]
        for url in {*page.links, *page.loads}:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{name} links to {url}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name} links to {url}, which has no such place")
    for sheet in site.rglob("*.css"):
        if "url(http" in sheet.read_text().replace('"', "").replace("'", ""):
            found.append(f"{sheet.relative_to(site)} loads from elsewhere")
    return sorted(found)


def main(folder: str) -> int:
    site = Path(folder).resolve()
    pages = len(list(site.rglob("*.html")))
    if found := problems(site):
        print(*found, sep="\n", file=sys.stderr)
        return 1
    print(f"{pages} pages, no broken link, nothing loaded from elsewhere")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
