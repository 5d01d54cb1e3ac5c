"""Segment Anything 2 and 3: the networks of transformers in `MaskGenerator`.

    model, processor = load_later_sam("facebook/sam2.1-hiera-large", "sam2", device)
    generator = LaterMaskGenerator(model, processor, MaskOptions(), dtype=torch.bfloat16)

transformers has a generator of its own, the mask-generation pipeline. It is not used, because of an image that is not
square it prompts a part only (5.24): these networks stretch images to a square, and the pipeline's grid is still that
of SAM 1, which keeps their shape. Nor does it remove small holes and islands, though it takes the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.errors import UserError, require
from tools.proposals.generator import MaskGenerator, MaskOptions, View

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

LICENCES = {"sam2": "SAM 2.1 is under Apache-2.0.", "sam3": "SAM 3 is under Meta's SAM License: read its conditions."}


class LaterMaskGenerator(MaskGenerator):
    """`MaskGenerator` for what `load_later_sam` gives: networks that stretch images to a square."""

    def __init__(
        self, model: PreTrainedModel, processor: BaseImageProcessor, options: MaskOptions, **running: object
    ) -> None:
        self.processor, self.side = processor, processor.size["height"]
        super().__init__(model, options, **running)

    def _prepare_networks(self, compile: bool) -> None:
        assert not compile, "not with the networks of transformers"
        enabled = self.dtype != torch.float32
        self._precision = torch.autocast(self.model.device.type, self.dtype if enabled else None, enabled=enabled)

    def _resize(self, image: np.ndarray, view: View) -> Tensor:
        """The view as the encoder wants it, float32 [3, S, S], normalised."""
        x0, y0, x1, y1 = view.box
        return self.processor(images=image[y0:y1, x0:x1].copy(), return_tensors="pt")["pixel_values"][0]

    def _embeddings(self, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The feature maps [1, c, h, w] of each input, the coarsest last."""
        for start in range(0, len(inputs), self.images_per_batch):
            batch = torch.stack(inputs[start : start + self.images_per_batch])
            with self._precision:
                maps = self.model.get_image_embeddings(batch.to(self.model.device))
            yield from zip(*(each.split(1) for each in maps), strict=True)

    def _used(self, view: View) -> tuple[int, int]:
        return self.side, self.side

    def _decode(self, embedding: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
        prompts = {
            "input_points": points.float()[None, :, None],
            "input_labels": points.new_ones(1, len(points), 1).int(),
        }
        with self._precision:
            found = self.model(image_embeddings=list(embedding), **prompts)
        return found.pred_masks[0].flatten(0, 1), found.iou_scores[0].flatten().float()

    def _enlarge(self, view: View, logits: Tensor) -> Tensor:
        return F.interpolate(logits[:, None].float(), view.crop_size, mode="bilinear")[:, 0]


def load_later_sam(name: str, family: str, device: torch.device) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a network and what prepares its images.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the Hugging Face hub, which is downloaded once.
        family: sam2 or sam3.

    Raises:
        UserError: transformers is not installed; or not such a network, or not all of one.
    """
    auto = require("transformers", "transformers")
    try:
        kind = auto.AutoConfig.from_pretrained(name).model_type
        if not kind.startswith(family):
            raise UserError(f"--checkpoint {name}: a network of kind {kind}. Pass one of {family}.")
        load = auto.AutoModelForMaskGeneration.from_pretrained
        model, report = load(name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        processor = auto.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--checkpoint {name}: not to be loaded by transformers ({reason}). Pass its folder."
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise UserError(f"--checkpoint {name}: not the weights of all of its network. Get the files again.")
    print(LICENCES[family])
    return model.to(device).eval(), processor


def weights_file(name: Path) -> Path:
    """The file whose content says what a folder's network is; on the hub, the name does."""
    file = name / "model.safetensors"
    return file if file.is_file() else name
