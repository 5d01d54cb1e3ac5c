"""The report page: one HTML file with everything in it, which opens from disk without a network.

    text = render(Page(title="birds", stages=scores, runs=[run], commands=commands, cards=cards, palette=palette, ...))

`page.html` is its Jinja template: style sheet, layout, and the script for keys and sorting. The pictures are data URIs:
a photograph once, as JPEG, and over it one small indexed PNG per mask, transparent where the background is.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from tools.charts import Points, line_chart
from tools.files import mask_image
from tools.history import SHARES, SIGNALS, Command, Run
from tools.options import IGNORE_INDEX

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 320  # pixels: the longer side of a photograph on the page
HEAT_SIDE = 96  # of a heat map, which is smooth
PHOTOGRAPH = "Photograph"


@dataclass(frozen=True)
class Layer:
    """One mask or heat map of an image: its data URI, what it shows in words, its IoU in [0, 1] if that is known."""

    source: str
    text: str
    iou: float | None = None


@dataclass(frozen=True)
class Card:
    """One image of the gallery."""

    image_id: str  # its id
    domain: str  # the split it is from
    labels: tuple[str, ...]  # names of its classes
    size: tuple[int, int]  # (height, width) of its picture on the page
    photograph: str  # data URI
    layers: dict[str, Layer]  # title -> layer; not all images have all
    shown: frozenset[int]  # indices of the foreground classes in its masks
    doubt: float  # score of `tools.review`


@dataclass(frozen=True)
class Page:
    """What the page shows; what is empty is left out."""

    title: str  # name of the experiment
    made: str  # date and time
    stages: Mapping[str, dict] = field(default_factory=dict)  # name -> content of its `evaluate.py --output` file
    runs: Sequence[Run] = ()  # the trainings
    commands: Sequence[Command] = ()  # what the runners did
    cards: Sequence[Card] = ()  # images, in the page's order
    classes: Sequence[str] = ()  # names, background first
    palette: np.ndarray | None = None  # uint8 [256, 3]
    order: str = ""  # what the order of the cards is by, in words
    total: int = 0  # images there are; the cards may be fewer
    reviewed: str = ""  # title of the masks that the order is about


# -- pictures ---------------------------------------------------------------------------------------------------------
def photograph_uri(image: np.ndarray) -> tuple[str, tuple[int, int]]:
    """A photograph uint8 RGB [H, W, 3] as JPEG, and its (height, width) on the page."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _uri(picture, "jpeg", quality=72, optimize=True), (picture.height, picture.width)


def mask_uri(mask: np.ndarray, size: tuple[int, int], palette: np.ndarray) -> str:
    """A mask uint8 [H, W] at `size`, as an indexed PNG: background transparent, ignored pixels white."""
    small = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    values, indices = np.unique(np.asarray(small), return_inverse=True)
    colours = palette.copy()
    colours[IGNORE_INDEX] = 255
    picture = mask_image(indices.reshape(size), colours[values])
    opacity = bytes(0 if value == 0 else 255 for value in values)
    return _uri(picture, "png", transparency=opacity, optimize=True)


def heat_uri(cams: np.ndarray) -> str:
    """The strongest of the CAMs float [n, H, W] in [0, 1], dark violet to yellow, as JPEG; n may be 0."""
    strongest = cams.astype(np.float32).max(axis=0, initial=0)
    scale = HEAT_SIDE / max(strongest.shape)
    size = [max(1, round(side * scale)) for side in strongest.shape[::-1]]
    grey = (255 * cv2.resize(strongest, size, interpolation=cv2.INTER_AREA)).round().clip(0, 255).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return _uri(Image.fromarray(colours), "jpeg", quality=70)


def _uri(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def shares_text(mask: np.ndarray, classes: Sequence[str]) -> str:
    """What a mask shows, in words: `cat 12 %, dog 3 %`, or `background only`."""
    values, counts = np.unique(mask[mask > 0], return_counts=True)
    named = {value: "undecided" if value >= len(classes) else classes[value] for value in values.tolist()}
    numbers = ("<1" if share < 0.005 else f"{100 * share:.0f}" for share in counts / mask.size)
    shares = [f"{name} {number} %" for name, number in zip(named.values(), numbers, strict=True)]
    return ", ".join(shares) or "background only"


# -- the page ---------------------------------------------------------------------------------------------------------
def render(page: Page) -> str:
    """The whole file. Names and texts are escaped; only charts are HTML already."""
    titles = list(dict.fromkeys([PHOTOGRAPH, *(title for card in page.cards for title in card.layers)]))
    ious = {
        name: {cls: None if cls in score.get("absent", ()) else value for cls, value in score["iou"].items()}
        for name, score in page.stages.items()
        if score.get("iou")
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": _duration, "plain": lambda v: v if isinstance(v, str) else json.dumps(v)}
    environment.filters |= {"loss_charts": _loss_charts, "health_charts": _health_charts, "decisions": _decisions}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        page=page,
        titles=titles,
        start=max(1, titles.index(page.reviewed)) if page.reviewed in titles else 0,
        ious=ious,
        absent=any(score.get("absent") for score in page.stages.values()),
        classes=list(dict.fromkeys(name for values in ious.values() for name in values)),
        thresholds=_threshold_chart(page.stages),
        shown=sorted(frozenset().union(*(card.shown for card in page.cards))),
        scored=any(layer.iou is not None for card in page.cards for layer in card.layers.values()),
    )


def _threshold_chart(stages: Mapping[str, dict]) -> Markup:
    curves = {
        name: [(point["threshold"], point["miou"]) for point in score["curve"]]
        for name, score in stages.items()
        if len(score.get("curve", [])) > 1
    }
    return Markup(line_chart(curves, x="background threshold", y="mIoU, %", peak=True))


def _loss_charts(run: Run) -> Markup:
    """The losses of a training together, and a chart for each group of other scalars (`group/name`)."""
    groups: dict[str, dict[str, Points]] = {}
    for name, points in run.curves.items():
        group, slash, rest = name.partition("/")
        groups.setdefault(group if slash else "loss", {})[rest if slash else name] = points
    groups.pop("health", None)  # each of these has its own unit, and so its own chart
    return Markup("".join(line_chart(curves, x="epoch", y=group) for group, curves in groups.items()))


def _health_charts(run: Run) -> Markup:
    """A chart for each signal of `tools.health`, over the epochs in which it was measured."""
    series = {name: [(e, v) for e, v in enumerate(run.health.get(name, ()), 1) if v is not None] for name in SIGNALS}
    charts = (line_chart({name: s}, x="epoch", y=name + ", %" * (name in SHARES)) for name, s in series.items())
    return Markup("".join(charts))


def _decisions(run: Run) -> dict[str, object]:
    """What was decided by the signals."""
    return {name: value for name, value in run.health.items() if name not in SIGNALS}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{value} {unit}" for value, unit in parts if value]
    return " ".join(shown[:2]) or "0 s"
