"""--on_error skip: an image is left out and listed if one of its files cannot be used; the stage does all others.

left_out = LeftOut(folder, "inference", skip=True)
for result in left_out.results(work, mine, "inference", threads=2):  # of the images that could be done
    ...
left_out.finish(ids, mine)  # raises Incomplete: exit code 3
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import distributed, parallel
from tools.errors import FileError, Incomplete
from tools.files import check_writable, locked, read_json, save_json

Job = str | Sequence[str]
"""The id of an image, or the ids of images that are processed together."""


@dataclass(frozen=True)
class _Reasons:
    """Takes the place of a result: why each image is left out."""

    by_id: dict[str, str]


class LeftOut:
    """The images that a stage leaves out.

    Args:
        folder: output folder of the stage. It gets the list, left-out-STAGE.json: {id: why}; no file if nothing is.
        stage: name of the script.
        skip: whether to leave images out. If not, their errors stop the stage.
    """

    def __init__(self, folder: Path, stage: str, *, skip: bool) -> None:
        self.path, self.skip = folder / f"left-out-{stage}.json", skip
        self.reasons: dict[str, str] = {}

    def results(self, work: Callable[[Any], Any], jobs: Sequence[Job], name: str, **options: Any) -> Iterator[Any]:
        """`parallel.run_jobs` with these options, without the results of images that are left out."""
        work = functools.partial(_attempt, work) if self.skip else work
        for result in parallel.run_jobs(work, jobs, name=name, **options):
            if isinstance(result, _Reasons):
                self.reasons = {**result.by_id, **self.reasons}  # the first reason may be the cause of later ones
            else:
                yield result

    def finish(self, ids: Sequence[str], mine: Sequence[str]) -> None:
        """Update what the list of all `ids` says of `mine`, this process's share, and wait for the other processes.

        Raises:
            Incomplete: images are left out.
            UserError: the list is there and damaged.
        """
        with locked(check_writable(self.path.parent)):
            others = set(ids) - set(mine)
            remedy = "Delete it, and run the same command again."
            before = read_json(self.path, remedy) if self.path.exists() else {}
            if listed := {i: why for i, why in before.items() if i in others} | self.reasons:
                save_json(self.path, listed)
            else:
                self.path.unlink(missing_ok=True)
        distributed.wait_for_shares()  # torchrun ends all when the first one ends with an error
        if self.reasons:
            raise Incomplete(
                f"{len(self.reasons)} of {len(mine)} images are left out: {self.path} says which and why. "
                "Correct or replace their files, and run the same command again."
            )


def _attempt(work: Callable[[Any], Any], job: Job) -> Any:
    """work(job); if that fails for a job of several images, each image alone."""
    try:
        return work(job)
    except FileError as error:
        if isinstance(job, str) or len(job) == 1:
            return _Reasons({job if isinstance(job, str) else job[0]: str(error)})
    alone = [_attempt(work, [image_id]) for image_id in job]
    return _Reasons({i: why for each in alone if isinstance(each, _Reasons) for i, why in each.by_id.items()})
