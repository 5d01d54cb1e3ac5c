"""The identity of a product: what made it. It is kept beside the product, and compared before the product is reused.

    made_by = describe("inference.py", vars(args), inputs=source.fingerprints(ids, labels=True))
    difference(stored, made_by)      # "--scales [0.5, 1.0], not [1.0]"; "" if the product is the same

An identity is a dict of plain values:

    script      the entry script                        version   of the code; shown, never compared
    settings    flags by name, without the harmless ones; classes: names, if the product depends on their order
    files       flag -> {"file", "sha256"}: files of weights; the content is compared, not the name
    inputs      kind -> {id: fingerprint}: photographs (size of the file; content of a BMP or TIFF), labels (class
                names), masks (content)
    folders     flag -> where the inputs were; shown, never compared
    lineage     what of experiments/ it was made of, however many stages before (`outdated`)

A checkpoint depends on all its images: it keeps a `digest` of its inputs, and all must agree. In a folder, each file
depends on one image: only the inputs of existing files must agree (`claim_folder`). So a list of images may grow, and
an image that stopped a stage may be replaced. Masks and maps hold indices of classes: who reads a folder of them asks
`check_classes` whether they are indices of the same classes, and of the same photographs and image labels.
"""

import functools
import hashlib
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.errors import UserError
from tools.files import check_writable, locked, read_json, save_json
from tools.options import EXPERIMENTS, plain
from tools.parallel import READERS, thread_map

VERSION = "1.0.0"
"""Version of the code, kept in every checkpoint."""

RECORD = "settings.json"
"""The file of a folder that holds its identity."""

HARMLESS = ("tag", "device", "num_workers", "compile", "domain_valid", "overwrite", "on_error", "dataset", "data_dir")
"""Flags that change no result, or whose effect shows in the inputs."""

FILES = ("restore", "oc_weights", "backbone_weights", "weights", "checkpoint")
"""Flags that name a file of weights."""

UNCOMPRESSED = (".bmp", ".tif", ".tiff")
"""Photographs of one camera have one size in these formats."""

FOLDERS = {"photographs": "data_dir", "labels": "data_dir", "masks": "masks_dir"}
FOLDERS |= {"pseudo masks": "pseudo_dir", "proposals": "proposals_dir", "mask files": "mask_files"}
FOLDERS |= {"corrected masks": "corrected_dir", "CAM files": "c2s_labels"}
"""The flag that names the folder of each kind of input."""


def describe(
    script: str, flags: Mapping[str, Any], *, inputs: dict[str, dict[str, Any]], harmless: Collection[str] = ()
) -> dict[str, Any]:
    """The identity of what `script` makes with these flags.

    Args:
        flags: by name, and `classes`. A folder (a `Path` that is no file of weights) counts by its content, which must
            be in `inputs`.
        inputs: what is read of each image, by kind and id.
        harmless: more flags that change nothing here.
    """
    paths = {name for name, value in flags.items() if isinstance(value, Path)}
    unknown = paths - {*FILES, *FOLDERS.values(), *harmless}
    assert not unknown, f"{unknown}: neither a file of weights nor a folder whose content is an input"
    counting = {name: value for name, value in flags.items() if name not in (*HARMLESS, *harmless)}
    files = {name: value for name, value in counting.items() if name in FILES and _is_file(value)}
    settings = {
        name: plain(value)
        for name, value in counting.items()
        if name not in files and (name in FILES or not isinstance(value, Path))
    }
    made_by = {
        "script": script,
        "version": code_version(),
        "settings": settings,
        "files": {name: {"file": str(path), "sha256": file_fingerprint(path)} for name, path in files.items()},
        "folders": {name: str(flags[name]) for name in FOLDERS.values() if isinstance(flags.get(name), Path)},
        "inputs": inputs,
    }
    return {**made_by, "lineage": _lineage(made_by)}


def _lineage(made_by: Mapping[str, Any]) -> dict[str, str]:
    """What of `experiments/` this was made of, however early: path of a checkpoint or a folder -> its `_state`."""
    lineage = {}
    for folder in made_by["folders"].values():
        record = known_record(Path(folder))
        lineage |= record.get("lineage", {}) | {folder: _made_with(record)}
    lineage |= {each["file"]: each["sha256"] for each in made_by["files"].values()}
    lineage = {os.path.relpath(place): state for place, state in lineage.items() if state}  # however it was spelt
    return {place: state for place, state in lineage.items() if Path(place).is_relative_to(EXPERIMENTS)}


def _state(place: Path) -> str:
    """The content of a file, or the flags and weights that made a folder; "" if that is not known."""
    if place.is_dir():
        return _made_with(known_record(place))
    return _content_since(place, place.stat().st_mtime_ns) if place.exists() else ""


def _made_with(record: Mapping[str, Any]) -> str:
    """The flags and weights in a folder's record, in short; "" if there is none."""
    made_with = [record.get("settings"), [each["sha256"] for each in record.get("files", {}).values()]]
    return hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16] if record else ""


@functools.cache
def _content_since(path: Path, _: int) -> str:
    """`_content` of a file, by the time of its last change: a page asks about a large checkpoint many times."""
    return _content(path)


def inherit(made_by: dict[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Add to an identity, in place, what its checkpoint was made of."""
    made_by["lineage"] = checkpoint.get("identity", {}).get("lineage", {}) | made_by["lineage"]


def outdated(made_by: Mapping[str, Any]) -> str:
    """What this was made of that is another now, as the end of a sentence; "" if nothing is, or it is not known."""
    for place, before in made_by.get("lineage", {}).items():
        if _state(Path(place)) not in ("", before):
            return f"were made from {place}, which has changed since, so that the stages after it must run again"
    return ""


def digest(made_by: dict[str, Any]) -> dict[str, Any]:
    """The identity with one hash for each kind of input, {"images", "sha256"}, over all images in their order.

    That of a version of the code that did not note what it read, or an empty one, stays as it is.
    """
    if "inputs" not in made_by:
        return made_by
    inputs = {
        kind: {"images": len(each), "sha256": hashlib.sha256(json.dumps(list(each.items())).encode()).hexdigest()[:16]}
        for kind, each in made_by["inputs"].items()
    }
    return {**made_by, "inputs": inputs}


def difference(stored: Mapping[str, Any], made_by: Mapping[str, Any]) -> str:
    """How the stored identity differs from this one, as the end of "made with ..."; "" if it does not.

    A setting that only one of them has is ignored: the other version of the code did not know it.
    """
    if not stored.keys() >= made_by.keys() - {"lineage"}:
        return "a version of the code that did not note what it read"
    if stored["script"] != made_by["script"]:
        return f"{stored['script']}, not {made_by['script']}"
    before, now = _named(stored), _named(made_by)
    for flag in now:
        if flag in before and before[flag][0] != now[flag][0]:
            return f"{flag} {before[flag][1]}, not {now[flag][1]}"
    for kind in stored["inputs"].keys() ^ made_by["inputs"].keys():
        return f"{kind}, not without" if kind in stored["inputs"] else f"no {kind}"
    for kind, each in made_by["inputs"].items():
        before = stored["inputs"][kind]
        if "sha256" in each and before != each:
            theirs, ours = (_digest_in_words(identity, kind) for identity in (stored, made_by))
            return f"other {kind}, or in another order: {theirs}, not {ours}"
        if "sha256" not in each and (text := _first_changed(before, each)):
            return f"other {kind} {text}"
    return ""


def _named(made_by: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """--flag, or "classes" -> what is compared, and how it is shown."""
    settings = {name: (value, str(value)) for name, value in made_by["settings"].items()}
    files = {
        name: (each["sha256"], f"{each['file']} (content {each['sha256'][:8]})")
        for name, each in made_by["files"].items()
    }
    return {name if name == "classes" else f"--{name}": value for name, value in {**settings, **files}.items()}


def _digest_in_words(made_by: Mapping[str, Any], kind: str) -> str:
    flag, inputs = FOLDERS.get(kind, ""), made_by["inputs"][kind]
    where = f"--{flag} {made_by['folders'][flag]} " if flag in made_by["folders"] else ""
    return f"{where}({inputs['images']} images, content {inputs['sha256'][:8]})"


def _first_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [image_id for image_id in now if image_id in before and before[image_id] != now[image_id]]
    if not changed:
        return ""
    first = changed[0]
    return f"of {len(changed)} images, the first is {first} ({before[first]!r}, not {now[first]!r})"


def claim_folder(folder: Path, made_by: dict[str, Any], *, another: str = "--tag", overwrite: bool = False) -> None:
    """Make or reuse a folder with a file per image, ID.SUFFIX. Other processes may do so at the same time.

    Its settings.json holds the identity of its files. So a stage that is started again with other settings or inputs
    does not mistake the old files for its own. Files of an image count whatever their suffix.

    Args:
        made_by: the identity of the files to make (`describe`); its inputs name the images.
        another: the flag that names another folder, and what that flag needs besides; for the error.
        overwrite: delete the files of another identity: those of its images and of these, nothing else. Files
            without a record may be a user's own: they stay.

    Raises:
        UserError: the files have another identity, or none; the folder is one that is read; or it cannot be written to.
    """
    for flag, place in made_by["folders"].items():
        if folder.resolve() == Path(place).resolve():
            raise UserError(f"--{flag} {place}: read and written by this command. Choose another --tag or folder.")
    record = check_writable(folder) / RECORD
    with locked(folder):
        products = _products(folder)
        ids = _ids(made_by)
        # A sum, which looks at all of them: an empty file may lie beside a whole one of another suffix.
        made = {image_id for image_id in ids & products.keys() if sum(map(_is_made, products[image_id]))}
        stored, fault = _examine(record, made_by, made)
        if fault and not (overwrite and record.exists()):
            remedy = "pass --overwrite to make it anew" if record.exists() else "move these files away"
            raise UserError(f"{folder}: {fault}. Choose another {another}, or {remedy}.")
        if fault:
            for image_id in (ids | _ids(stored)) & products.keys():
                for path in products[image_id]:
                    path.unlink(missing_ok=True)
            stored = {}
        old = stored.get("inputs", {})
        inputs = {kind: dict(sorted({**old.get(kind, {}), **each}.items())) for kind, each in made_by["inputs"].items()}
        now = {**made_by, **stored, "inputs": inputs, "lineage": made_by.get("lineage", {})}
        if inputs != old or now["lineage"] != stored.get("lineage"):
            # After the deletions: if the process is killed between them, the record is true of the files that are left.
            save_json(record, now)


def _products(folder: Path) -> dict[str, list[Path]]:
    """The files in a folder by the id of their image, without the record."""
    products = defaultdict(list)
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder) if place != str(folder) else ""
        for name in names:
            if inside or name != RECORD:
                image_id = os.path.splitext(name)[0]
                products[f"{inside}/{image_id}" if inside else image_id].append(Path(place, name))
    return products


def _ids(made_by: Mapping[str, Any]) -> set[str]:
    return set().union(*made_by.get("inputs", {}).values())


def _is_made(path: Path) -> bool:
    """Whether there is such a file. An empty one, which a power cut leaves, is deleted."""
    size = _size(path)
    if size == 0:
        path.unlink()
    return size > 0


def _examine(record: Path, made_by: dict[str, Any], made: set[str]) -> tuple[dict[str, Any], str]:
    """The stored identity, {} if there is none; and what is wrong with it for the images `made`, "" if nothing is."""
    try:
        stored = read_record(record)
    except UserError:
        return {}, f"its {record.name} is damaged"
    if not stored:
        return {}, f"holds files, but no {record.name} that says what made them" if made else ""
    inputs = {kind: {i: each[i] for i in each if i in made} for kind, each in made_by["inputs"].items()}
    if other := difference(stored, {**made_by, "inputs": inputs}):
        return stored, f"made with {other}"
    unlisted = made - _ids(stored)
    return stored, f"holds files that its {record.name} does not list, the first is {min(unlisted)}" if unlisted else ""


def read_record(record: Path) -> dict[str, Any]:
    """The identity in a folder's settings.json; {} if there is none (UserError: the file is damaged)."""
    if not record.exists():
        return {}
    remedy = f"Make {record.parent} again; or, if this file is another program's, move it away."
    content = read_json(record, remedy)
    if not _is_identity(content):
        raise UserError(f"{record}: holds no settings. {remedy}")
    return content


def known_record(folder: Path) -> dict[str, Any]:
    """`read_record` of a folder; {} also where the file is damaged, or another program's."""
    try:
        return read_record(folder / RECORD)
    except UserError:
        return {}


def _is_identity(content: Any) -> bool:
    """Whether JSON has the shape of an identity, or of one that an older version of the code has written."""
    if not isinstance(content, dict):
        return False
    settings, files, inputs, lineage = (content.get(key, {}) for key in ("settings", "files", "inputs", "lineage"))
    if not all(isinstance(table, dict) for table in (settings, files, inputs, lineage)):
        return False
    tables = [*files.values(), *inputs.values()]
    return all(isinstance(table, dict) for table in tables) and all(
        {"file", "sha256"} <= f.keys() for f in files.values()
    )


def check_classes(folder: Path, classes: Sequence[str], inputs: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """Refuse masks or maps of other classes, or of the same in another order, or of other photographs or image labels
    under the same ids, if the folder's record says so, or that of the masks that it refines. Only files that are there
    count.

    Args:
        classes: of the dataset, without the background.
        inputs: what there is now, by kind and id (`DataSource.fingerprints`).

    Raises:
        UserError: the record names others.
    """
    record = known_record(folder)
    compare_classes(folder, record.get("settings", {}).get("classes", classes), classes)
    stored = {kind: record.get("inputs", {}).get(kind) for kind in ("photographs", "labels") if kind in inputs}
    made = _products(folder) if any(stored.values()) else {}
    for kind, before in stored.items():
        if before and (changed := _first_changed({i: before[i] for i in before.keys() & made.keys()}, inputs[kind])):
            raise UserError(f"{folder}: made of other {kind} {changed}. Check --data_dir, or make it again.")
    if inputs and (text := outdated(record)):
        print(f"Warning: the files of {folder} {text}.")
    if "labels" in inputs and "pseudo_dir" in record.get("folders", {}):
        check_classes(Path(record["folders"]["pseudo_dir"]), classes, inputs)


def compare_classes(place: Path, made_of: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse what is made of other classes than the dataset's, or of the same in another order (UserError)."""
    if list(made_of) != list(classes):
        theirs, ours = ", ".join(made_of), ", ".join(classes)
        raise UserError(
            f"{place}: made of the classes [{theirs}], but the dataset has [{ours}]. Check --dataset and --data_dir, "
            "or make it again."
        )


def sentence(made_by: Mapping[str, Any]) -> str:
    """The identity in one line, for people."""
    if not {"script", "version", "settings", "files", "inputs"} <= made_by.keys():
        return "of a version of the code that did not note what it read"
    named = {flag: value for flag, (_, value) in _named(made_by).items() if flag != "classes"}
    shown = " ".join(f"{flag} {value}" for flag, value in named.items() if value not in ("None", ""))
    data = ", ".join(f"{_count(each)} {kind}" for kind, each in made_by["inputs"].items())
    return f"{made_by['script']} (version {made_by['version']}) of {data}: {shown}"


def _count(inputs: Mapping[str, Any]) -> int:
    return inputs["images"] if "sha256" in inputs else len(inputs)


def file_fingerprint(path: str | Path) -> str:
    """The content of a file in short: the first 16 hexadecimal digits of its SHA-256."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]


def contents(paths: Mapping[str, Path | None]) -> dict[str, str]:
    """The `file_fingerprint` of each file, by id; "" if there is no file."""
    return dict(zip(paths, thread_map(_content, [*paths.values()], READERS), strict=True))


def sizes(paths: Mapping[str, Path]) -> dict[str, int]:
    """The size of each file in bytes, by id; -1 if there is no file. Fast, and enough for compressed files."""
    return dict(zip(paths, thread_map(_size, [*paths.values()], READERS), strict=True))


def photographs(paths: Mapping[str, Path]) -> dict[str, int | str]:
    """What tells photographs apart, by id: the size of the file, or the content of one that is not compressed."""
    return dict(zip(paths, thread_map(_photograph, [*paths.values()], READERS), strict=True))


def _content(path: Path | None) -> str:
    try:
        return file_fingerprint(path) if path else ""
    except OSError:
        return ""


def _photograph(path: Path) -> int | str:
    return _content(path) if path.suffix.lower() in UNCOMPRESSED else _size(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _is_file(value: Any) -> bool:
    return value not in (None, "none", "imagenet") and Path(value).is_file()


@functools.cache
def code_version() -> str:
    """VERSION, and the commit, if the code lies in a git checkout of its own."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return VERSION
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return VERSION
    return f"{VERSION}, commit {commit}"
