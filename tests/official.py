"""Small archives in the official formats, and a local web server that serves them as badly as a test asks for.

archive = voc_archive(tmp_path)                    # VOCtrainval in miniature: a .tar
with Server(folder) as server: urlopen(server.url + "/a.tar")
"""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import re
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from datasets.base import voc_palette
from datasets.prepare.download import Archive


@dataclass
class Server:
    """Serves the files of a folder on 127.0.0.1, with Range.

    Attributes:
        folder: what to serve.
        cut: bytes after which each answer breaks off.
        ranges: whether Range is understood.
        lengths: whether answers say how long they are.
        status: answer everything with this error instead.
        page: answer everything with this web page, of unknown length.
        asked: (path, Range header) of the requests so far.
    """

    folder: Path
    cut: int | None = None
    ranges: bool = True
    lengths: bool = True
    status: int | None = None
    page: bytes | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def __enter__(self) -> Server:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One GET."""
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        if self.page:
            request.send_response(200)
            request.send_header("Content-Type", "text/html; charset=utf-8")
            request.end_headers()
            request.wfile.write(self.page)
            return
        path = self.folder / request.path.lstrip("/")
        if self.status or not path.is_file():
            request.send_error(self.status or 404)
            return
        content = path.read_bytes()
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        if start and start >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.lengths:
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:][: self.cut])


def describe(archive: Archive, path: Path, url: str = "") -> Archive:
    """`archive` with the size and checksum of the file at `path` instead of the official ones."""
    content = path.read_bytes()
    known = vars(archive) | {"size": len(content), "md5": hashlib.md5(content).hexdigest(), "name": path.name}
    return Archive(**(known | {"url": f"{url}/{path.name}"}))


def photograph(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Noise: uint8 [H, W, 3], another for every seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array: np.ndarray, suffix: str, palette: np.ndarray | None = None) -> bytes:
    """The bytes of an image file; with a palette, those of a mask."""
    image = Image.fromarray(array)
    if palette is not None:
        image = image.convert("P")
        image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """A tar archive with these members."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    """A zip archive with these members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def half_mask(index: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Background above, a row of 255, class `index` below: uint8 [H, W]."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2] = 255
    mask[height // 2 + 1 :] = index
    return mask


VOC_SPLITS = {"train": ["2007_000001", "2007_000002"], "val": ["2007_000003"], "trainval": []}
VOC_SPLITS["trainval"] = VOC_SPLITS["train"] + VOC_SPLITS["val"]
VOC_OTHERS = ["2008_000004", "2008_000005"]  # photographs without a mask in VOC; SBD has them
VOC_TEST = ["2008_000006", "2008_000007"]
SBD_SPLITS = {"train": ["2007_000002", "2008_000004"], "val": ["2007_000003", "2008_000005"]}
VOC_LABELS = {name: index for index, name in ((5, "bottle"), (8, "cat"), (15, "person"))}


def voc_archives(folder: Path) -> tuple[Path, Path]:
    """VOCtrainval and VOC2012test: photographs of cats, one of them (2008_000005) of a person too."""
    root, cats = "VOCdevkit/VOC2012", {}
    for number, image_id in enumerate(VOC_SPLITS["trainval"] + VOC_OTHERS):
        names = ["cat", "person"] if image_id == "2008_000005" else ["cat"]
        objects = "".join(f"<object><name>{name}</name></object>" for name in names)
        cats[f"{root}/Annotations/{image_id}.xml"] = f"<annotation>{objects}</annotation>".encode()
        cats[f"{root}/JPEGImages/{image_id}.jpg"] = encoded(photograph(number), "jpg")
    for image_id in VOC_SPLITS["trainval"]:
        cats[f"{root}/SegmentationClass/{image_id}.png"] = encoded(half_mask(8), "png", voc_palette())
    lists = {f"{root}/ImageSets/Segmentation/{name}.txt": _lines(ids) for name, ids in VOC_SPLITS.items()}
    test = {f"{root}/JPEGImages/{i}.jpg": encoded(photograph(100 + n), "jpg") for n, i in enumerate(VOC_TEST)}
    test[f"{root}/ImageSets/Segmentation/test.txt"] = _lines(VOC_TEST)
    return (
        write_tar(folder / "VOCtrainval_11-May-2012.tar", lists | cats),
        write_tar(folder / "VOC2012test.tar", test),
    )


def sbd_archive(folder: Path) -> Path:
    """benchmark.tgz; SBD masks have no 255. 2008_000005 shows a person."""
    root = "benchmark_RELEASE/dataset"
    members = {f"{root}/{name}.txt": _lines(ids) for name, ids in SBD_SPLITS.items()}
    members["benchmark_RELEASE/README"] = b"not needed"
    for image_id in SBD_SPLITS["train"] + SBD_SPLITS["val"]:
        mask = np.where(half_mask(15 if image_id == "2008_000005" else 8) == 255, 0, half_mask(8)).astype(np.uint8)
        mask[mask == 8] = 15 if image_id == "2008_000005" else 8
        members[f"{root}/cls/{image_id}.mat"] = sbd_mat(mask)
        members[f"{root}/img/{image_id}.jpg"] = b"not needed"
    return write_tar(folder / "benchmark.tgz", members, "w:gz")


def sbd_mat(mask: np.ndarray) -> bytes:
    """A `cls/*.mat` file."""
    buffer = io.BytesIO()
    fields = {"Boundaries": np.zeros(3), "Segmentation": mask, "CategoriesPresent": np.unique(mask[mask > 0])}
    scipy.io.savemat(buffer, {"GTcls": fields})
    return buffer.getvalue()


COCO_CATEGORIES = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}, {"id": 13, "name": "stop sign"}]
COCO_CLASSES = ["background", "person", "stop sign", "toothbrush"]


def coco_name(part: str, number: int) -> str:
    return f"COCO_{part}_{number:012d}"


def coco_instances(part: str, numbers: list[int], annotations: list[dict], height: int = 40, width: int = 50) -> dict:
    """The content of `instances_{part}.json`."""
    images = [
        {"file_name": f"{coco_name(part, n)}.jpg", "height": height, "width": width, "id": n, "license": 1}
        for n in numbers
    ]
    return {"info": {"year": 2014}, "images": images, "annotations": annotations, "categories": COCO_CATEGORIES}


def coco_annotations(number: int, count: int, seed: int, height: int = 40, width: int = 50) -> list[dict]:
    """Random polygons (also of two parts), one crowd in uncompressed RLE and one in compressed RLE."""
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(seed)
    annotations = []
    for index in range(count):
        parts = []
        for _ in range(1 + index % 2):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
            radius, centre = rng.uniform(3, 18), rng.uniform(8, 36, 2)
            points = np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], axis=1)
            parts.append(points.clip(0).round(2).ravel().tolist())
        annotations.append({"segmentation": parts, "iscrowd": 0})
    crowd = np.asfortranarray(rng.random((height, width)) < 0.2, np.uint8)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], crowd.ravel(order="F"), [2]]))))
    counts = ([0] if crowd[0, 0] else []) + runs.tolist()
    annotations.append({"segmentation": {"counts": counts, "size": [height, width]}, "iscrowd": 1})
    box = np.zeros((height, width), np.uint8, order="F")
    box[30:38, 40:48] = 1
    code = coco_mask.encode(box)
    annotations.append({"segmentation": {"counts": code["counts"].decode(), "size": [height, width]}, "iscrowd": 0})
    for index, annotation in enumerate(annotations):
        category = COCO_CATEGORIES[int(rng.integers(len(COCO_CATEGORIES)))]["id"]
        annotation |= {"image_id": number, "category_id": category, "id": 1000 * number + index, "area": 1.0}
        annotation["bbox"] = [0.0, 0.0, 1.0, 1.0]
    return annotations


COCO_NUMBERS = {"train2014": [9, 25, 30], "val2014": [42]}  # 30 has no annotation


def coco_archives(folder: Path) -> list[Path]:
    """annotations_trainval2014.zip, train2014.zip, val2014.zip."""
    annotations = {"annotations/captions_train2014.json": b"not needed"}
    paths = []
    for part, numbers in COCO_NUMBERS.items():
        objects = [a for n in numbers if n != 30 for a in coco_annotations(n, 5, n)]
        content = json.dumps(coco_instances(part, numbers, objects)).encode()
        annotations[f"annotations/instances_{part}.json"] = content
        images = {f"{part}/{coco_name(part, n)}.jpg": encoded(photograph(n, 40, 50), "jpg") for n in numbers}
        paths.append(write_zip(folder / f"{part}.zip", images))
    return [write_zip(folder / "annotations_trainval2014.zip", annotations), *paths]


def deepglobe_archive(folder: Path) -> Path:
    """The land-cover archive: ten photographs with masks of two colours (blurred as the real ones), two without."""
    members: dict[str, bytes] = {}
    colours = np.array([(0, 255, 255), (0, 0, 255)], np.int64)
    for number in range(1, 11):
        mask = np.repeat(colours[[0, number % 2]], 16, axis=0)[:, None].repeat(48, axis=1)
        blur = np.random.default_rng(number).integers(-100, 101, mask.shape)
        members[f"train/{number}_sat.jpg"] = encoded(photograph(number, 32, 48), "jpg")
        members[f"train/{number}_mask.png"] = encoded((mask + blur).clip(0, 255).astype(np.uint8), "png")
        members[f"__MACOSX/train/._{number}_sat.jpg"] = b"no image"
    for number in (11, 12):
        members[f"valid/{number}_sat.jpg"] = encoded(photograph(number, 32, 48), "jpg")
    return write_zip(folder / "archive.zip", members)


def _lines(ids: list[str]) -> bytes:
    return "".join(f"{image_id}\n" for image_id in ids).encode()
