"""Segment Anything's automatic mask generator, made for throughput.

    generator = MaskGenerator(load_sam("sam_vit_h_4b8939.pth", "vit_h", device), MaskOptions(), dtype=torch.bfloat16)
    masks = generator(images)  # for each image its masks, as COCO RLE

Rules and defaults are those of `segment_anything.SamAutomaticMaskGenerator`: a grid of point prompts with three masks
each, filtered by predicted IoU, by stability and by the NMS of their boxes, on the image and on crops of it.
docs/sam-refinement.md says what is done in another order here, and why. Memory is bounded by `points_per_batch`, not by
the number of masks; the host waits for the device a few times per batch of prompts, never per mask.
"""

import copy
import functools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    MaskData,
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    uncrop_boxes_xyxy,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.ops import nms

from tools.errors import UserError
from tools.weights import common_prefix, load_weights

SAM_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # channels of the image encoder
STABILITY_OFFSET = 1.0  # of the mask threshold, in logits; these three as in SamAutomaticMaskGenerator
CROP_NMS_THRESH = 0.7  # box IoU above which masks of two crops are duplicates
CROP_OVERLAP = 512 / 1500  # of neighbouring crops, as a fraction of the image's shorter side


@dataclass(frozen=True)
class MaskOptions:
    """Which masks are looked for and kept, under the names of `segment_anything.SamAutomaticMaskGenerator`."""

    points_per_side: int = 32  # prompts along each side of the image, or crop
    pred_iou_thresh: float = 0.88  # masks with a lower predicted IoU are dropped, in [0, 1]
    stability_score_thresh: float = 0.95  # masks whose area changes more with the threshold are dropped, in [0, 1]
    box_nms_thresh: float = 0.7  # box IoU above which masks of a view are duplicates, in [0, 1]
    crop_n_layers: int = 0  # layer i looks at 4^i crops too; 0: at the whole image only
    min_mask_region_area: int = 0  # holes and islands with fewer pixels are removed; 0: none


@dataclass(frozen=True)
class View:
    """What the network looks at: a whole image or a crop."""

    image: int  # its index among the images
    size: tuple[int, int]  # (H, W) of the image
    box: tuple[int, int, int, int]  # (x0, y0, x1, y1), the part of the image

    @property
    def crop_size(self) -> tuple[int, int]:
        """(H, W) of the part."""
        x0, y0, x1, y1 = self.box
        return y1 - y0, x1 - x0


Found = tuple[View, MaskData]
"""Masks of a view that are not drawn yet: "logits" [N, h, w] at the decoder's resolution, "boxes" int64 [N, 4], XYXY in
the image, "scores" float32 [N], predicted IoU."""


@dataclass(eq=False, repr=False)
class MaskGenerator:
    """All objects of an image as masks. Threads may share one: they prepare images while another uses the device.

    The methods from `_prepare_networks` to `predict`, and `_enlarge`, are about the networks of Segment Anything; for
    SAM 2 and 3, `tools.proposals.later_sams` has others.
    """

    mask_threshold: ClassVar = 0.0  # logits above belong to the mask

    model: Sam  # on its device, in evaluation mode
    options: MaskOptions  # which masks are looked for
    _: KW_ONLY
    dtype: torch.dtype | None = None  # of the encoder and the decoder (None: float32); scores and enlarging are float32
    compile: InitVar[bool] = False  # let torch.compile have the networks: minutes at the start, faster afterwards
    images_per_batch: int = 1  # images or crops that the encoder sees at a time
    points_per_batch: int = 64  # prompts that are decoded, and full-size masks that exist, at a time

    def __post_init__(self, compile: bool) -> None:
        self.dtype = self.dtype or torch.float32
        self.point_grid = build_point_grid(self.options.points_per_side)
        # As there: 0 is no filter.
        self.pred_iou_thresh = self.options.pred_iou_thresh if self.options.pred_iou_thresh > 0 else -math.inf
        self._device_lock = threading.Lock()
        self._prepare_networks(compile)

    def _prepare_networks(self, compile: bool) -> None:
        # Converted as a whole: under autocast, normalisations write float32, and the next layer converts it back.
        networks = (self.model.image_encoder, self.model.mask_decoder)
        if self.dtype != torch.float32:
            networks = tuple(copy.deepcopy(net).to(self.dtype) for net in networks)
        encoder, self._decoder = networks
        wrap = torch.compile if compile else lambda function: function
        self._encode, self._predict = wrap(encoder), wrap(self.predict)
        self._transform = ResizeLongestSide(self.model.image_encoder.img_size)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[list[dict]]:
        """The masks of each image: compressed COCO RLE dicts, those of a view by falling score.

        Args:
            images: uint8 RGB HxWx3 in [0, 255], of any sizes.

        Raises:
            UserError: the network gives no finite numbers in this precision.
        """
        views = [view for index, image in enumerate(images) for view in self._views(index, image.shape[:2])]
        inputs = [self._resize(images[view.image], view) for view in views]
        found: list[list[Found]] = [[] for _ in images]
        with self._device_lock:
            for view, embedding in zip(views, self._embeddings(inputs), strict=True):
                found[view.image].append((view, self._candidates(view, embedding)))
            drawn = [self._draw(self._without_duplicates(each)) for each in found]
        return [self._finish(rles, boxes) for rles, boxes in drawn]

    def _views(self, index: int, size: tuple[int, int]) -> list[View]:
        boxes, _ = generate_crop_boxes(size, self.options.crop_n_layers, CROP_OVERLAP)
        return [View(index, size, tuple(box)) for box in boxes]

    def _resize(self, image: np.ndarray, view: View) -> np.ndarray:
        """The view with its long side as the encoder wants it, uint8 hxwx3."""
        x0, y0, x1, y1 = view.box
        return self._transform.apply_image(image[y0:y1, x0:x1])

    def _embeddings(self, inputs: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """The image embedding [1, C, h, w] of each input, computed `images_per_batch` at a time."""
        for start in range(0, len(inputs), self.images_per_batch):
            batch = [
                self.model.preprocess(torch.from_numpy(image).to(self.model.device).permute(2, 0, 1))
                for image in inputs[start : start + self.images_per_batch]
            ]
            yield from self._encode(torch.stack(batch).to(self.dtype)).split(1)

    def _used(self, view: View) -> tuple[int, int]:
        """(height, width) of the part of the encoder's input that the view fills; the rest is padding."""
        return self._transform.get_preprocess_shape(*view.crop_size, self.model.image_encoder.img_size)

    def _candidates(self, view: View, embedding: Tensor) -> MaskData:
        """The masks of a view that pass the filters, without duplicates, by falling score."""
        grid = self.point_grid * self._used(view)[::-1]
        found, finite = MaskData(), []
        for points in torch.from_numpy(grid).to(self.model.device).split(self.points_per_batch):
            logits, scores = self._decode(embedding, points)
            finite.append(scores.isfinite().all())
            likely = torch.nonzero(scores > self.pred_iou_thresh).flatten()
            for part in likely.split(self.points_per_batch):
                found.cat(self._stable(view, logits[part], scores[part]))
        if not torch.stack(finite).all():
            raise UserError(
                "--mixed_precision, --compile: SAM's predicted IoUs are not finite numbers. Try --overwrite "
                "--mixed_precision off, then --compile false."
            )
        found.filter(nms(found["boxes"].float(), found["scores"], self.options.box_nms_thresh))
        return found

    def _decode(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Masks at low resolution, logits [3P, h, w], and their predicted IoU, float32 [3P], for prompts [P, 2]."""
        labels = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
        prompt_tokens, _ = self.model.prompt_encoder(points=(points[:, None], labels), boxes=None, masks=None)
        logits, iou_token = self._predict(embedding, prompt_tokens.to(self.dtype))
        scores = self.model.mask_decoder.iou_prediction_head(iou_token.float())[:, 1:]
        return logits.flatten(0, 1), scores.flatten()

    def predict(self, embedding: Tensor, prompt_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder for prompts of one image.

        Args:
            embedding: [1, C, h, w] of the image.
            prompt_tokens: [P, n, C], of the same dtype.

        Returns:
            Mask logits [P, 3, 4h, 4w], and the token that predicts their IoUs, [P, C].
        """
        prompts, decoder = self.model.prompt_encoder, self._decoder
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        # A batch of one: the transformer broadcasts it to the prompts where they first meet.
        image = embedding + prompts.no_mask_embed.weight.reshape(1, -1, 1, 1).to(embedding)
        tokens = torch.cat([output_tokens.expand(len(prompt_tokens), -1, -1), prompt_tokens], dim=1)
        tokens, pixels = decoder.transformer(image, prompts.get_dense_pe().to(embedding), tokens)
        pixels = decoder.output_upscaling(pixels.transpose(1, 2).unflatten(2, image.shape[-2:]))
        # Token 0 predicts the IoUs; of the mask tokens, the first is for prompts that are not ambiguous.
        heads = list(enumerate(decoder.output_hypernetworks_mlps, start=1))[1:]
        weights = torch.stack([head(tokens[:, index]) for index, head in heads], dim=1)
        return (weights @ pixels.flatten(2)).unflatten(2, pixels.shape[-2:]), tokens[:, 0]

    def _stable(self, view: View, logits: Tensor, scores: Tensor) -> MaskData:
        """Those of the masks that are stable and do not end where only the crop ends."""
        threshold, (height, width) = self.mask_threshold, view.size
        full = self._enlarge(view, logits)
        stability = calculate_stability_score(full, threshold, STABILITY_OFFSET).nan_to_num(0)
        boxes = batched_mask_to_box(full > threshold)
        kept = stability >= self.options.stability_score_thresh
        kept &= ~is_box_near_crop_edge(boxes, view.box, [0, 0, width, height])
        masks = MaskData(logits=logits, boxes=uncrop_boxes_xyxy(boxes, view.box), scores=scores)
        masks.filter(kept.nonzero().flatten())
        return masks

    def _enlarge(self, view: View, logits: Tensor) -> Tensor:
        """Masks at the size of the view, float32 [N, H, W]: `Sam.postprocess_masks`, a matrix for each side."""
        encoder_size = self.model.image_encoder.img_size
        rows, columns = (
            interpolation_matrix(low, encoder_size, inside, high, logits.device)
            for low, inside, high in zip(logits.shape[-2:], self._used(view), view.crop_size, strict=True)
        )
        return rows @ logits.float() @ columns.T

    def _without_duplicates(self, found: list[Found]) -> list[Found]:
        """NMS between the views of an image, in favour of smaller crops."""
        if len(found) == 1:
            return found
        boxes = torch.cat([masks["boxes"] for _, masks in found]).float()
        sizes = [len(masks["scores"]) for _, masks in found]
        weights = torch.tensor([1 / math.prod(view.crop_size) for view, _ in found])
        weights = weights.repeat_interleave(torch.tensor(sizes)).to(boxes.device)
        kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        kept[nms(boxes, weights, CROP_NMS_THRESH)] = True
        for (_, masks), part in zip(found, kept.split(sizes), strict=True):
            masks.filter(part.nonzero().flatten())
        return found

    def _draw(self, found: list[Found]) -> tuple[list[dict], Tensor]:
        """Uncompressed RLEs of the masks of an image, and their boxes [N, 4]."""
        rles = []
        for view, masks in found:
            (height, width), (x0, y0, x1, y1) = view.size, view.box
            for logits in masks["logits"].split(self.points_per_batch):
                drawn = self._enlarge(view, logits) > self.mask_threshold
                rles += uncompressed_rle(F.pad(drawn, (x0, width - x1, y0, height - y1)))
        return rles, torch.cat([masks["boxes"] for _, masks in found])

    def _finish(self, rles: list[dict], boxes: Tensor) -> list[dict]:
        """Clear small holes and islands, if that is asked for, and compress."""
        masks = MaskData(rles=rles, boxes=boxes.cpu())
        if self.options.min_mask_region_area > 0:
            threshold = max(self.options.box_nms_thresh, CROP_NMS_THRESH)
            SamAutomaticMaskGenerator.postprocess_small_regions(masks, self.options.min_mask_region_area, threshold)
        return [coco_encode_rle(rle) for rle in masks["rles"]]


def load_sam(checkpoint: str | os.PathLike, model_type: str, device: torch.device) -> Sam:
    """Build SAM (one of `options.SAM_TYPES`), and load its public weights; nothing but tensors is unpickled.

    Raises:
        UserError: no such file, not a checkpoint, or weights of another model type.
    """
    if not Path(checkpoint).is_file():
        remedy = "Download one, or use --proposals regions (or sam2, for a folder or a name on the hub)."
        raise UserError(f"{checkpoint}: no such checkpoint. {remedy}")
    tensors = load_weights(checkpoint).tensors
    model = sam_model_registry[model_type](checkpoint=None)
    wanted = model.state_dict()
    prefix = common_prefix(tensors, set(wanted))
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    fits = sum(name in state and state[name].shape == tensor.shape for name, tensor in wanted.items())
    if fits < len(wanted) or len(state) > len(wanted):
        position = state.get("image_encoder.pos_embed", torch.zeros(1))
        other = SAM_WIDTHS.get(position.shape[-1], model_type)
        remedy = "Pass weights of the first SAM; those of SAM-HQ, MobileSAM, SAM 2 and others cannot be used."
        if other != model_type:
            remedy = f"Set --model_type {other}."
        raise UserError(
            f"{checkpoint}: not the weights of SAM {model_type} ({fits} of {len(wanted)} tensors fit). {remedy}"
        )
    model.load_state_dict(state)
    return model.to(device).eval()


@functools.lru_cache(maxsize=64)
def interpolation_matrix(low: int, padded: int, used: int, high: int, device: torch.device) -> Tensor:
    """Linear interpolation from `low` samples to `padded`, of these the first `used` to `high`: float32 [high, low].

    Interpolation is linear in its input, so the images of the unit vectors tell all about it.
    """
    units = F.interpolate(torch.eye(low, device=device)[None], padded, mode="linear")[..., :used]
    return F.interpolate(units, high, mode="linear")[0].T.contiguous()


def uncompressed_rle(masks: Tensor) -> list[dict]:
    """COCO's RLE of masks bool [N, H, W], as lists of counts."""
    number, height, width = masks.shape
    columns = masks.transpose(1, 2).flatten(1)
    changes = columns.clone()  # a mask that begins with its first pixel has a first count of 0
    changes[:, 1:] ^= columns[:, :-1]
    owners, places = changes.nonzero().cpu().numpy().T
    parts = np.split(places, np.searchsorted(owners, np.arange(1, number)))
    pixels = height * width
    return [
        {"size": [height, width], "counts": np.diff(part, prepend=0, append=pixels).tolist()} for part in parts[:number]
    ]
