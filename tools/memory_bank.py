"""The contrastive loss L_contra and its class-wise memory bank (ReCo, ICLR 2022; U2PL, CVPR 2022).

Each class has a queue of hard negatives: teacher representations of pixels of other classes that look like it. The
student's pixels of the class are pulled to the class mean of the teacher, and pushed away from keys of the queue.

    bank = MemoryBank(num_classes=21, dim=256).to(device)
    low, high = entropy_masks(teacher_entropy, unlabeled_labels, alpha=20)
    loss = contrastive_loss(bank, student_reps, teacher_reps, labels, probs, image_labels, low, high)

Batches are two halves: "labeled" images (labels from CAMs) first, then "unlabeled" ones (labels from the teacher).
Pixels are only ever chosen through indices of fixed length, so that nothing here waits for the device.

Several processes (`tools.distributed`) have equal banks, that of a single process with the whole batch: each gathers
the maps of all, which together are about as large as the bank, and pushes the keys of all. Class means, too, are over
the whole batch. Anchors are drawn from a process's own pixels, and weighted by its share of all candidates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.distributed import all_reduce_sum, gather_batch
from tools.losses import certain_pixels, masked_percentile
from tools.options import IGNORE_INDEX
from tools.parallel import world_size

ANCHOR_PROBABILITY = 0.3  # of its label, to the teacher, above which a pixel can be an anchor


class MemoryBank(nn.Module):
    """First-in, first-out queues of negative keys, one per class, in buffers: checkpoints carry them.

    Args:
        dim: D, the length of a representation.
        queue_size: keys kept per foreground class.
        background_queue_size: keys kept for the background, class 0, which borders on every class.
    """

    def __init__(
        self, *, num_classes: int, dim: int, queue_size: int = 30_000, background_queue_size: int = 50_000
    ) -> None:
        super().__init__()
        self.capacities = [background_queue_size] + [queue_size] * (num_classes - 1)
        # All queues lie in one buffer, one after the other, so that a single gather samples from all of them.
        # The row after the last queue is never read: `push` writes there what it has no key for.
        self.register_buffer("storage", torch.zeros(sum(self.capacities) + 1, dim))
        self.register_buffer("starts", torch.tensor([0] + self.capacities[:-1]).cumsum(0), persistent=False)
        self.register_buffer("sizes", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("heads", torch.zeros(num_classes, dtype=torch.long))

    @torch.no_grad()
    def push(self, class_index: int, vectors: Tensor, mask: Tensor) -> None:
        """Append the vectors [P, D] in `mask`, bool [P], in order, over the oldest keys of a class."""
        capacity = self.capacities[class_index]
        running = mask.cumsum(0)
        count = running[-1]
        kept = count.clamp(max=capacity)
        # Only the last `capacity` keys survive, so no more are looked up; slots from `kept` on have no key.
        slot = torch.arange(min(capacity, len(mask)), device=mask.device)
        position = _position_of_rank(running, count - kept + slot)
        row = self.starts[class_index] + (self.heads[class_index] + slot) % capacity
        row = row.where(slot < kept, len(self.storage) - 1)
        self.storage.index_copy_(0, row, vectors.index_select(0, position).to(self.storage.dtype))
        self.heads[class_index] = (self.heads[class_index] + kept) % capacity
        self.sizes[class_index] = (self.sizes[class_index] + kept).clamp(max=capacity)

    def sample(self, count: int) -> Tensor:
        """Draw `count` keys of every class with replacement, float32 [C, count, D]; of an empty queue, zeros."""
        ranks = torch.rand(len(self.capacities), count, device=self.storage.device) * self.sizes[:, None]
        rows = self.starts[:, None] + ranks.long()
        return self.storage.index_select(0, rows.flatten()).view(*rows.shape, -1)


def contrastive_loss(
    bank: MemoryBank,
    student_reps: Tensor,
    teacher_reps: Tensor,
    labels: Tensor,
    teacher_probs: Tensor,
    image_labels: Tensor,
    low_entropy: Tensor,
    high_entropy: Tensor,
    *,
    low_rank: int = 3,
    high_rank: int = 6,
    num_anchors: int = 256,
    num_negatives: int = 50,
    temperature: float = 0.5,
) -> Tensor:
    """L_contra: feed the bank with this step's keys, then contrast anchors with the class means and with the bank.

    Args:
        student_reps: float [2B, D, h, w], with gradient.
        teacher_reps: float [2B, D, h, w].
        labels: int64 [2B, h, w], 255 ignore: CAM labels of the labeled half, then teacher labels.
        teacher_probs: float [2B, C, h, w], softmax of the teacher's segmentation logits.
        image_labels: float [2B, K], after mixing: a class is in the image where it is above 0.
        low_entropy, high_entropy: bool [B, h, w] over the unlabeled half (`entropy_masks`).
        low_rank, high_rank: a pixel can be a hard negative of the teacher's `low_rank` most probable classes; an
            uncertain pixel also of those ranked in [low_rank, high_rank).

    Returns:
        float32 scalar: the sum over the classes that have anchors and keys, divided by the number of classes that have
        reliable pixels; 0 if at most one class has any.
    """
    feed_bank(bank, teacher_reps, labels, teacher_probs, image_labels, high_entropy, low_rank, high_rank)
    # Pixels that are not reliable become 255, so that "reliable and labelled c" is one comparison from here on.
    reliable = labels.where(torch.cat([torch.ones_like(low_entropy), low_entropy]), IGNORE_INDEX)
    pixels, candidates = sample_anchors(reliable, teacher_probs, num_anchors, ANCHOR_PROBABILITY)
    area = labels[0].numel()
    anchors = student_reps.flatten(2)[pixels // area, :, pixels % area]
    # Mixed precision would turn the products below into half precision, whose sums over a batch can overflow.
    with torch.autocast(student_reps.device.type, enabled=False):
        positives, has_reliable = class_means(teacher_reps, reliable, teacher_probs.shape[1])
        per_class = info_nce(anchors.float(), positives, bank.sample(num_anchors * num_negatives), temperature)

    num_reliable = has_reliable.sum()
    all_candidates = all_reduce_sum(candidates)
    contributes = (all_candidates > 0) & (bank.sizes > 0) & (num_reliable > 1)
    weights = candidates * world_size() / all_candidates.clamp(min=1)  # 1 in a single process
    return (weights * per_class).where(contributes, 0).sum() / num_reliable.clamp(min=1)


def info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean cross entropy per class of finding the positive among the negatives by cosine similarity.

    Args:
        anchors: float [C, A, D].
        positives: float [C, D], one per class.
        negatives: float [C, A * N, D], N for each anchor.

    Returns:
        float [C].
    """
    anchors = F.normalize(anchors, dim=-1)
    to_positive = torch.einsum("cad,cd->ca", anchors, F.normalize(positives, dim=-1))
    # The negatives are by far the largest tensor: their products are divided by their norms, not they themselves.
    negatives = negatives.unflatten(1, (anchors.shape[1], -1))
    norms = torch.linalg.vector_norm(negatives, dim=-1).clamp(min=1e-12)
    to_negatives = torch.einsum("cad,cand->can", anchors, negatives) / norms
    logits = torch.cat([to_positive[..., None], to_negatives], dim=-1) / temperature
    return -logits.log_softmax(dim=-1)[..., 0].mean(dim=1)


def feed_bank(
    bank: MemoryBank,
    teacher_reps: Tensor,
    labels: Tensor,
    teacher_probs: Tensor,
    image_labels: Tensor,
    high_entropy: Tensor,
    low_rank: int,
    high_rank: int,
) -> None:
    """Push the teacher's representations of the hard negatives of every class c.

    These are labeled pixels (not 255) of another class where c is among the `low_rank` most probable classes; and
    uncertain unlabeled pixels where c is that probable but not in the image, or has a rank in [low_rank, high_rank).
    Arguments as of `contrastive_loss`.
    """
    half = len(labels) // 2
    num_classes = teacher_probs.shape[1]
    ranked = teacher_probs.topk(min(high_rank, num_classes), dim=1).indices
    in_image = F.pad(image_labels, (1, 0), value=1.0) > 0  # the background is in every image
    masks = []
    for c in range(num_classes):
        probable = (ranked[:, :low_rank] == c).any(dim=1)
        unlikely = (ranked[half:, low_rank:] == c).any(dim=1)
        labeled = probable[:half] & (labels[:half] != c) & (labels[:half] != IGNORE_INDEX)
        absent = ~in_image[half:, c, None, None]
        unlabeled = high_entropy & ((probable[half:] & absent) | unlikely)
        masks.append(torch.cat([labeled, unlabeled]))
    vectors = gather_batch(teacher_reps.permute(0, 2, 3, 1)).flatten(0, 2)  # a copy, unless already channels last
    masks = gather_batch(torch.stack(masks, dim=1)).transpose(0, 1).flatten(1)
    for c, mask in enumerate(masks):
        bank.push(c, vectors, mask)


def entropy_masks(teacher_entropy: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The most and the least certain alpha per cent of the pixels that are not 255.

    Args:
        teacher_entropy, labels: float and int64 [B, h, w] of the unlabeled half.
        alpha: in [0, 50] (`tools.losses.unreliable_percent`).

    Returns:
        Two bool [B, h, w]: below the alpha-th percentile; at or above the (100 - alpha)-th.
    """
    labelled = labels != IGNORE_INDEX
    low = certain_pixels(labels, teacher_entropy, alpha)
    high = labelled & (teacher_entropy >= masked_percentile(teacher_entropy, labelled, 100 - alpha))
    return low, high


@torch.no_grad()
def class_means(representations: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean representation per label: float [N, D, h, w] and int64 [N, h, w] -> float32 [C, D], bool [C] (any pixel).

    Over the pixels of all processes.
    """
    sums = representations.new_zeros(num_classes, representations.shape[1], dtype=torch.float32)
    counts = sums.new_zeros(num_classes)
    # One image at a time: a membership matrix of a whole COCO batch is half a gigabyte.
    for rep, label in zip(representations.flatten(2), labels.flatten(1), strict=True):
        member = (label == torch.arange(num_classes, device=label.device)[:, None]).float()
        sums += member @ rep.float().T
        counts += member.sum(dim=1)
    sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
    return sums / counts.clamp(min=1)[:, None], counts > 0


@torch.no_grad()
def sample_anchors(labels: Tensor, teacher_probs: Tensor, count: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Draw pixels of every class, with replacement, among those the teacher gives their label more than `threshold`.

    Args:
        labels: int64 [N, h, w], 255 where a pixel cannot be an anchor.
        teacher_probs: float [N, C, h, w].

    Returns:
        int64 [C, count], positions in the flattened [N, h, w], and int64 [C], the number of pixels they were drawn from
        (where that is 0, the positions are valid but mean nothing).
    """
    num_classes = teacher_probs.shape[1]
    own = teacher_probs.gather(1, labels.clamp(max=num_classes - 1)[:, None])[:, 0]
    labels = labels.where(own > threshold, IGNORE_INDEX).flatten()
    pixels, candidates = [], []
    for c in range(num_classes):
        running = (labels == c).cumsum(0)
        ranks = torch.rand(count, device=labels.device) * running[-1]
        pixels.append(_position_of_rank(running, ranks.long()))
        candidates.append(running[-1])
    return torch.stack(pixels), torch.stack(candidates)


def _position_of_rank(running: Tensor, ranks: Tensor) -> Tensor:
    """Position of the (rank+1)-th true entry of a mask, from the mask's running sum; the last position if too few.

    It chooses entries of a mask like a boolean index, but with a length known beforehand.
    """
    return torch.searchsorted(running, ranks + 1).clamp(max=len(running) - 1)
