"""`scripts/build_docs`: no warnings, every link of the pages leads somewhere, mistakes are told."""

import re
import subprocess
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "build_docs"


def test_help_comes_before_any_work(tmp_path: Path) -> None:
    shown = subprocess.run([SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--output" in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_documents_and_reference_are_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason='pip install "seg3d_monai[docs]"')
    output = tmp_path / "pages"
    done = subprocess.run([SCRIPT, "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert done.stdout.endswith(f"0 warnings: {output / 'index.html'}\n")
    page = (output / "api" / "seg3d_monai" / "inference.html").read_text(encoding="utf-8")
    assert "predict_volume" in page
    assert "<li><strong>block_size:</strong>" in page
    for name in ("index.html", "docs/tune.html", "bundles/maskrcnn3d/docs/README.html", "docs/images/view.png"):
        assert (output / name).is_file()
    for file in [output / "index.html", *output.glob("docs/*.html"), *output.glob("bundles/*/docs/*.html")]:
        for link in re.findall(r'(?:href|src)="([^"#]+)', file.read_text(encoding="utf-8")):
            if not re.match(r"https?:|mailto:", link):
                assert (file.parent / unquote(unescape(link))).exists(), f"{file.relative_to(output)}: {link}"
