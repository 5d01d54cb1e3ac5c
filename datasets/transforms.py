"""Augmentation: geometry of one sample in a worker, colours of a whole batch on the device.

Geometry is a torchvision v2 transform: image and mask are tv_tensors and move together. A photograph larger than the
training crop is reduced to its size first: labels name what is in the whole photograph, and a crop of 512 pixels from a
camera's 4,000 would seldom show it. VOC's and COCO's photographs are never larger than the published crops.

    geometry = train_geometry(512, 320, 640)
    sample = geometry({"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)})

Colours stay uint8, because the dense CRF in the training loop needs the pixels that the network sees:

    images = PhotometricAugmentation()(images.to(device))    # uint8 [B, 3, H, W]
    features = model(normalize(images))                      # float32
"""

import math
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from tools.maps import fit
from tools.options import IGNORE_INDEX

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, with the digits torchvision uses
JITTER_PROB = 0.8  # of an image to be jittered
STRENGTH = 0.25  # of each jitter
SIGMA = (0.15, 1.15)  # range of the blur's standard deviation, pixels


# Geometry of one sample


def train_geometry(size: int, min_size: int, max_size: int, *, randaugment: bool = False) -> v2.Transform:
    """Geometry for classifiers and for the labeled images of CSRM.

    Args:
        size: side of the square crop, pixels; longer images are reduced to it.
        min_size, max_size: images shorter than `min_size` are enlarged to it. The image is then scaled by
            U(min_size / size, max_size / size) before the crop.
        randaugment: end with RandAugment (two operations of magnitude 10; images only, masks would not follow).
    """
    steps = [
        RandomScale(min_size / size, max_size / size, (min_size, size)),
        RandomCropReflect(size),
        v2.RandomHorizontalFlip(0.5),
    ]
    if randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=10))
    return v2.Compose(steps)


def crop_geometry(size: int, min_size: int) -> v2.Transform:
    """Geometry for the unlabeled images of CSRM: their long side in the range `min_size` to `size`, the rest padded."""
    return v2.Compose([RandomScale(1, 1, (min_size, size)), RandomCropReflect(size)])


def segmentation_geometry(size: int, min_size: int, max_size: int) -> v2.Transform:
    """Geometry for DeepLabV3+: long side U(min_size, max_size), crop of `size`, flip."""
    return v2.Compose([RandomLongSide(min_size, max_size), RandomCropReflect(size), v2.RandomHorizontalFlip(0.5)])


class RandomScale(v2.Transform):
    """Resize by a random factor, the same for both sides.

    Images are resized bilinearly with antialiasing, masks by nearest neighbour.

    Args:
        low, high: the factor is U(low, high).
        long_side: it is relative to the image with its long side brought into this range; pixels.
    """

    def __init__(self, low: float, high: float, long_side: tuple[float, float] = (0, math.inf)) -> None:
        super().__init__()
        assert 0 < low <= high, f"expected 0 < low <= high, got {low} and {high}"
        self.low, self.high, self.long_side = low, high, long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = VF.get_size(flat_inputs[0])
        scale = _uniform(self.low, self.high) * fit(height, width, self.long_side)
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return VF.resize(inpt, params["size"], antialias=True)


class RandomLongSide(RandomScale):
    """Resize so that the longer side becomes U(low, high) pixels; the aspect ratio stays."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = VF.get_size(flat_inputs[0])
        scale = _uniform(self.low, self.high) / max(height, width)
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}


class RandomCropReflect(v2.Transform):
    """Random `size` x `size` crop. A side shorter than that is padded at random on its two ends.

    Images are padded with their reflection, repeated as often as needed; masks with `IGNORE_INDEX`, because nobody
    annotated the reflection.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        assert size > 0, f"expected a positive size, got {size}"
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = VF.get_size(flat_inputs[0])
        return {"top": self._offset(height), "left": self._offset(width)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        output = inpt.as_subclass(Tensor)
        for dim, offset in ((-2, params["top"]), (-1, params["left"])):
            output = output.narrow(dim, max(offset, 0), min(self.size, output.shape[dim]))
        top, left = max(-params["top"], 0), max(-params["left"], 0)
        padded = _pad(output, top, left, self.size, is_mask=isinstance(inpt, tv_tensors.Mask))
        return tv_tensors.wrap(padded, like=inpt)

    def _offset(self, length: int) -> int:
        """Of the crop in the image; negative if the image has to be padded: of the image in the crop, negated."""
        slack = length - self.size
        return int(torch.randint(min(slack, 0), max(slack, 0) + 1, ()))


def _pad(pixels: Tensor, top: int, left: int, size: int, *, is_mask: bool) -> Tensor:
    height, width = pixels.shape[-2:]
    below, right = size - height - top, size - width - left
    if is_mask:
        return F.pad(pixels, (left, right, top, below), value=IGNORE_INDEX)
    if height == width == size:
        return pixels
    # OpenCV, since torch and torchvision cannot reflect by more than the image's own size
    pixels = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    padded = cv2.copyMakeBorder(pixels, top, below, left, right, cv2.BORDER_REFLECT_101)
    return torch.from_numpy(padded).permute(2, 0, 1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


# Colours of a batch


class PhotometricAugmentation(nn.Module):
    """Colour jitter, then Gaussian blur; every image draws its own strengths.

    With probability `JITTER_PROB`, brightness, contrast and saturation are multiplied by U(1 - STRENGTH, 1 + STRENGTH),
    and the hue is turned by U(-STRENGTH, STRENGTH) turns, in a random order, one for the batch. With probability
    `blur_prob`, the blur has a deviation of U`SIGMA` pixels. All is drawn on the device, without waiting for it.
    """

    def __init__(self, blur_prob: float = 0.5) -> None:
        super().__init__()
        self.blur_prob = blur_prob

    @torch.no_grad()
    @record_function("augmentation")
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> uint8 [B, 3, H, W]."""
        assert images.dtype == torch.uint8, f"expected uint8 images, got {images.dtype}"
        x = images.float() / 255
        x = self._blur(self._jitter(x))
        return (x * 255).round().clamp(0, 255).to(torch.uint8)

    def _jitter(self, x: Tensor) -> Tensor:
        chosen = _chance(x, JITTER_PROB)
        jitters = ((adjust_brightness, 1), (adjust_contrast, 1), (adjust_saturation, 1), (adjust_hue, 0))
        for index in torch.randperm(len(jitters)).tolist():  # drawn on the CPU, also if the images are on a GPU
            adjust, neutral = jitters[index]
            x = adjust(x, neutral + chosen * STRENGTH * (2 * torch.rand(len(x), device=x.device) - 1))
        return x

    def _blur(self, x: Tensor) -> Tensor:
        low, high = SIGMA
        sigma = low + (high - low) * torch.rand(len(x), device=x.device)
        return gaussian_blur(x, sigma * _chance(x, self.blur_prob), radius=max(1, round(3 * high)))


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale float [B, 3, H, W] in [0, 1] by `factor` [B]."""
    return (x * _per_image(factor)).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the image's mean grey by `factor` [B]."""
    return _blend(x, _grey(x).mean(dim=(-3, -2, -1), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale every pixel's distance from its own grey by `factor` [B]."""
    return _blend(x, _grey(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the HSV hue of float [B, 3, H, W] in [0, 1] by `shift` [B] turns; value and chroma stay.

    Without building HSV: red, green and blue (n = 5, 3, 1) are value - chroma * clip(min(k, 4 - k), 0, 1), where
    k = (n + 6 hue) mod 6.
    """
    red, green, blue = x.unbind(1)
    value, brightest = x.max(dim=1)
    chroma = value - x.amin(dim=1)
    safe = chroma.clamp(min=1e-8)
    sector = torch.where(
        brightest == 0,
        (green - blue) / safe,
        torch.where(brightest == 1, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sector = sector + 6 * shift.view(-1, 1, 1)
    k = torch.stack([sector + 5, sector + 3, sector + 1], dim=1) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur float [B, C, H, W] with a Gaussian of deviation `sigma` [B] pixels; borders reflect.

    Args:
        sigma: 0 leaves the image as it is.
        radius: taps on each side of the centre, less than H and W.
    """
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma.view(-1, 1).clamp(min=1e-3) ** 2))
    weights = weights / weights.sum(dim=1, keepdim=True)
    for dim in (-2, -1):
        x = _filter(x, weights, dim)
    return x


def _filter(x: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Correlate along `dim` with a kernel per image, weights [B, 2 * radius + 1]."""
    length, radius = x.shape[dim], weights.shape[1] // 2
    padded = F.pad(x, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="reflect")
    total = torch.zeros_like(x)
    for tap in range(weights.shape[1]):
        total += _per_image(weights[:, tap]) * padded.narrow(dim, tap, length)
    return total


def _grey(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(x), x, _per_image(factor)).clamp(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _chance(x: Tensor, probability: float) -> Tensor:
    """1 with `probability`, else 0, per image: float32 [B] on the images' device."""
    return (torch.rand(len(x), device=x.device) < probability).float()
