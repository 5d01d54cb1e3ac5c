"""A synthetic, photo-like data set in the PASCAL VOC layout, for the demo and for tests that need pixels to learn from.

    python -m datasets.prepare.shapes --data_dir data/shapes --num_train 800 --num_val 200

    from datasets.prepare.shapes import generate
    generate("data/shapes", num_train=800, num_val=200, size=128, seed=0)

The set has what makes weak supervision hard on photographs. Objects have a discriminative part (sail, wheels, head,
roof) and a plain part (hull, body, fleece, wall) of varying colour: class activation maps cover the first and miss much
of the second. Classes go with scenes (boats on water), so activations leak into the context. Objects overlap, stand
behind grass or poles, and leave the frame. Their outlines are colour edges, which a dense CRF can follow.

Image `i` of a split depends on (seed, split, i) and the size only: not on the number of workers, nor of images.
"""

import argparse
import functools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np

from datasets.base import voc_palette
from datasets.prepare.shapes_motifs import KINDS, SCENES, occlude
from datasets.prepare.shapes_painting import Brush, Canvas, ellipse
from datasets.voc12 import SHAPES_CLASSES
from tools import cli
from tools.errors import UserError
from tools.files import check_writable, save_json, save_mask
from tools.options import IGNORE_INDEX
from tools.parallel import run_jobs

MARKER = "generator.json"  # parameters of a complete set, the last file written
VERSION = 5  # raised whenever the same seed no longer gives the same bytes

NUM_TRAIN, NUM_VAL, SIZE = 800, 200, 128  # defaults: what the demo learns from in two or three minutes on two cores


# What goes into a picture. Probabilities are per image; lengths are fractions of its longer side.
HOME_SCENE = 0.8  # the first object stands in a scene of its class: a context that helps, but can mislead
FIRST_HOME = 0.5  # given that: in its own scene, not in one it shares with other classes
SECOND_CLASS = 0.36  # an object of another class: image labels alone no longer say which pixels are whose
SAME_CLASS = 0.22  # a second object of the first class
THIRD_OBJECT = 0.3  # given two
OVERLAP = 0.3  # given two: objects may hide each other
OCCLUDER = 0.4  # something of the scene stands in front
SCALE_SINGLE = (0.29, 0.47)  # half the length of an object: 8-35 % of the image's area
SCALE_SEVERAL = (0.21, 0.34)
MIN_VISIBLE = 0.012  # of the image's area: objects with less are neither listed nor evaluated
SHORT_SIDE = 0.84  # images are up to this much narrower or lower than `size`, so odd sizes occur
SUPERSAMPLING = 2  # drawn larger, then averaged: clean edges, and masks that agree with them


# ----------------------------------------------------------------------------------------------------- composition


@dataclass(frozen=True)
class Placement:
    """An object of a composition: what, where and how large (fractions of the image's size; angle in radians)."""

    name: str
    x: float
    y: float
    scale: float
    angle: float
    flip: bool

    @property
    def lower_end(self) -> float:
        return self.y + KINDS[self.name].lower_end * self.scale

    def matrix(self, pixels: float) -> np.ndarray:
        """Local coordinates -> a picture with `pixels` per unit length: f32 2x3."""
        cosine, sine = np.cos(self.angle) * self.scale * pixels, np.sin(self.angle) * self.scale * pixels
        mirror = -1.0 if self.flip else 1.0
        return np.float32([[mirror * cosine, -sine, self.x * pixels], [mirror * sine, cosine, self.y * pixels]])


@dataclass(frozen=True)
class Sample:
    """One picture with its annotation."""

    image: np.ndarray  # uint8 RGB HxWx3
    mask: np.ndarray  # uint8 HxW; 0 background, 1..6 classes, 255 along outlines and on objects too hidden to count
    # class name and box (xmin, ymin, xmax, ymax; pixels from 1, both ends included, as VOC counts)
    objects: tuple[tuple[str, tuple[int, int, int, int]], ...]


def draw(rng: np.random.Generator, size: int) -> Sample:
    """Draw a picture whose longer side is `size` pixels; at least one object shows."""
    while True:  # a picture in which everything came to lie hidden is drawn again: about one in a thousand
        sample = _draw_once(rng, size)
        if sample.objects:
            return sample


def _draw_once(rng: np.random.Generator, size: int) -> Sample:
    short = round(size * rng.uniform(SHORT_SIDE, 1))
    height, width = (short, size) if rng.random() < 0.6 else (size, short)
    factor = SUPERSAMPLING
    w, h, pixels = width / size, height / size, size * factor
    canvas = Canvas(np.zeros((height * factor, width * factor, 3), np.float32), rng)
    scenery = Brush(canvas, np.float32([[pixels, 0, 0], [0, pixels, 0]]))
    names, scene = _choose_contents(rng)
    horizon = SCENES[scene](scenery, rng, w, h)
    placements = _place(rng, names, w, h, horizon)
    canvas.visible = [np.zeros(canvas.picture.shape[:2], np.float32) for _ in placements]
    for index, placement in enumerate(placements):
        if not KINDS[placement.name].floats:
            _cast_shadow(scenery, placement)
        KINDS[placement.name].draw(Brush(canvas, placement.matrix(pixels), index), rng)
    if rng.random() < OCCLUDER:
        hidden = placements[int(rng.integers(len(placements)))]
        occlude(scenery, rng, scene, hidden.x + rng.uniform(-0.7, 0.7) * hidden.scale, hidden.lower_end)
    mask, objects = _annotate(canvas.visible, [placement.name for placement in placements], (width, height))
    return Sample(_photograph(canvas.picture, (width, height), rng), mask, objects)


def _choose_contents(rng: np.random.Generator) -> tuple[list[str], str]:
    """Classes of one to three objects, the one that decides the scene first; and the scene."""
    first = str(rng.choice(SHAPES_CLASSES[1:]))
    names = [first]
    chance = rng.random()
    if chance < SECOND_CLASS:
        names.append(str(rng.choice(KINDS[first].companions)))
    elif chance < SECOND_CLASS + SAME_CLASS:
        names.append(first)
    if len(names) == 2 and rng.random() < THIRD_OBJECT:
        names.append(str(rng.choice(names)))
    return names, _choose_scene(rng, KINDS[first].homes)


def _choose_scene(rng: np.random.Generator, homes: tuple[str, ...]) -> str:
    if rng.random() > HOME_SCENE:
        return str(rng.choice(list(SCENES)))
    return homes[0] if rng.random() < FIRST_HOME else str(rng.choice(homes[1:]))


def _place(rng: np.random.Generator, names: list[str], w: float, h: float, horizon: float) -> list[Placement]:
    """Positions and sizes, farthest first (what stands lower in the picture is nearer, and drawn later)."""
    low, high = SCALE_SINGLE if len(names) == 1 else SCALE_SEVERAL
    distance = rng.uniform(0.9, 1.2) if rng.random() < OVERLAP else 1.75
    placements: list[Placement] = []
    for name in names:
        tries = [_propose(rng, name, rng.uniform(low, high), w, h, horizon) for _ in range(12)]
        placements.append(max(tries, key=lambda p: min(_gap(p, placements, distance), 0)))
    return sorted(placements, key=lambda p: p.lower_end)


def _propose(rng: np.random.Generator, name: str, scale: float, w: float, h: float, horizon: float) -> Placement:
    """A random placement: anywhere for what flies or swims, else standing between the horizon and the lower edge."""
    kind = KINDS[name]
    margin = 0.75 * scale  # objects leave the frame a little
    x = rng.uniform(min(margin, w / 2), max(w - margin, w / 2))
    if kind.floats:
        y = rng.uniform(min(margin, h / 2), max(h - margin, h / 2))
    else:
        standing = rng.uniform(max(horizon + 0.08, 1.5 * scale), h + 0.04)
        y = min(standing, h + 0.04) - kind.lower_end * scale
    return Placement(name, x, y, scale, rng.normal(0, kind.tilt), bool(rng.random() < 0.5))


def _gap(placement: Placement, others: list[Placement], distance: float) -> float:
    """How much farther than `distance` (in mean half lengths) the nearest other object is; negative if it is nearer."""
    gaps = [
        np.hypot(placement.x - other.x, placement.y - other.y) / (placement.scale + other.scale) * 2 - distance
        for other in others
    ]
    return float(min(gaps, default=0.0))


def _cast_shadow(scenery: Brush, placement: Placement) -> None:
    for grow, opacity in ((1.1, 0.16), (0.95, 0.18), (0.75, 0.18)):
        shadow = ellipse(placement.x, placement.lower_end, placement.scale * grow, placement.scale * grow * 0.14)
        scenery.fill(shadow, np.float32([0.06, 0.07, 0.1]), opacity=opacity, grain=0)


def _annotate(visible: list[np.ndarray], names: list[str], size: tuple[int, int]) -> tuple[np.ndarray, tuple]:
    """`Sample.mask` and `Sample.objects` from what shows of each object on the supersampled canvas."""
    shares = np.stack([cv2.resize(share, size, interpolation=cv2.INTER_AREA) for share in visible])
    owner = np.concatenate([1 - shares.sum(0, keepdims=True), shares]).argmax(0).astype(np.uint8)
    mask, objects = np.zeros_like(owner), []
    for index, name in enumerate(names, start=1):
        rows, columns = np.nonzero(owner == index)
        listed = rows.size >= MIN_VISIBLE * owner.size
        mask[rows, columns] = SHAPES_CLASSES.index(name) if listed else IGNORE_INDEX
        if listed:
            box = (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
            objects.append((name, tuple(int(end) for end in box)))
    neighbours = np.ones((3, 3), np.uint8)
    mask[cv2.dilate(owner, neighbours) != cv2.erode(owner, neighbours)] = IGNORE_INDEX
    return mask, tuple(objects)


def _photograph(picture: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Light, lens and sensor: f32 supersampled RGB -> uint8 RGB of `size` (width, height)."""
    height, width = picture.shape[:2]
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.25)
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = 1 + np.float32(strength) * (np.float32(np.cos(direction)) * x + np.float32(np.sin(direction)) * y)
    white_balance = np.float32(rng.normal(1, 0.035, 3) * rng.uniform(0.85, 1.12))
    picture = cv2.GaussianBlur(picture * light[..., None] * white_balance, (0, 0), rng.uniform(0.5, 1.3))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0.008, 0.03))
    exposed = np.clip(picture + noise, 0, 1) ** np.float32(rng.uniform(0.85, 1.2))
    return np.round(exposed * 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- files


def generate(
    root: str | os.PathLike,
    *,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    size: int = SIZE,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Make the set in folder `root`, in the layout of the VOC devkit, unless it is there already.

    A set appears whole or not at all: it is made in a folder beside `root` that is then renamed.

    Args:
        root: a folder that is missing, empty, or holds a set of the same parameters.
        size: longer side of the images, pixels.
        seed: same seed, same bytes.
        workers: processes, 0: this one only; by default one per core.

    Raises:
        UserError: a number is out of range, or `root` holds something else, or cannot be written.
    """
    root = Path(root)
    parameters = {"version": VERSION, "num_train": num_train, "num_val": num_val, "size": size, "seed": seed}
    _check(parameters)
    if _is_complete(root, parameters):
        return root
    check_writable(root.parent)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as partial:
        _write_set(Path(partial), parameters, os.cpu_count() or 1 if workers is None else workers)
        _publish(Path(partial), root, parameters)
    return root


def _check(parameters: dict[str, int]) -> None:
    for name, least, most in (("num_train", 1, 10**5), ("num_val", 1, 10**5), ("size", 48, 1024), ("seed", 0, 2**63)):
        if not least <= parameters[name] <= most:
            raise UserError(f"--{name} {parameters[name]}: out of range. Use {least} to {most}.")


def _is_complete(root: Path, parameters: dict[str, int]) -> bool:
    """Whether `root` holds the set. False if there is nothing at all."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{root}: holds something else than a generated set. Choose a new folder.") from error
    if found != parameters:
        wanted = ", ".join(f"{name} {value}" for name, value in parameters.items())
        raise UserError(f"{root}: made with other parameters than {wanted}. Choose another folder or delete this one.")
    return True


def _publish(partial: Path, root: Path, parameters: dict[str, int]) -> None:
    """Give the finished set its name, unless another process was faster."""
    partial.chmod(0o755)
    try:
        os.replace(partial, root)
    except OSError as error:
        if not _is_complete(root, parameters):
            raise UserError(f"{root}: could not be made ({error.strerror}). Choose another folder.") from error


def _write_set(root: Path, parameters: dict[str, int], workers: int) -> None:
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    jobs = []
    for number, split in enumerate(("train", "val")):
        ids = [f"{split}_{index:05d}" for index in range(parameters[f"num_{split}"])]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
        jobs += [(image_id, (parameters["seed"], number, index)) for index, image_id in enumerate(ids)]
    write = functools.partial(_write_sample, root, parameters["size"])
    for _ in run_jobs(write, jobs, workers, "shapes", "image"):
        pass
    save_json(root / MARKER, parameters)


def _write_sample(root: Path, size: int, job: tuple[str, tuple[int, int, int]]) -> None:
    image_id, entropy = job
    rng = np.random.default_rng(entropy)
    sample = draw(rng, size)
    quality = int(rng.integers(70, 96))
    jpeg = cv2.imencode(".jpg", sample.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    (root / "JPEGImages" / f"{image_id}.jpg").write_bytes(jpeg.tobytes())
    save_mask(root / "SegmentationClass" / f"{image_id}.png", sample.mask, voc_palette())
    (root / "Annotations" / f"{image_id}.xml").write_bytes(_annotation(image_id, sample))


def _annotation(image_id: str, sample: Sample) -> bytes:
    """The VOC annotation file."""
    height, width = sample.mask.shape
    tree = ElementTree.Element("annotation")
    ElementTree.SubElement(tree, "filename").text = f"{image_id}.jpg"
    _add_fields(ElementTree.SubElement(tree, "size"), width=width, height=height, depth=3)
    ElementTree.SubElement(tree, "segmented").text = "1"
    for name, (xmin, ymin, xmax, ymax) in sample.objects:
        truncated = int(xmin == 1 or ymin == 1 or xmax == width or ymax == height)
        item = ElementTree.SubElement(tree, "object")
        _add_fields(item, name=name, truncated=truncated, difficult=0)
        _add_fields(ElementTree.SubElement(item, "bndbox"), xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax)
    ElementTree.indent(tree)
    return ElementTree.tostring(tree, encoding="utf-8")


def _add_fields(parent: ElementTree.Element, **fields: object) -> None:
    for name, value in fields.items():
        ElementTree.SubElement(parent, name).text = str(value)


def make_parser() -> cli.Parser:
    """The command line of this module."""
    parser = cli.Parser(__doc__)
    add, processes = parser.add_argument, {"dest": "workers", "type": cli.count, "default": os.cpu_count() or 1}
    add("--data_dir", type=Path, required=True, help="folder to make")
    add("--num_train", type=int, default=NUM_TRAIN, help="training images")
    add("--num_val", type=int, default=NUM_VAL, help="validation images")
    add("--size", type=int, default=SIZE, help="longer side of the images, pixels")
    add("--seed", type=int, default=0, help="same seed, same bytes")
    add("--num_workers", "--workers", **processes, help="helper processes; 0: none")
    return parser


def main(args: argparse.Namespace) -> None:
    """Generate the set."""
    numbers = {name: getattr(args, name) for name in ("num_train", "num_val", "size", "seed", "workers")}
    print(f"{generate(args.data_dir, **numbers)}: {args.num_train} training and {args.num_val} validation images.")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
