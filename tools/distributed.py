"""Several processes, one per GPU, that train one network together: each step, everyone has a share of the batch.

    torchrun --standalone --nproc_per_node 4 train_csrm.py --tag csrm ...

    device = select_device(args.device)             # the GPU of this process
    distributed.start(options.EXPERIMENTS, device)  # joins the others
    distributed.share_model(model)
    loss.backward()
    distributed.average_gradients(model.parameters())

Gradients are averaged, so one rule holds for the losses of the processes: *their mean is the loss of the whole batch*.
A mean over equal shares is right as it is; a sum divided by a number of pixels becomes
`sum * world_size() / all_reduce_sum(number)`; a percentile is taken of `gather_batch(values)`. Then any number of
processes gives the losses, and the weights, of one.

In a single process, every function here returns its argument, or does nothing. Random numbers: see
`tools.training.seed_everything`.
"""

import datetime
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tools.errors import UserError
from tools.files import check_writable
from tools.parallel import is_main, world_size

CPU = torch.device("cpu")

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others before it ends with an error: for one that hangs, as torchrun and gloo notice
at once that a process has died. The longest regular wait is for the first process, which saves a checkpoint."""

LONGEST_STAGE = datetime.timedelta(days=7)
"""How long a process that has predicted its images waits for one that has not."""


def start(folder: Path, device: torch.device = CPU) -> None:
    """Join the other processes that torchrun started: over NCCL on GPUs, gloo on CPUs.

    Args:
        folder: where they write: `tools.options.EXPERIMENTS`.
        device: processes that only share images join on the CPU, on GPU machines too.

    Raises:
        UserError: they do not share it.
    """
    if world_size() == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=own)
    _check_shared(folder, device)


def _check_shared(folder: Path, device: torch.device) -> None:
    """Raise UserError, in all processes, unless all see a file that the first one makes."""
    token = torch.tensor(secrets.randbits(60), device=device)
    broadcast([token])
    path = folder / f".shared-{int(token):x}"
    if is_main():
        check_writable(folder)
        path.touch()
    wait()
    blind = int(all_reduce_sum(torch.tensor(not path.exists(), dtype=torch.long, device=device)))
    if is_main():
        path.unlink()
    if blind:
        raise UserError(
            f"{folder}: {blind} of {world_size()} processes do not see what the first one writes there. Start all "
            "machines in one shared folder."
        )


def stop() -> None:
    """Leave together, when the first has saved the result. Not after an error: the others do not know of it."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def wait_for_shares() -> None:
    """Until all processes, which met on the CPU, have done their shares of the images."""
    if dist.is_initialized():
        dist.monitored_barrier(timeout=LONGEST_STAGE)


def sum_of_shares(own: np.ndarray) -> np.ndarray:
    """The sum of what all processes, which met on the CPU, have counted in their shares of the images."""
    wait_for_shares()
    return all_reduce_sum(torch.from_numpy(own)).numpy()


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is how PyTorch says that another process is gone or does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, the same in all; without gradient. The shapes must agree."""
    if not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_batch(tensor: Tensor) -> Tensor:
    """The whole batch, [n * world_size, ...], of every process's share [n, ...]; without gradient.

    In the order in which a single process would have it, as processes load every `world_size`-th image
    (`datasets.loaders`). That holds for a batch of two halves, too.
    """
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts, dim=1).flatten(0, 1)


def share_model(model: nn.Module) -> None:
    """Make the copies of a model equal to the first process's. On GPUs batch norm becomes one over the whole batch.

    PyTorch has no such batch norm on CPUs: there it is over a process's share of the batch.
    """
    if world_size() > 1 and next(model.parameters()).is_cuda:
        from timm.layers import convert_sync_batchnorm  # takes seconds, of which evaluate.py and report.py need none

        convert_sync_batchnorm(model)
    broadcast(model.state_dict().values())


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, such as running statistics, with those of the first process."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes. All of them have gradients of the same parameters."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(mean)
    mean /= world_size()
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
