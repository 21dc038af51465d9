"""The partial annotation loop: regions worth annotating are suggested and exported, corrected ones are taken back."""

from seg3d_monai.annotation.import_labels import Imported, import_annotations
from seg3d_monai.annotation.suggest import Suggestions, suggest_regions

__all__ = ["Imported", "Suggestions", "import_annotations", "suggest_regions"]
