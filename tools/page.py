"""The report page: one HTML file with everything in it, which opens from disk without a network.

    text = render(Page(title="birds", stages=scores, runs=[run], commands=commands, cards=cards, palette=palette, ...))

`page.html` beside this file is its template: style sheet, layout, and the script for keys and sorting. The pictures are
data URIs: a photograph once, as JPEG, and over it one small indexed PNG per mask, transparent where the background is.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

import cv2
import numpy as np
from PIL import Image

from tools.charts import Points, line_chart
from tools.health import SIGNALS
from tools.history import Command, Run

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
    """One image of the gallery.

    Attributes:
        image_id: its id.
        domain: the split it is from.
        labels: names of its classes.
        size: (height, width) of its picture on the page.
        photograph: data URI.
        layers: title -> layer; not all images have all.
        shown: indices of the foreground classes in its masks.
        doubt: score of `tools.review`.
    """

    image_id: str
    domain: str
    labels: tuple[str, ...]
    size: tuple[int, int]
    photograph: str
    layers: dict[str, Layer]
    shown: frozenset[int]
    doubt: float


@dataclass(frozen=True)
class Page:
    """What the page shows; what is empty is left out.

    Attributes:
        title: name of the experiment.
        made: date and time.
        stages: name -> content of its `evaluate.py --output` file.
        runs: the trainings.
        commands: what the runners did.
        cards: images, in the page's order.
        classes, palette: of the cards: names, background first, and uint8 [256, 3].
        order: what the order of the cards is by, in words.
        total: images there are; the cards may be fewer.
        reviewed: title of the masks that the order is about.
    """

    title: str
    made: str
    stages: Mapping[str, dict] = field(default_factory=dict)
    runs: Sequence[Run] = ()
    commands: Sequence[Command] = ()
    cards: Sequence[Card] = ()
    classes: Sequence[str] = ()
    palette: np.ndarray | None = None
    order: str = ""
    total: int = 0
    reviewed: str = ""


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
    colours[255] = 255
    picture = Image.fromarray(indices.reshape(size).astype(np.uint8), mode="P")
    picture.putpalette(colours[values].astype(np.uint8).tobytes())
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
    shares = [f"{name} {100 * n / mask.size:.0f} %" for name, n in zip(named.values(), counts, strict=True)]
    return ", ".join(shares) or "background only"


# -- the page ---------------------------------------------------------------------------------------------------------
def render(page: Page) -> str:
    """The whole file."""
    titles = list(dict.fromkeys([PHOTOGRAPH, *(title for card in page.cards for title in card.layers)]))
    sections = {
        "title": escape(page.title),
        "made": escape(page.made),
        "stages": _stages(page.stages),
        "classes": _class_table(page.stages),
        "thresholds": _thresholds(page.stages),
        "runs": "".join(map(_run, page.runs)),
        "commands": _commands(page.commands),
        "gallery": _gallery(page, titles) if page.cards else "",
        "views": _view_rules(titles),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(sections)


def _section(name: str, heading: str, content: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>{content}</section>' if content else ""


def _table(header: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="table">{table}</div>'


def _bar(value: float | None) -> str:
    """A cell with a number in per cent and a bar of that length."""
    if value is None:
        return "<td>–</td>"
    return f'<td class="bar" style="--value:{min(max(value, 0), 100):.1f}%">{value:.1f}</td>'


def _stages(stages: Mapping[str, dict]) -> str:
    rows = []
    for name, score in stages.items():
        threshold = "–" if score["threshold"] is None else f"{score['threshold']:.3g}"
        cells = [escape(str(score.get("domain", "–"))), str(score.get("images", "–")), threshold]
        plain = "".join(f"<td>{cell}</td>" for cell in cells)
        bars = _bar(score["miou"]) + _bar(score["miou_foreground"])
        rows.append(f'<th scope="row">{escape(name)}</th>{bars}{plain}')
    header = ["stage", "mIoU, %", "foreground, %", "split", "images", "threshold"]
    return _section("stages", "Stages", _table(header, rows) if rows else "")


def _class_table(stages: Mapping[str, dict]) -> str:
    scored = {name: score["iou"] for name, score in stages.items() if score.get("iou")}
    classes = dict.fromkeys(name for ious in scored.values() for name in ious)
    rows = [
        f'<th scope="row">{escape(name)}</th>' + "".join(_bar(ious.get(name)) for ious in scored.values())
        for name in classes
    ]
    return _section("classes", "IoU of each class, %", _table(["class", *scored], rows) if scored else "")


def _thresholds(stages: Mapping[str, dict]) -> str:
    curves = {
        name: [(point["threshold"], point["miou"]) for point in score["curve"]]
        for name, score in stages.items()
        if len(score.get("curve", [])) > 1
    }
    chart = line_chart(curves, x="background threshold", y="mIoU, %", peak=True)
    return _section("thresholds", "Background threshold of the CAMs", chart)


def _run(run: Run) -> str:
    """Curves of one training: its losses together, and one chart for each group of other scalars (`group/name`)."""
    groups: dict[str, dict[str, Points]] = {}
    for name, points in run.curves.items():
        group, slash, rest = name.partition("/")
        if group == "health":  # each has its own unit, and so its own chart below
            continue
        groups.setdefault(group if slash else "loss", {})[rest if slash else name] = points
    charts = "".join(line_chart(curves, x="epoch", y=group) for group, curves in groups.items())
    parts = [f'<div class="charts">{charts}</div>' if charts else ""]
    if run.health is not None:
        parts.append(f"<h3>Health of the run</h3>{_health(run.health)}")
    if run.settings:
        parts.append(f"<details><summary>Settings</summary>{_pairs(run.settings)}</details>")
    took = f" <small>{_duration(run.seconds)}</small>" if run.seconds else ""
    return _section(f"run-{escape(run.tag)}", f"Training of {escape(run.tag)}{took}", "".join(parts))


def _health(health: Mapping[str, object]) -> str:
    """The signals of `tools.health`, each over the epochs in which it was measured, and what was decided by them."""
    series = {name: health[name] for name in SIGNALS if name in health}
    charts = "".join(
        line_chart({name: [(epoch, v) for epoch, v in enumerate(values, 1) if v is not None]}, x="epoch", y=name)
        for name, values in series.items()
    )
    return f'<div class="charts">{charts}</div>' + _pairs({k: v for k, v in health.items() if k not in series})


def _pairs(values: Mapping[str, object]) -> str:
    rows = [
        f'<th scope="row">{escape(str(name))}</th><td>{escape(_plain(value))}</td>' for name, value in values.items()
    ]
    return _table(["name", "value"], rows, ' class="pairs"')


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _commands(commands: Sequence[Command]) -> str:
    rows = [
        f"<td>{escape(c.start)}</td><td>{_duration(c.seconds)}</td><td>{c.code or 'done'}</td>"
        f"<td><code>{escape(c.text)}</code></td>"
        for c in commands
    ]
    total = f"<p>Together {_duration(sum(c.seconds for c in commands))}.</p>"
    content = total + _table(["started", "took", "exit", "command"], rows, ' class="commands"')
    return _section("commands", "Commands and time", content if rows else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{value} {unit}" for value, unit in parts if value]
    return " ".join(shown[:2]) or "0 s"


# -- the gallery ------------------------------------------------------------------------------------------------------
def _view_rules(titles: Sequence[str]) -> str:
    """The style rules that show the layer chosen by the radio buttons, so that it works without the script too."""
    return "\n".join(f"body:has(#view-{n}:checked) .view-{n} {{ display: block; }}" for n in range(1, len(titles)))


def _gallery(page: Page, titles: Sequence[str]) -> str:
    start = max(1, titles.index(page.reviewed)) if page.reviewed in titles else 0
    buttons = "".join(
        f'<input type="radio" name="view" id="view-{n}"{" checked" if n == start else ""}>'
        f'<label for="view-{n}"><kbd>{n + 1}</kbd>{escape(title)}</label>'
        for n, title in enumerate(titles)
    )
    colours = [",".join(map(str, colour)) for colour in page.palette.tolist()]
    legend = "".join(
        f'<li><i style="background:rgb({colours[n]})"></i>{escape(page.classes[n])}</li>'
        for n in sorted(frozenset().union(*(card.shown for card in page.cards)))
    )
    scored = any(layer.iou is not None for card in page.cards for layer in card.layers.values())
    orders = [("listed", "as listed"), ("doubt", "doubt")] + ([("iou", "IoU")] if scored else [])
    choices = "".join(f'<option value="{value}">{text}</option>' for value, text in orders)
    cards = "".join(_card(card, titles, page.reviewed) for card in page.cards)
    return Template(GALLERY).substitute(
        buttons=buttons,
        legend=legend,
        choices=choices,
        cards=cards,
        order=escape(page.order),
        shown=len(page.cards),
        total=page.total,
    )


GALLERY = """<section id="gallery"><h2>Images</h2>
<p>$shown of $total images, $order. Keys: <kbd>1</kbd>–<kbd>9</kbd> or <kbd>←</kbd> <kbd>→</kbd> change the view,
<kbd>Enter</kbd> enlarges a picture, <kbd>↑</kbd> <kbd>↓</kbd> go to the next one, <kbd>Esc</kbd> closes it.</p>
<div class="tools"><label>Opacity <input type="range" id="opacity" min="0" max="100" value="65"></label>
<label>Order <select id="order">$choices</select></label>
<ul class="classes">$legend</ul></div>
<fieldset><legend>View</legend>$buttons</fieldset>
<div id="cards">$cards</div></section>"""


def _card(card: Card, titles: Sequence[str], reviewed: str) -> str:
    name = escape(card.image_id)
    layers, notes = "", ""
    for number, title in enumerate(titles[1:], start=1):
        layer = card.layers.get(title)
        if layer is None:
            notes += f'<span class="view-{number}">{escape(title)}: none</span>'
            continue
        alt = escape(f"{title} of {card.image_id}: {layer.text}")
        layers += f'<img class="layer view-{number}" src="{layer.source}" alt="{alt}">'
        iou = "" if layer.iou is None else f"IoU {100 * layer.iou:.0f} %, "
        notes += f'<span class="view-{number}">{escape(title)}: {iou}{escape(layer.text)}</span>'.replace(
            " %", "&nbsp;%"
        )
    chosen = card.layers.get(reviewed)
    iou = "" if chosen is None or chosen.iou is None else f"{chosen.iou:.4f}"
    labels = escape(", ".join(card.labels) or "no class")
    height, width = card.size
    shape = f"aspect-ratio:{width}/{height};width:{min(100, 75 * width / height):.1f}%"  # none higher than 4:3
    return (
        f'<figure class="card" data-doubt="{card.doubt:.4f}" data-iou="{iou}">'
        f'<button type="button" class="picture" style="{shape}" aria-label="Enlarge {name}">'
        f'<img src="{card.photograph}" alt="Photograph {name}: {labels}" width="{width}" height="{height}">'
        f"{layers}</button>"
        f"<figcaption><b>{name}</b> {labels}<br>"
        f"doubt {card.doubt:.2f}, {escape(card.domain)}{notes}</figcaption></figure>"
    )
