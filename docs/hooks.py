"""What mkdocs does to the pages, so that every text stands once and reads well in the repository too.

* The README of each folder of reproductions/ and benchmarks/ is a page of the site, with its images.
* A line that is a link to a section of the README, `[Two commands](../README.md#two-commands)`, becomes that section.
* Links to what the site does not have (tests, examples, recipes) become plain text, or lead to `repo_url` if mkdocs.yml has it.
  Links to what does not exist at all are left to mkdocs, which warns, and fails with --strict.
* In docstrings an argument begins a line.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
RESULTS = ("reproductions", "benchmarks")

LINK = re.compile(r"(!?)\[((?:!\[[^\]]*\]\([^)\s]+\)|[^\]\[])*)\]\(([^)\s]+)\)")
"""An image or a link, whose text may hold an image."""
ARGUMENT = re.compile(r"\n\s*(?=[a-z_]+(=[^:\n]{1,30}|(, [a-z_]+)+)?: )")
SECTION = re.compile(r"^\[[^\]]*\]\(\.\./README\.md#([\w-]+)\)$")


def on_config(config: Any) -> Any:
    """A page for each folder with results at the end of the navigation."""
    *_, last = config.nav
    for kind in RESULTS:
        last["Results"].append({kind.capitalize(): [page.as_posix() for page in _readmes(kind)]})
    return config


def on_files(files: Any, config: Any) -> Any:
    for kind in RESULTS:
        for page in _readmes(kind):
            for path in (page, *(image.relative_to(ROOT) for image in sorted((ROOT / page.parent).glob("*.png")))):
                files.append(File.generated(config, path.as_posix(), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Sections of the README in their places, and links that lead somewhere on the site."""
    source = page.file.src_uri
    here = source if source.startswith(RESULTS) else f"docs/{source}"  # in the repository

    def line(text: str) -> str:
        if (match := SECTION.match(text)) is None:
            return LINK.sub(lambda link: _link(link, here, source, config.repo_url), text)
        section = readme_section((ROOT / "README.md").read_text(encoding="utf-8"), match[1])
        return _outside_code(section, lambda t: LINK.sub(lambda k: _link(k, "README.md", source, config.repo_url), t))

    return _outside_code(markdown, line)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Our docstrings are plain text, `name: what it is`, which Markdown runs together."""
    return ARGUMENT.sub("<br>\n", html) if page.file.src_uri == "api.md" else html


def readme_section(readme: str, anchor: str) -> str:
    """The text below the heading (##) with this anchor, until the next one. Raises ValueError where there is none."""
    for part in re.split(r"^## ", readme, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        if re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") == anchor:
            return text.strip("\n")
    raise ValueError(f"README.md has no section #{anchor}: change the line that names it")


def _readmes(kind: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / kind).glob("*/README.md"))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` made to every line that is not in a fenced block."""
    lines, code = [], False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        lines.append(line if code or fence else change(line))
        code ^= fence
    return "\n".join(lines)


def _link(link: re.Match[str], here: str, source: str, repo_url: str | None) -> str:
    """A link as it stands in the file `here` of the repository, for the page made from `source`."""
    image, text, target = link.groups()
    text = LINK.sub(lambda inner: _link(inner, here, source, repo_url), text)
    path, _, anchor = target.partition("#")
    if ":" in target or not path:  # to the web, or within the page
        return f"{image}[{text}]({target})"
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if not (ROOT / there).exists():
        return link[0]
    if there.startswith(RESULTS) and (ROOT / there / "README.md").is_file():
        there += "/README.md"
    on_site = there.startswith("docs/") and there.endswith((".md", ".png"))
    if on_site or (there.startswith(RESULTS) and there.endswith(("README.md", ".png"))):
        page = os.path.relpath(there.removeprefix("docs/"), posixpath.dirname(source) or ".")
        return f"{image}[{text}]({page}{'#' if anchor else ''}{anchor})"
    if repo_url:
        return f"{image}[{text}]({repo_url.rstrip('/')}/blob/HEAD/{there}{'#' if anchor else ''}{anchor})"
    return text
