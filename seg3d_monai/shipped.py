"""Where the package's own bundles are. It must not know what a bundle holds."""

from pathlib import Path


def shipped_bundles() -> Path:
    """The package's own bundles: within it where a wheel was installed, else beside it in the repository."""
    package = Path(__file__).resolve().parent
    inside = package / "_bundles"
    return inside if inside.is_dir() else package.parent / "bundles"


def shipped_bundle(name: str | Path) -> Path:
    """Where one of them would be; `bundles/NAME`, as the configurations call their own folder, is NAME.

    Args:
        name: of the bundle.
    """
    parts = Path(name).parts
    return shipped_bundles().joinpath(*(parts[1:] if parts[:1] == ("bundles",) else parts))
