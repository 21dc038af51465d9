"""The floor: Otsu's threshold and a distance watershed, tuned to nothing; run as `python -m peers.otsu REQUEST`."""

from typing import Any

from peers.exchange import Request, predict_all, write_answer
from seg3d_monai.report import otsu_watershed


def run(request: Request) -> dict[str, Any]:
    """Predict."""
    return {
        "steps": None,
        "train_s": None,
        "step_s": None,
        "tune_s": None,
        "tuned": {},
        "predicted": predict_all(request, otsu_watershed),
        "settings": {},
        "versions": {},
    }


if __name__ == "__main__":
    request = Request.from_arguments()
    write_answer(request, **run(request))
