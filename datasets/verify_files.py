"""Files of a dataset that belong to nothing, and ids that are in two lists. `verify` reports them.

    for kind, text in leftovers(source, {"train": ["a", "b"], "val": ["b"]}, published=False):
        ...                                   "overlap", "1 of 1 ids of val are in train too, the first is 'b'"

Only the lists and the table of labels are read here.
"""

import itertools
from collections.abc import Iterator, Sequence

from datasets.base import DataSource
from datasets.listing import mask_of

PARTS = ("train", "val", "test")  # lists with one of these in both names may overlap: train, trainval, train_aug


def leftovers(source: DataSource, lists: dict[str, Sequence[str]], *, published: bool) -> Iterator[tuple[str, str]]:
    """Kind and text of every finding; `lists` are ids by domain (UserError: the table of labels cannot be read).

    Photographs of a `published` dataset may be in no list.
    """
    images = source.images.files
    for image_id in source.labelled_ids():
        if image_id not in images:
            yield "rows", f"row '{image_id}' belongs to no photograph{source.images.advice(image_id)}"
    for path in source.images.others:
        yield "unread", f"{path}: a kind that is not read ({path.suffix or 'no suffix'}). Convert photographs to JPEG"
    strays = dict(source.stray_masks())
    yield from (("stray", text) for text in strays.values())
    if strays and not any(map(source.has_mask, images)):
        first = next(iter(strays))
        text = f"holds {len(strays)} files, none is ID.png of a photograph, such as {first.name}. Rename them"
        yield "mask", f"{first.parent}: {text}"
    for image_id in sorted(images):
        if (named := mask_of(image_id)) in images:
            where = source.image_path(image_id)
            yield "disguised", f"{where}: looks like the mask of {named}. Move it to masks/ (ID.png) or rename it"
    if not published:
        listed = {*itertools.chain.from_iterable(lists.values())}
        yield from (("unlisted", f"{source.image_path(i)}: in no list") for i in images if i not in listed)
    yield from overlaps(lists)


def overlaps(lists: dict[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Every two lists that share ids although their names do not say so (as train and trainval do)."""
    for pair in itertools.combinations(lists, 2):
        if any(part in pair[0] and part in pair[1] for part in (*PARTS, *pair)):
            continue
        small, large = sorted(pair, key=lambda name: (len(lists[name]), name.startswith("train")))
        others = set(lists[large])
        shared = [image_id for image_id in lists[small] if image_id in others]
        if shared:
            total = len(lists[small])
            yield "overlap", f"{len(shared)} of {total} ids of {small} are in {large} too, the first is '{shared[0]}'"
