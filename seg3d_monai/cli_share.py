"""The commands `seg3d bundle check` and `seg3d bundle pack`: doors as those of cli.py, which lists them."""

import tempfile
from pathlib import Path

from seg3d_monai.cli_arguments import file_to_write
from seg3d_monai.cli_bundle import find_bundle, overlay_files
from seg3d_monai.user_errors import full_disk_names, write_whole


def check(bundle: str, *, schema: str | None = None, json: str | None = None, trust: bool = False) -> None:
    """Show what a MONAI bundle would run, and check it against the model zoo's format.

    Expressions, components of other packages and imports are listed before anything of the bundle runs. Where one of
    them is marked, what needs the bundle to run is left out unless `--trust` is given; docs/sharing.md.

    Args:
        bundle: Folder of the bundle, its name in ./bundles, or a zip.
        schema: JSON schema of the metadata; default eval/schema.json of the bundle, else what the metadata names.
        json: File for all results.
        trust: Also run what was marked.
    """
    target = None if json is None else file_to_write("--json", json, ".json")
    if schema is not None and not Path(schema).is_file():
        raise FileNotFoundError(f"--schema {schema!r} does not exist; check the path")
    given = None if schema is None else Path(schema)
    if Path(bundle).is_file():
        from seg3d_monai.sharing.unpack import bundle_within, unpack

        with tempfile.TemporaryDirectory(prefix="seg3d_check_") as folder:
            unpack(Path(bundle), Path(folder))
            _check(bundle, bundle_within(Path(folder), bundle), given, target, trust)
    else:
        _check(bundle, find_bundle(bundle), given, target, trust)


def pack(
    bundle: str,
    out: str,
    *,
    checkpoint: str | None = None,
    overlay: str | None = None,
    safetensors: bool = False,
    half: bool = False,
    version: str | None = None,
    changelog: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a bundle as one zip that MONAI runs wherever it is unpacked and seg3d_monai is installed.

    Args:
        bundle: Folder of the bundle, or the name of one in ./bundles or of the package.
        out: Zip to write, X.zip.
        checkpoint: Trained weights, RUN/model.pt; default those that the bundle has.
        overlay: Names of files in configs/overlays, or paths of such files, separated by commas; merged into the packed
            configurations.
        safetensors: Write the weights as models/model.safetensors too.
        half: Keep kernels and matrices as float16, in half of the bytes; networks compute as before.
        version: New version of the metadata, X.Y.Z; needs `--changelog`.
        changelog: What changed in this version.
        overwrite: Replace an existing zip.
    """
    folder = find_bundle(bundle)
    overlays = [Path(file) for file in overlay_files(folder, overlay)]
    from seg3d_monai.sharing.pack import pack_bundle

    with full_disk_names(out):
        packed = pack_bundle(
            folder,
            Path(out),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            overlays=overlays,
            safetensors=safetensors,
            half=half,
            version=version,
            changes=changelog,
            overwrite=overwrite,
        )
    weights = "no weights: give --checkpoint to put them in" if packed.weights is None else f"weights {packed.weights}"
    print(f"packed: {packed.file}, {len(packed.names)} files, {weights}")


def _check(shown: str, folder: Path, schema: Path | None, json_file: Path | None, trust: bool) -> None:
    from seg3d_monai.sharing.check import FAILED, check_format, read_content
    from seg3d_monai.sharing.report import as_json, code_check, listing, table

    content = read_content(folder)
    print("\n".join(listing(content)), flush=True)  # before anything of the bundle runs
    checks = [code_check(content, trust), *check_format(content, schema)]
    if content.marked and not trust:
        from seg3d_monai.sharing.check_run import not_run

        checks += not_run("the bundle was not run; --trust runs it")
    else:
        from seg3d_monai.sharing.check_run import check_run

        checks += check_run(content)
    print("\n".join(table(checks)))
    if json_file is not None:
        write_whole(json_file, as_json(shown, content, checks))
    failed = [check.name for check in checks if check.result == FAILED]
    if failed:
        raise ValueError(f"bundle {shown!r}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
