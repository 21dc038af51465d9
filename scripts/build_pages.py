"""Writes the documents and the reference as HTML; `scripts/build_docs` is the door.

Documents keep their places: docs/tune.md becomes docs/tune.html, and what they link to is copied beside them. The
reference is pdoc's, one page a module. Every warning is told, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import seg3d_monai
from seg3d_monai import ops  # noqa: F401  compiled now: pdoc lets nothing be started

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "bundles/*/docs/README.md")
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 900px; padding: 12px 20px 60px; }
nav { font-size: 14px; display: flex; flex-wrap: wrap; gap: 2px 14px; border-bottom: 1px solid #8886; padding: 8px 0; }
pre { overflow-x: auto; padding: 10px; background: #8882; } code { font-size: 0.9em; }
table { border-collapse: collapse; display: block; overflow-x: auto; } img { max-width: 100%; }
td, th { border: 1px solid #8886; padding: 3px 9px; text-align: left; vertical-align: top; }
"""


def main() -> int:
    """Build all of it; 1 where something is wrong, which is printed."""
    parser = argparse.ArgumentParser(prog="scripts/build_docs", description=__doc__)
    parser.add_argument("--output", default=str(ROOT / "build" / "docs"), help="folder to write; what is there is lost")
    output = Path(parser.parse_args().output)
    try:
        import pdoc
    except ImportError:
        print('build_docs: error: pdoc is missing; pip install "seg3d_monai[docs]"', file=sys.stderr)
        return 2
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    faults = [*write_documents(output), *write_reference(output, pdoc)]
    for fault in faults:
        print(f"build_docs: warning: {fault}", file=sys.stderr)
    print(f"{len(list(output.rglob('*.html')))} pages, {len(faults)} warnings: {output / 'index.html'}")
    return 1 if faults else 0


def documents() -> list[Path]:
    """The documents, relative to the repository."""
    return [path.relative_to(ROOT) for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def modules() -> list[str]:
    """Public modules of the package, dotted."""
    found = pkgutil.walk_packages(seg3d_monai.__path__, "seg3d_monai.")
    names = [module.name for module in found]
    return ["seg3d_monai", *(name for name in names if not any(part.startswith("_") for part in name.split(".")))]


def write_reference(output: Path, pdoc) -> Iterator[str]:  # type: ignore[no-untyped-def]
    """Write a page for each module under api/, and tell what pdoc warns of."""
    os.environ["PDOC_ALLOW_EXEC"] = "1"  # these modules are our own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others, which are imported on the way
        for name in modules():
            _resolve(importlib.import_module(name))
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"seg3d_monai {seg3d_monai.__version__}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        # A package brings those of its modules that its __all__ does not hide; all of them are asked for.
        warnings.filterwarnings("ignore", message="The module specification .* has already been added")
        pdoc.pdoc(*modules(), output_directory=output / "api")
    yield from sorted({str(warning.message).splitlines()[0] for warning in told})
    lacking = [name for name in modules() if not (output / "api" / f"{name.replace('.', '/')}.html").is_file()]
    yield from (f"{name} has no page" for name in lacking)


def _resolve(module: ModuleType) -> None:
    """Look up the types of named tuples, whose constructors do not know the module that they stand in."""
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "_field_defaults"):
            kind.__new__.__annotations__ = get_type_hints(kind)


def write_documents(output: Path) -> Iterator[str]:
    """Write a page for each document, copy what they link to, and tell of links that lead nowhere."""
    from markdown2 import Markdown

    pages = documents()
    titles = {page: _title(page) for page in pages}
    extras = ["fenced-code-blocks", "tables", "header-ids", "cuddled-lists", "code-friendly"]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        targets = [match["target"] for match in LINK.finditer(text)]
        yield from (f"{page} links to {target}, which is not there" for target in targets if not _place(page, target))
        for target in targets:
            _copy(_place(page, target), output)
        body = Markdown(extras=extras).convert(LINK.sub(_as_page, text))
        ups = "../" * (len(page.parts) - 1)
        links = [("Start", f"{ups}index.html"), ("Reference", f"{ups}api/seg3d_monai.html")]
        links += [(titles[other], f"{ups}{other.with_suffix('.html').as_posix()}") for other in pages[1:]]
        target = output / page.with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_html(titles[page], links, body), encoding="utf-8")
    shutil.copyfile(output / "README.html", output / "index.html")


def _title(page: Path) -> str:
    """The first heading; of a bundle's page the bundle's name, as these begin alike."""
    if page.parts[0] == "bundles":
        return page.parts[1]
    found = re.search(r"^# (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else page.stem


def _place(page: Path, target: str) -> Path | None:
    """What a link leads to, None where nothing is there."""
    path = Path(os.path.normpath((ROOT / page).parent / target))  # a link to a file keeps its own place
    return path if path.exists() and path.is_relative_to(ROOT) else None


def _as_page(match: re.Match[str]) -> str:
    target = match["target"]
    return (target[: -len(".md")] + ".html" if target.endswith(".md") else target) + (match["anchor"] or "")


def _copy(path: Path | None, output: Path) -> None:
    """Copy a linked file, or a folder's files with a list of them; documents become pages instead."""
    if path is None or path.suffix == ".md":
        return
    target = output / path.relative_to(ROOT)
    if path.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(file for file in path.iterdir() if file.is_file())
    for file in files:
        shutil.copyfile(file, target / file.name)
    lines = "".join(f'<li><a href="{escape(file.name)}">{escape(file.name)}</a></li>' for file in files)
    (target / "index.html").write_text(_html(path.name, [], f"<ul>{lines}</ul>"), encoding="utf-8")


def _html(title: str, links: list[tuple[str, str]], body: str) -> str:
    shown = "".join(f'<a href="{escape(place)}">{escape(name)}</a>' for name, place in links)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><nav>{shown}</nav>{body}</body></html>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
