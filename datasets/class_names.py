"""Names of classes: how they are compared, and which lists of them are refused."""

from collections.abc import Sequence
from pathlib import Path

from datasets.listing import visible
from tools.errors import UserError

BACKGROUND = "background"


def clean_name(name: str) -> str:
    """A class name as it is compared: Unicode's NFC, without invisible characters, single blanks."""
    return " ".join(visible(name).split())


def is_background(name: str) -> bool:
    """Whether a class name means the background: background, Background, _background_ (labelme's)."""
    return name.strip("_ ").casefold() == BACKGROUND


def check_classes(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The class names in `path`, checked: background first, then at most 254 others, as masks are uint8.

    Raises:
        UserError: the first name is not background; there is no foreground class, or too many; two names differ by case
            at most; or a name stands for ignored pixels, holds ';', or is a comment.
    """
    classes = [clean_name(name) for name in names]
    ignored = [name for name in classes if name.startswith("_") and name.strip("_").casefold() == "ignore"]
    if ignored:
        raise UserError(f"{path}: '{ignored[0]}' is no class: ignored pixels are 255 in masks. Remove it.")
    if classes and not is_background(classes[0]):
        raise UserError(
            f"{path}: must begin with '{BACKGROUND}' (it begins with '{classes[0]}'), as the value of a class "
            f"in masks is its line, counted from 0. Make '{BACKGROUND}' the first line."
        )
    classes[:1] = [BACKGROUND] if classes else []
    seen: dict[str, str] = {}
    for name in classes:
        key = BACKGROUND if is_background(name) else name.casefold()
        if key in seen:
            told = "is listed twice" if seen[key] == name else f"is too much like '{seen[key]}'"
            raise UserError(f"{path}: class '{name}' {told}. Remove or rename one.")
        seen[key] = name
        if name.startswith("#"):
            raise UserError(f"{path}: class '{name}' looks like a comment. Remove it: every line is a class.")
        if ";" in name:
            raise UserError(f"{path}: class '{name}' holds ';', which separates the classes of an image. Rename it.")
    if not 2 <= len(classes) <= 255:
        raise UserError(f"{path}: {len(classes)} classes. List 'background' and 1 to 254 foreground classes.")
    return tuple(classes)
