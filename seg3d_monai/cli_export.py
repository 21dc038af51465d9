"""The command `seg3d export`: a door as those of cli.py, which lists it."""

from seg3d_monai.cli_bundle import config_files, find_bundle, literal_path, overlay_files


def export(
    bundle: str,
    out: str,
    *,
    config_file: str | None = None,
    overlay: str | None = None,
    checkpoint: str | None = None,
    shape: list[int] | None = None,
    batch: int = 1,
    overwrite: bool = False,
) -> None:
    """Write the dense part of a trained network for another runtime: X.pt2, X.onnx or X.ts, and X.json about it.

    The file is run once on a random image and kept only if it computes what the network does. docs/export.md says what
    is in it, and how to go on from its outputs.

    Args:
        bundle: Folder of the bundle, or the name of one in ./bundles or of the package.
        out: File to write: .pt2 (torch.export), .onnx, or .ts (TorchScript).
        config_file: Configuration file, or "['a','b']", to read instead of configs/inference.json.
        overlay: Names of files in configs/overlays, or paths of such files, separated by commas.
        checkpoint: Trained weights; the bundle says which are used without it.
        shape: Voxels of the input, "[z,y,x]", multiples of the network's stride; default a block with its halo.
        batch: Images at a time.
        overwrite: Replace an existing file.
    """
    folder = find_bundle(bundle)
    files = config_files(folder, config_file, "inference.json") + overlay_files(folder, overlay)

    from seg3d_monai.export.write import check_target, export_bundle

    path = check_target(out, overwrite)
    weights = checkpoint and literal_path(checkpoint)
    differences = export_bundle(folder, files, path, checkpoint=weights, shape=shape, batch=batch)
    print(f"exported: {path}, described in {path.with_suffix('.json')}")
    for name, difference in differences.items():
        print(f"  {name}: differs by {difference.absolute:.2g}, {difference.relative:.2g} of its largest number")
