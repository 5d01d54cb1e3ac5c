"""The torch dataset: ids of a source, read and put through a transform.

dataset = ImageDataset(source, source.ids("train"), train_geometry(512, 320, 640))
dataset[0]    # {"id": "2007_000032", "image": uint8 [3, 512, 512], "label": float32 [K]}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets.base import DataSource


@dataclass(eq=False, repr=False)
class ImageDataset(Dataset):
    """Images with what is known about them.

    Items are dicts: "id" str; "image" uint8 [3, H, W]; "label" float32 [K], unless `with_labels` is false; "mask"
    int64 [H, W], if `with_masks`. Random transforms draw from torch's global generator; `build_loader` seeds it.

    Raises:
        UserError: an id without label or mask; or masks that show no class at all, unless `all_empty`. Found here, not
            hours later in a worker.
    """

    source: DataSource
    ids: Sequence[str]
    transform: v2.Transform | None = None  # geometry of one sample (see `transforms`); None keeps images as they are
    with_masks: bool = False
    with_labels: bool = True  # read image labels; off for test sets, which have none
    all_empty: bool = False  # whether all masks may be without a class, as corrected ones of one photograph can be

    def __post_init__(self) -> None:
        self.labels = torch.from_numpy(self.source.image_labels(self.ids)) if self.with_labels else None
        if self.with_masks:
            (self.source.check_present if self.all_empty else self.source.check_masks)(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read and transform one item (UserError: a file is unreadable, or image and mask do not fit)."""
        image_id = self.ids[index]
        sample = {"image": tv_tensors.Image(self.source.photograph(image_id)[0])}
        if self.with_masks:
            sample["mask"] = tv_tensors.Mask(torch.tensor(self.source.mask(image_id)))
        if self.transform is not None:
            sample = self.transform(sample)
        item = {"id": image_id, "image": sample["image"].as_subclass(torch.Tensor)}
        if self.labels is not None:
            item["label"] = self.labels[index]
        if self.with_masks:
            item["mask"] = sample["mask"].as_subclass(torch.Tensor).long()
        return item
