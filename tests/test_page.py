"""The report page: its pictures, decoded again; its tables; and the page in a browser, if there is one."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
from PIL import Image

from datasets.base import voc_palette
from tools.charts import line_chart
from tools.history import Command, Run
from tools.page import SIDE, Card, Layer, Page, heat_uri, mask_uri, photograph_uri, render, shares_text

CLASSES = ["background", "cat", "dog & co"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def decode(uri):
    kind, data = re.fullmatch(r"data:image/(jpeg|png);base64,(.+)", uri).groups()
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.format == kind.upper()
    return picture


def score(miou, **more):
    iou = dict(zip(CLASSES, (90.0, miou, 0.0), strict=True))
    return {"miou": miou, "miou_foreground": miou / 2, "threshold": None, "iou": iou, "curve": []} | more


def card(image_id, *, doubt, iou, noise=False):
    generator = np.random.default_rng(len(image_id))
    image = generator.integers(0, 256, (240, 320, 3), dtype=np.uint8) if noise else np.full((24, 32, 3), 99, np.uint8)
    photograph, size = photograph_uri(image)
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[: len(mask) // 2] = 1
    layers = {
        "Ground truth": Layer(mask_uri(mask, size, voc_palette()), shares_text(mask, CLASSES)),
        "CAM": Layer(heat_uri(mask[None] * 0.5), "cat 40 %", 0.3),
        "Refined": Layer(mask_uri(mask, size, voc_palette()), "cat 50 %", iou),
    }
    return Card(image_id, "train", ("cat",), size, photograph, layers, frozenset([1]), doubt)


def page(cards, **more):
    return Page("birds", "today", cards=cards, classes=CLASSES, palette=voc_palette(), total=len(cards),
                order="lowest first", reviewed="Refined", **more)  # fmt: skip


def test_a_photograph_is_reduced_and_keeps_its_shape():
    uri, size = photograph_uri(np.full((300, 1000, 3), [200, 100, 0], np.uint8))
    picture = decode(uri)
    assert size == (96, SIDE) and picture.size == (SIDE, 96)
    assert np.abs(np.asarray(picture).astype(int) - [200, 100, 0]).max() <= 6
    uri, size = photograph_uri(np.zeros((1, 5, 3), np.uint8))
    assert size == (1, 5) and decode(uri).size == (5, 1)


@pytest.mark.parametrize("size", [(4, 6), (8, 12)])
def test_a_mask_has_its_colours_and_a_transparent_background(size):
    mask = np.array([[0, 1, 2], [20, 255, 0]], np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    pixels = np.asarray(decode(mask_uri(mask, size, voc_palette())).convert("RGBA"))
    factor = size[0] // 4
    small = pixels[:: 2 * factor, :: 2 * factor]
    assert small[..., 3].tolist() == [[0, 255, 255], [255, 255, 0]]
    colours = voc_palette()
    assert np.array_equal(small[0, 1:, :3], colours[[1, 2]]) and np.array_equal(small[1, 0, :3], colours[20])
    assert np.array_equal(small[1, 1, :3], [255, 255, 255])
    assert pixels.shape[:2] == size


def test_heat_goes_from_dark_to_bright_with_the_strongest_map():
    cams = np.stack([np.linspace(0, 1, 200)[None].repeat(50, 0), np.zeros((50, 200))])
    light = np.asarray(decode(heat_uri(cams)).convert("L")).astype(int)
    assert light.shape == (24, 96) and light[:, 1].max() < 20 and light[:, -2].min() > 200
    assert (np.diff(light.mean(axis=0)) > -3).all()
    red, _, blue = np.asarray(decode(heat_uri(cams)))[12, 60].astype(int)
    assert red > blue + 50  # orange
    assert heat_uri(np.stack([cams[0], 0.9 * cams[0]])) == heat_uri(cams[:1])
    assert np.asarray(decode(heat_uri(cams[:0]))).max() < 16  # no class, no heat
    assert decode(heat_uri(np.ones((1, 1, 300)))).size == (96, 1)


def test_what_a_mask_shows_in_words():
    mask = np.array([[0, 1, 1, 255]], np.uint8)
    assert shares_text(mask, CLASSES) == "cat 50 %, undecided 25 %"
    assert shares_text(mask[:, :1], CLASSES) == "background only"
    assert shares_text((np.arange(1000) < 4).astype(np.uint8)[None], CLASSES) == "cat <1 %"
    assert shares_text((np.arange(1000) < 20).astype(np.uint8)[None], CLASSES) == "cat 2 %"


def test_the_page_has_all_numbers_and_needs_nothing_from_outside():
    curve = [{"threshold": t, "miou": m} for t, m in ((0.1, 20.0), (0.2, 44.4), (0.3, 30.0))]
    curves = {"loss": [(1, 2.0)], "valid/miou": [(1, 3.0)]}
    text = render(
        page(
            [card("a/<b>", doubt=0.25, iou=0.5)],
            stages={"cam": score(44.4, threshold=0.2, curve=curve), "final": score(61.25, domain="val", images=7)},
            runs=[Run("csrm", curves, 3725.0, {"lr": 0.1}, {"kept": [1.0, 2.0]})],
            commands=[Command("2026-11-26", 61.0, 0, "python a.py --x '<1>'"), Command("2026-11-26", 2.0, 2, "b")],
        )
    )
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(?:<code>)?([^<]*)", text)]
    assert cells[:5] == ["44.4", "22.2", "–", "–", "0.2"] and cells[5:10] == ["61.2", "30.6", "val", "7", "–"]
    assert cells[10:16] == ["90.0", "90.0", "44.4", "61.2", "0.0", "0.0"]
    assert "cam 44.4 at 0.2" in text and "1 h 2 min" in text and "min 5 s" not in text and "dog &amp; co" in text
    assert "python a.py --x '<1>'" in cells and "done" in cells and "2" in cells and "1 min 1 s" in cells
    assert text.count('<figure class="chart">') == 4  # thresholds, loss, valid, kept
    assert "a/&lt;b&gt;" in text and "<b>a/<b>" not in text
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"#][^"]*)"', text))
    assert "http" not in text.replace("http-equiv", "")
    assert not re.findall(r"<img(?![^>]*alt=\"[^\"]+\")", text)


def test_a_class_that_never_occurs_has_no_iou():
    """A 0 would say that the model fails at it."""
    text = render(page([], stages={"cam": score(44.4), "final": score(61.25, absent=[CLASSES[2]])}))
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(?:<code>)?([^<]*)", text)]
    assert cells[10:16] == ["90.0", "90.0", "44.4", "61.2", "0.0", "–"]
    assert "–: neither in the true masks nor in the predicted ones" in text


def test_what_is_empty_is_left_out():
    text = render(Page("empty", "today"))
    assert "<section" not in text and "<title>empty</title>" in text


def test_the_health_of_a_run_has_a_chart_for_each_signal_that_was_measured():
    health = {"class_logit": [1.0, 2.5], "vanished": [None, 25.0], "kept": [None, None], "teaches_itself": [2, 2]}
    curves = {"health/class_logit": [(1, 1.0)], "loss": [(1, 3.0)]}
    text = render(Page("x", "today", runs=[Run("csrm", curves, health=health)]))
    assert re.findall(r'<li class="c0">([^<]*)</li>', text) == ["loss 3", "class_logit 2.5", "vanished 25"]
    assert re.findall(r'aria-label="(.*?) over', text) == ["loss", "class_logit", "vanished, %"]
    assert line_chart({"class_logit": [(1, 1.0), (2, 2.5)]}, x="epoch", y="class_logit") in text
    assert line_chart({"vanished": [(2, 25.0)]}, x="epoch", y="vanished, %") in text
    assert '<th scope="row">teaches_itself</th><td>[2, 2]</td>' in text


def test_two_hundred_images_of_noise_stay_below_fifteen_megabytes():
    one = card("noise", doubt=0.5, iou=0.5, noise=True)
    text = render(page([one]))
    assert len(text) + 199 * (len(text) - len(render(page([])))) < 15e6


PROBE = """<script>
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const visible = () => [...document.querySelectorAll("#cards .card:first-child .layer")]
  .filter((layer) => getComputedStyle(layer).display !== "none").map((layer) => layer.alt);
const order = () => [...document.querySelectorAll("#cards figcaption b")].map((name) => name.textContent);
const dialog = () => large.open && document.querySelector("#stage figcaption b").textContent;
const sort = (by) => { const s = byId("order"); s.value = by; s.dispatchEvent(new Event("change")); return order(); };
const seen = {start: visible()};
press("1"); seen.photograph = visible();
press("ArrowRight"); seen.truth = visible();
press("3"); seen.cam = visible();
press("ArrowLeft"); press("ArrowLeft"); press("ArrowLeft"); seen.around = visible();
seen.listed = order(); seen.doubt = sort("doubt"); seen.iou = sort("iou"); seen.again = sort("listed");
document.querySelector(".picture").click(); seen.opened = dialog();
press("ArrowDown"); seen.next = dialog(); press("ArrowDown"); press("ArrowDown"); seen.last = dialog();
press("ArrowUp"); seen.up = dialog(); large.close(); seen.closed = dialog();
seen.wide = document.documentElement.scrollWidth > innerWidth;
seen.links = [...document.querySelectorAll("#sections a")].map((link) => link.textContent);
document.body.replaceChildren(JSON.stringify(seen));
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_keys_and_order_in_a_browser(tmp_path, width):
    cards = [card(i, doubt=d, iou=v) for i, d, v in (("p", 0.1, 0.9), ("q", 0.3, None), ("r", 0.2, 0.4))]
    text = render(page(cards, stages={"a stage with a long name": score(50.0)}))
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    seen = json.loads(unescape(body[1]))
    assert seen["start"] == ["Refined of p: cat 50 %"] and seen["photograph"] == []
    assert seen["truth"] == ["Ground truth of p: cat 50 %"] and seen["cam"] == ["CAM of p: cat 40 %"]
    assert seen["around"] == ["Refined of p: cat 50 %"]
    assert seen["listed"] == seen["again"] == ["p", "q", "r"]
    assert seen["doubt"] == ["q", "r", "p"] and seen["iou"] == ["r", "p", "q"]
    assert (seen["opened"], seen["next"], seen["last"], seen["up"], seen["closed"]) == ("p", "q", "r", "q", False)
    assert seen["links"] == ["Stages", "IoU of each class, %", "Images"] and not seen["wide"]
