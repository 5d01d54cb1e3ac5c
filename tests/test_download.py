"""Archives: downloads that go on, files that are not what they should be, members that must not get out."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from official import Server, describe, write_tar, write_zip

from datasets.prepare import download
from datasets.prepare.download import Archive, check_space, fetch, unpack
from tools.errors import UserError

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
BLANK = Archive("a.bin", url="", md5="", yields="x")


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(CONTENT)
    with Server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def archive(server: Server) -> Archive:
    return describe(BLANK, server.folder / "a.bin", server.url)


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "PAUSE", 0)


def ranges(server: Server) -> list[str | None]:
    return [header for _, header in server.asked]


def test_a_download_is_complete_and_not_repeated(server, archive, downloads):
    path = fetch(archive, downloads)
    assert path == downloads / "a.bin" and path.read_bytes() == CONTENT
    assert fetch(archive, downloads) == path
    assert ranges(server) == [None] and os.listdir(downloads) == ["a.bin"]


def test_a_mirror_replaces_the_official_address(server, archive, downloads):
    elsewhere = Archive(**(vars(archive) | {"url": "http://127.0.0.1:9/a.bin"}))
    assert fetch(elsewhere, downloads, f"{server.url}/").read_bytes() == CONTENT
    assert server.asked == [("/a.bin", None)]


@pytest.mark.parametrize("lengths", [True, False])
def test_a_connection_that_breaks_off_is_continued(server, archive, downloads, lengths):
    server.cut, server.lengths = 1_250_000, lengths
    assert fetch(archive, downloads).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1250000-", "bytes=2500000-"]


def test_an_interrupted_command_is_continued_by_the_next(server, archive, downloads, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "_write_block", interrupt_after(2))
        fetch(archive, downloads)
    assert (downloads / "a.bin.part").stat().st_size == 2 * download.BLOCK
    assert fetch(archive, downloads).read_bytes() == CONTENT
    assert ranges(server) == [None, f"bytes={2 * download.BLOCK}-"]


def interrupt_after(blocks: int):
    """A `_write_block` after which the user presses Ctrl-C."""
    original, written = download._write_block, []

    def write(file, block, path):
        if len(written) == blocks:
            raise KeyboardInterrupt
        original(file, block, path)
        written.append(block)

    return write


def test_a_server_without_ranges_starts_again(server, archive, downloads):
    downloads.mkdir()
    (downloads / "a.bin.part").write_bytes(b"x" * 1000)
    server.ranges = False
    assert fetch(archive, downloads).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server, archive, downloads):
    downloads.mkdir()
    (downloads / "a.bin.part").write_bytes(b"x" * (len(CONTENT) + 5))
    assert fetch(archive, downloads).read_bytes() == CONTENT


def test_a_part_that_is_complete_is_only_checked(server, archive, downloads):
    downloads.mkdir()
    (downloads / "a.bin.part").write_bytes(CONTENT)
    assert fetch(archive, downloads).read_bytes() == CONTENT and server.asked == []


def test_a_wrong_checksum_is_refused_and_not_continued(server, archive, downloads):
    (server.folder / "a.bin").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(UserError, match=rf"a\.bin: not the official file: checksum \w+ instead of {archive.md5}"):
        fetch(archive, downloads)
    assert os.listdir(downloads) == []


def test_a_file_put_there_by_hand_is_checked_but_never_deleted(server, archive, downloads):
    downloads.mkdir()
    for content, reason in ((CONTENT[:1000], "1000 bytes instead of 3000000"), (CONTENT[::-1], "checksum")):
        (downloads / "a.bin").write_bytes(content)
        with pytest.raises(UserError, match=f"downloads/a.bin: not the official file: {reason}"):
            fetch(archive, downloads)
        assert (downloads / "a.bin").read_bytes() == content
    assert server.asked == []


def test_another_page_in_place_of_the_file_is_refused_at_once(server, archive, downloads):
    (server.folder / "a.bin").write_bytes(b"<html>Please log in</html>")
    with pytest.raises(UserError, match="26 bytes, but the official file has 3000000"):
        fetch(archive, downloads)
    assert len(server.asked) == 1


def test_a_page_of_unknown_length_costs_nothing_of_what_is_there(server, archive, downloads):
    """As a network answers that wants a login."""
    downloads.mkdir()
    (downloads / "a.bin.part").write_bytes(CONTENT[:1_000_000])
    server.page = b"<html>Please log in</html>"
    with pytest.raises(UserError, match=rf"{archive.url}: a web page, not the official file\. Or put the file at"):
        fetch(archive, downloads)
    server.page = None
    assert fetch(archive, downloads).read_bytes() == CONTENT and ranges(server)[-1] == "bytes=1000000-"


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, download.ATTEMPTS)])
def test_an_error_of_the_server_is_one_line(server, archive, downloads, status, requests):
    server.status = status
    with pytest.raises(UserError, match=rf"{status}.*put the file at {downloads / 'a.bin'} yourself") as caught:
        fetch(archive, downloads)
    assert len(server.asked) == requests and "\n" not in str(caught.value)


@pytest.mark.parametrize("mirror", ["/mnt/archives", "file:///mnt/archives", "ftp://host"])
def test_a_mirror_that_is_no_web_address(archive, downloads, mirror):
    with pytest.raises(UserError, match=f"--mirror {mirror}: not an http.* pass --download_dir"):
        fetch(archive, downloads, mirror)
    assert not downloads.exists()


def test_archives_may_lie_in_a_folder_that_cannot_be_written(archive, downloads, monkeypatch):
    downloads.mkdir()
    (downloads / "a.bin").write_bytes(CONTENT)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", None)  # what would be used to try it
    monkeypatch.setattr(tempfile, "mkstemp", None)
    assert fetch(archive, downloads) == downloads / "a.bin"


def test_a_disk_without_room_for_another_file_is_one_line(archive, downloads, monkeypatch):
    original = Path.open

    def refuse(path: Path, mode: str = "r", **options: object):
        if mode == "wb":
            raise OSError(28, "No space left on device")
        return original(path, mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.bin\.part: could not be written \(No space left on device\)"):
        fetch(archive, downloads)


def test_no_connection_is_one_line(server, archive, downloads):
    with pytest.raises(UserError, match=r"could not be downloaded \(\[Errno 111\] Connection refused\)"):
        fetch(archive, downloads, "http://127.0.0.1:9")


def test_a_disk_too_small_is_seen_before_the_download(server, archive, downloads, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 5_000_000))
    with pytest.raises(UserError, match=r"downloading and unpacking a\.bin needs 0\.0 GB"):
        fetch(archive, downloads)
    check_space(downloads, 5_000_000, "as much as there is")


def test_a_disk_that_fills_up_keeps_what_is_there(server, archive, downloads, monkeypatch):
    downloads.mkdir()
    original = download._write_block
    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(download, "_write_block", lambda file, block, path: original(full, block, path))
        with pytest.raises(UserError, match=r"a\.bin\.part: could not be written \(No space left on device\)"):
            fetch(archive, downloads)
    assert fetch(archive, downloads).read_bytes() == CONTENT


# ------------------------------------------------------------------------------------------------------------ unpacking

MEMBERS = {"top/x": b"1" * 5000, "top/folder/y": b"2" * 10, "top/folder/z": CONTENT[:200_000], "other/w": b"3"}
WRITERS = {
    "a.zip": write_zip,
    "a.tar": write_tar,
    "a.tgz": lambda path, members: write_tar(path, members, "w:gz"),
}


@pytest.fixture(params=WRITERS)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / request.param, MEMBERS)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spec(packed: Path, **changes: object) -> Archive:
    return Archive(**({"name": packed.name, "url": "", "md5": "", "yields": "top/x"} | changes))


def test_everything_is_unpacked(packed, tmp_path):
    unpack(spec(packed), packed, tmp_path / "out")
    assert content(tmp_path / "out") == MEMBERS and spec(packed).is_unpacked(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["other", "top"]


def test_only_what_is_wanted_is_unpacked(packed, tmp_path):
    unpack(spec(packed, strip="top/", wanted=("x", "folder/y"), yields="x"), packed, tmp_path / "out")
    assert content(tmp_path / "out") == {"x": MEMBERS["top/x"], "folder/y": MEMBERS["top/folder/y"]}


def test_files_that_were_there_stay(packed, tmp_path):
    (tmp_path / "out" / "top").mkdir(parents=True)
    (tmp_path / "out" / "top" / "mine").write_bytes(b"mine")
    unpack(spec(packed), packed, tmp_path / "out")
    assert content(tmp_path / "out") == MEMBERS | {"top/mine": b"mine"}


@pytest.mark.parametrize(("there", "moved"), [([], ["c", "b"]), (["b"], ["c", "y", "x"])])
def test_what_says_that_all_is_there_is_moved_last(tmp_path, monkeypatch, there, moved):
    packed = write_zip(tmp_path / "a.zip", {"b/x": b"1", "b/y": b"2", "c/z": b"3"})
    for name in there:
        (tmp_path / "out" / name).mkdir(parents=True)
    places, original = [], os.replace
    monkeypatch.setattr(os, "replace", lambda path, place: (places.append(place.name), original(path, place)))
    unpack(spec(packed, yields="b/x"), packed, tmp_path / "out")
    assert places == moved


def test_interrupted_it_goes_on_where_it_stopped(packed, tmp_path, monkeypatch):
    written = []
    original = download._write_block

    def write(file, block, path):
        if len(written) == 2:
            file.write(block[:7])
            raise KeyboardInterrupt
        written.append(path.name)
        original(file, block, path)

    monkeypatch.setattr(download, "_write_block", write)
    with pytest.raises(KeyboardInterrupt):
        unpack(spec(packed), packed, tmp_path / "out")
    assert not spec(packed).is_unpacked(tmp_path / "out")
    monkeypatch.setattr(download, "_write_block", lambda *args: written.append(args[2].name) or original(*args))
    unpack(spec(packed), packed, tmp_path / "out")
    assert content(tmp_path / "out") == MEMBERS and written == ["x", "y", "z", "w"]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_archive_leaves_nothing(packed, tmp_path, share):
    packed.write_bytes(packed.read_bytes()[: int(share * packed.stat().st_size)])
    with pytest.raises(UserError, match=rf"{packed.name}: not a sound archive \(.*\)\. Delete it") as caught:
        unpack(spec(packed), packed, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [] and "\n" not in str(caught.value)


def test_a_member_with_a_flipped_bit_leaves_nothing(tmp_path):
    for name in ("a.zip", "a.tgz"):
        packed = WRITERS[name](tmp_path / name, MEMBERS)
        damaged = bytearray(packed.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match="not a sound archive"):
            unpack(spec(packed), packed, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == []


def test_a_member_shorter_than_the_archive_says_leaves_nothing(tmp_path):
    packed = write_zip(tmp_path / "a.zip", MEMBERS)
    damaged = bytearray(packed.read_bytes())
    damaged[damaged.index(b"PK\1\2") + 24] += 1  # the size in the table of contents
    packed.write_bytes(damaged)
    with pytest.raises(UserError, match="not a sound archive"):
        unpack(spec(packed), packed, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["../outside", "top/../../outside"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_member_that_points_outside_is_refused(tmp_path, suffix, name):
    packed = WRITERS[suffix](tmp_path / suffix, {"top/x": b"1", name: b"2"})
    with pytest.raises(UserError, match=f"'{name}' would be extracted to .*, which is outside the destination"):
        unpack(spec(packed), packed, tmp_path / "a" / "out")
    assert os.listdir(tmp_path / "a" / "out") == [] and sorted(os.listdir(tmp_path)) == ["a", suffix]


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_absolute_path_is_taken_as_one_inside(tmp_path, suffix):
    packed = WRITERS[suffix](tmp_path / suffix, {"top/x": b"1", "/outside": b"2"})
    unpack(spec(packed), packed, tmp_path / "out")
    assert content(tmp_path / "out") == {"top/x": b"1", "outside": b"2"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("place", ["/etc/passwd", "../../secret", "y"])
def test_links_and_devices_are_refused(tmp_path, kind, place):
    (tmp_path / "secret").write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        item = tarfile.TarInfo("top/y")
        item.size = 1
        archive.addfile(item, io.BytesIO(b"1"))
        item = tarfile.TarInfo("top/x")
        item.type, item.linkname = kind, place
        archive.addfile(item)
    with pytest.raises(UserError, match="a.tar: not a sound archive"):
        unpack(spec(tmp_path / "a.tar"), tmp_path / "a.tar", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_another_archive_under_that_name_is_refused(packed, tmp_path):
    with pytest.raises(UserError, match=r"no 'VOC/list\.txt' in it"):
        unpack(spec(packed, yields="VOC/list.txt"), packed, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_disk_too_small_for_what_is_in_it(packed, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 100_000))
    with pytest.raises(UserError, match=f"unpacking {packed.name} needs"):
        unpack(spec(packed), packed, tmp_path / "out")


def test_a_disk_that_fills_up_while_unpacking_is_one_line(packed, tmp_path, monkeypatch):
    original = download._write_block
    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(download, "_write_block", lambda file, block, path: original(full, block, path))
        with pytest.raises(UserError, match=r"x: could not be written \(No space left on device\)"):
            unpack(spec(packed), packed, tmp_path / "out")
    unpack(spec(packed), packed, tmp_path / "out")
    assert content(tmp_path / "out") == MEMBERS
