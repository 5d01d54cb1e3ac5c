"""Whatever way a mask is encoded: what verify accepts, evaluate reads rightly. Searched by hypothesis.

The PNGs are written here, bit by bit, so that no library's idea of them is on both sides.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import build_source
from datasets.base import voc_palette
from datasets.verify import ERRORS, verify
from evaluate import count_part
from tools.files import save_mask

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""By EXIF orientation, what makes the stored picture upright."""


def write_png(path: Path, samples: np.ndarray, kind: int, bits: int, palette: np.ndarray | None) -> None:
    """Samples int [H, W, channels] of `bits` each as a PNG of a colour type."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)[..., None] >> np.arange(bits)[::-1] & 1  # the bits of each sample, highest first
    packed = np.packbits(rows.reshape(height, -1).astype(np.uint8), axis=1)
    lines = b"".join(b"\0" + line.tobytes() for line in packed)
    chunks = [(b"IHDR", struct.pack(">LLBBBBB", width, height, bits, kind, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", palette[: 2**bits].astype(np.uint8).tobytes()))
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))
            for name, data in chunks
        )
    )


@dataclass(frozen=True)
class Encoded:
    """A mask, and the file that was made of it: samples by PNG's colour type and depth."""

    truth: np.ndarray
    classes: int
    samples: np.ndarray
    kind: int
    bits: int
    palette: np.ndarray | None


@st.composite
def encoded_masks(draw) -> Encoded:
    kind = draw(st.sampled_from([GREY, PALETTE, *CHANNELS]))
    bits = draw(st.sampled_from({GREY: [1, 2, 4, 8, 16], PALETTE: [1, 2, 4, 8]}.get(kind, [8, 16])))
    classes = draw(st.sampled_from([2, 3, 21, 200]))
    values = [value for value in (*range(classes), 255) if value < 2**bits]
    values = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    truth = rng.choice(values, size)
    if kind == PALETTE:
        return palette_mask(draw, rng, truth, classes, bits)
    scale = draw(st.sampled_from([1, 255, 257] if bits == 16 else [1]))
    samples = np.repeat(truth[..., None] * scale, CHANNELS[kind], axis=2)
    if kind in (COLOUR, COLOUR_ALPHA) and draw(st.booleans()):
        samples[..., :3] = voc_palette()[truth]
    return Encoded(truth, classes, samples, kind, bits, None)


def palette_mask(draw, rng: np.random.Generator, truth: np.ndarray, classes: int, bits: int) -> Encoded:
    """In the classes' colours or in greys, whose places may have been sorted; or in colours of the user's own."""
    colours = draw(st.sampled_from(["classes", "greys", "own"]))
    table = {"classes": voc_palette(), "greys": np.repeat(np.arange(256)[:, None], 3, axis=1)}.get(colours)
    place = np.arange(256)
    if colours != "own" and draw(st.booleans()):  # as optimisers do: the colours in use come first, in some order
        used = rng.permutation(np.unique(truth))
        place[used] = np.arange(len(used))
        palette = np.zeros((256, 3), np.int64)
        palette[: len(used)] = table[used]
    else:
        palette = rng.permutation(200)[:256, None] + np.array([1, 20, 55]) if table is None else table
        palette = np.resize(palette, (256, 3))
    return Encoded(truth, classes, place[truth][..., None], PALETTE, bits, palette)


def write_dataset(root: Path, mask: Encoded, orientation: int, *, drawn_upright: bool) -> None:
    """A `folder` of one photograph, its mask, and in `pred/` the mask that it means, upright."""
    for name in ("images", "masks", "pred"):
        (root / name).mkdir()
    names = [f"c{i}" for i in range(1, mask.classes)]
    shown = [names[i - 1] for i in np.unique(mask.truth) if 0 < i < 255]
    (root / "classes.txt").write_text("\n".join(["background", *names]))
    (root / "labels.csv").write_text(f"id,labels\na,{';'.join(shown)}\n")
    # The samples are what a tool saw: the upright picture, or the one that is stored.
    turned_back = {6: 8, 8: 6}.get(orientation, orientation)
    stored = TURNS[turned_back](mask.truth) if drawn_upright else mask.truth
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", stored.shape[::-1]).save(root / "images" / "a.png", exif=exif)
    upright = mask.truth if drawn_upright else TURNS[orientation](mask.truth)
    write_png(root / "masks" / "a.png", mask.samples, mask.kind, mask.bits, mask.palette)
    save_mask(root / "pred" / "a.png", np.ascontiguousarray(upright), voc_palette())


RAMP = np.array([[0, 1, 2]])


SORTED_GREYS = np.repeat([[0], [255], [2]], 3, axis=1)
"""Of a grey ramp, the colours in use, moved to the front: index 1 is no class 1 in white, but ignored."""


@settings(max_examples=100, deadline=None)
@given(mask=encoded_masks(), orientation=st.integers(1, 8), drawn_upright=st.booleans())
@example(mask=Encoded(RAMP, 200, RAMP[..., None], GREY, 4, None), orientation=1, drawn_upright=True)
@example(mask=Encoded(RAMP, 200, RAMP[..., None], GREY, 2, None), orientation=1, drawn_upright=True)
@example(mask=Encoded(100 * RAMP, 201, 25500 * RAMP[..., None], GREY, 16, None), orientation=1, drawn_upright=True)
@example(
    mask=Encoded(np.array([[0, 255, 2]]), 3, RAMP[..., None], PALETTE, 8, np.resize(SORTED_GREYS, (256, 3))),
    orientation=1,
    drawn_upright=True,
)
def test_what_verify_accepts_evaluate_reads_rightly(mask, orientation, drawn_upright):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root, mask, orientation, drawn_upright=drawn_upright)
        source = build_source("folder", root)
        findings = verify(source, {}, 0)[1]
        if any(findings[kind] for kind in ERRORS) or (findings["turned"] and not drawn_upright):
            return
        counts = count_part(source, root / "pred", ".png", [None], ["a"])[0]
        assert np.array_equal(counts[:, :-1], np.diag(np.diagonal(counts))) and not counts[:, -1].any()
        assert counts.sum() == (mask.truth != 255).sum()


@settings(max_examples=50, deadline=None)
@given(mask=encoded_masks())
def test_the_usual_encodings_are_accepted(mask):
    """Grey of 8 bits, of 16 with the same values, of 1; palettes with every colour in its place."""
    usual = mask.kind == GREY and mask.bits in (1, 8, 16) and np.array_equal(mask.samples[..., 0], mask.truth)
    in_place = mask.kind == PALETTE and np.array_equal(mask.samples[..., 0], mask.truth)
    if not (usual or in_place) or not np.isin(mask.truth, range(1, mask.classes)).any():
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root, mask, 1, drawn_upright=True)
        findings = verify(build_source("folder", root), {}, 0)[1]
        assert not any(findings[kind] for kind in (*ERRORS, "unlabelled", "turned"))
