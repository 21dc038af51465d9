"""Names that a block of Python in the documents takes for given."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from doc_blocks import Piece
from doc_workspace import bright_parts, write_predicted

from seg3d_monai.data import CropDataset, CropIndex, CropLoader
from seg3d_monai.data.transforms import train_transforms


def namespace(piece: Piece) -> dict[str, Any]:
    """What the text around a block says is there: a model, a loader; files of that kind are written."""
    names: dict[str, Any] = {"__name__": "documents"}
    if "my_model" in piece.text:
        names["my_model"] = _model
    if "loader.state_dict" in piece.text:
        names |= {"loader": _loader(), "num_epochs": 1}
    if "mine.csv" in piece.text:
        shutil.copytree("DATA", "synthetic")
        rows = [
            f"BBBC050/{name}/image.tif,BBBC050/{name}/labels.tif,train,{name}" for name in ("Emb01_t101", "Emb02_t101")
        ]
        Path("mine.csv").write_text("\n".join(["image,label,split,name", *rows]) + "\n")
    if re.search(r"\b(228|400)\b", piece.text):
        for name in ("stack.ome.zarr", "cells.zarr"):
            shutil.rmtree(name)
        for file in Path().glob("cells.*"):
            file.unlink()
        image = tifffile.imread("IMAGE.tif")
        space = [(150, 460 - 150 - size) for size in image.shape]
        wide = np.pad(np.tile(image, (2, 1, 1)), [(0, 0), *space[1:]])
        write_predicted(wide, ("stack.ome.zarr",), "cells.zarr", (64, 460, 460))
    return names


def _model(block: torch.Tensor) -> tuple[Any, Any, Any, Any]:
    found = bright_parts(block, ())
    return found.boxes, found.scores, found.classes, found.masks


def _loader() -> CropLoader:
    crops = CropDataset(
        index=CropIndex("crops.sqlite"),
        split="train",
        num_samples=4,
        transform=train_transforms(crop_size=[16, 32, 40]),
    )
    return CropLoader(dataset=crops, batch_size=2)
