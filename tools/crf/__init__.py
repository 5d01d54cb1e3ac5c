"""Dense CRF: `field` is the model and its inference, `lattice` the Gaussian filter, `sums` and `kernel` its sums."""

from tools.crf.field import (
    CAM_SETTINGS,
    SEGMENTATION_SETTINGS,
    CRFSettings,
    mean_field,
    unary_from_labels,
    unary_from_probabilities,
)

__all__ = [
    "CAM_SETTINGS",
    "SEGMENTATION_SETTINGS",
    "CRFSettings",
    "mean_field",
    "unary_from_labels",
    "unary_from_probabilities",
]
