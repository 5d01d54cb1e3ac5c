"""Label Studio: `tasks.json` with the masks as pre-annotations (brush RLE), `config.xml` with the labels.

The photographs are served from disk: start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and
LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=the folder that holds `images/`. The codec is that of its own SDK.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from datasets.exchange.labels import IGNORED, Item, Labels, hexadecimal
from tools.errors import UserError, require
from tools.files import read_text, reading, save_json, save_text

CODEC = ("label_studio_sdk.converter.brush", "label-studio-sdk")
OPAQUE = 128  # a pixel belongs to a brush stroke from this opacity on; its edge may be blurred


def write(folder: Path, items: Sequence[Item], labels: Labels) -> list[Path]:
    """Write `tasks.json` and `config.xml` (UserError: the SDK is not installed)."""
    codec = require(*CODEC)
    tasks = []
    for item in items:
        indices = labels.indices(item.mask)
        strokes = [
            _stroke(f"{item.image_id}-{index}", indices == index, labels.names[index], codec.encode_rle)
            for index in np.unique(indices[indices > 0]).tolist()
        ]
        data = {"image": f"/data/local-files/?d=images/{quote(item.file)}", "id": item.image_id}
        tasks.append({"data": data, "predictions": [{"model_version": "csrm", "result": strokes}]})
    save_json(folder / "tasks.json", tasks)
    save_text(folder / "config.xml", _config(labels))
    return [folder / "tasks.json", folder / "config.xml"]


def _stroke(name: str, mask: np.ndarray, label: str, encode: Callable[[np.ndarray], list[int]]) -> dict:
    height, width = mask.shape
    pixels = np.repeat(np.where(mask, 255, 0).astype(np.uint8).ravel(), 4)  # RGBA
    return {
        "id": name,
        "type": "brushlabels",
        "from_name": "brush",
        "to_name": "image",
        "original_height": height,
        "original_width": width,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": encode(pixels), "brushlabels": [label]},
    }


def _config(labels: Labels) -> str:
    rows = "".join(
        f"    <Label value={quoteattr(name)} background={quoteattr(hexadecimal(colour))}/>\n"
        for name, colour in zip(labels.names[1:], labels.colours[1:], strict=True)
    )
    return (
        f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="brush" toName="image">\n{rows}  </BrushLabels>\n</View>\n'
    )


def read(path: Path, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
    """(name, mask uint8 [H, W]) of each task of a JSON export that somebody has looked over.

    Of several annotations the one changed last counts; cancelled ones do not. Later strokes are painted over earlier
    ones. How many tasks are without strokes is printed: a new annotation begins so, without what was predicted, and is
    soon submitted.

    Raises:
        UserError: no such export, something else than brush strokes in it, or the SDK is not installed.
    """
    codec, unpainted = require(*CODEC), 0
    with reading(path, "export of Label Studio", "Export it as JSON."):
        for task in json.loads(read_text(path)):
            done = [one for one in task["annotations"] if not one.get("was_cancelled")]
            done.sort(key=lambda one: one.get("updated_at") or "")  # the export is in no particular order
            if done and done[-1]["result"]:
                yield str(task["data"]["id"]), labels.values(_paint(path, done[-1]["result"], labels, codec.decode_rle))
            elif done:
                unpainted += 1
    if unpainted:
        remedy = f"If there is nothing to paint, paint a dot of '{IGNORED}'."
        print(f"{path}: tasks submitted without strokes, not imported: {unpainted}. {remedy}")


def _paint(path: Path, result: Sequence[dict], labels: Labels, decode: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    others = [one for one in result if one["type"] != "brushlabels"]
    if others:  # they may lack a size
        raise UserError(f"{path}: {others[0]['type']} of '{others[0].get('to_name')}'. Use the brush only.")
    indices = np.zeros((result[0]["original_height"], result[0]["original_width"]), dtype=np.uint8)
    for stroke in result:
        (name,) = stroke["value"]["brushlabels"]
        opacity = decode(stroke["value"]["rle"]).reshape(*indices.shape, 4)[..., 3]
        indices[opacity >= OPAQUE] = labels.index(name, path)
    return indices
