"""The doubt about a mask, the IoU of one image, and the file of the queue."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tools.errors import UserError
from tools.review import Doubt, Row, doubt, image_iou, load_queue, queue, save_queue

MASK = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], np.uint8)
VALUES = st.sampled_from([0, 1, 2, 254, 255])


@given(st.data(), hnp.array_shapes(min_dims=2, max_dims=2, max_side=7))
def test_image_iou_is_that_of_a_plain_loop(data, shape):
    truth, mask = (data.draw(hnp.arrays(np.uint8, shape, elements=VALUES)) for _ in range(2))
    pixels = [(t, m) for t, m in zip(truth.ravel().tolist(), mask.ravel().tolist(), strict=True) if t != 255]
    ious = []
    for c in range(255):
        union = sum(c in pair for pair in pixels)
        if union:
            ious.append(sum(pair == (c, c) for pair in pixels) / union)
    assert image_iou(truth, mask) == pytest.approx(np.mean(ious) if ious else 1.0)


def test_stages_that_agree_leave_no_doubt_and_others_add_theirs():
    assert doubt(MASK, [MASK, MASK], np.array([1.0, 0.0])) == Doubt(0.0, 0.0)
    empty = np.zeros_like(MASK)  # IoU with MASK: background 4/8, class 1 0/4
    assert doubt(MASK, [MASK, empty]) == Doubt(disagreement=pytest.approx(0.375), missing=0.0)
    assert doubt(MASK, []) == Doubt(0.0, 0.0)
    undecided = np.where([[True, False, False, False]], 255, MASK).astype(np.uint8)
    assert doubt(undecided, [MASK]).disagreement == 0.25  # background 2/4; what the mask leaves open is no agreement
    assert doubt(MASK, [undecided]).disagreement == 0.0


def test_labelled_classes_that_the_mask_does_not_show_are_missing():
    assert doubt(MASK, [], np.array([1.0, 1.0])).missing == 0.5
    assert doubt(MASK, [], np.array([0.0, 0.0])).missing == 0.0
    speck = np.zeros((100, 100), np.uint8)
    speck[0, :19] = 1
    assert doubt(speck, [], np.array([1.0])).missing == 1.0
    speck[0, :20] = 1
    assert doubt(speck, [], np.array([1.0])).missing == 0.0


def test_the_queue_is_written_with_its_reasons_and_read_back_in_order(tmp_path):
    rows = queue(
        [
            Row("c", Doubt(0.4, 0.0)),
            Row("b", Doubt(0.4, 0.0), {"CAM": 0.5, "Refined": 0.25}),
            Row('a, "x"', Doubt(0.2, 1.0), {"Refined": 1.0}),
        ]
    )
    save_queue(tmp_path / "review.csv", rows, ["CAM", "Refined"])
    with open(tmp_path / "review.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["id", "doubt", "disagreement", "missing", "IoU CAM", "IoU Refined"]
    assert table[1][0] == 'a, "x"' and table[1][1:] == ["0.6000", "0.2000", "1.0000", "", "100.0"]
    assert table[2][0] == "b" and table[2][4:] == ["50.0", "25.0"]
    assert table[3][0] == "c" and table[3][4:] == ["", ""]
    assert load_queue(tmp_path / "review.csv") == ['a, "x"', "b", "c"]


@pytest.mark.parametrize(
    "content",
    [
        "id,doubt,IoU CAM\na/b,0.9,1\nc,0.1,2\n",
        "id;doubt;IoU CAM\r\na/b;0,9;1,5\r\nc;0,1;2,5\r\n",
        '"id"\t"doubt"\n"a/b"\t0.9\nc\t0.1\n\t\n\n',
        "id,doubt,IoU CAM\na/b,0.9,\nc\n,,\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_queue_that_a_spreadsheet_saved_again(tmp_path, content, encoding):
    (tmp_path / "review.csv").write_bytes(content.encode(encoding))
    assert load_queue(tmp_path / "review.csv") == ["a/b", "c"]


@pytest.mark.parametrize("content", ["", "id,labels\na,cat\n", "id,doubt\n", "id;doubt\n;\n", b"\xff\xfe"])
def test_files_that_are_no_queue(tmp_path, content):
    path = tmp_path / "review.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"review\.csv: "):
        load_queue(path)
    with pytest.raises(UserError, match=r"nowhere\.csv: no such review queue\. Write it with report\.py"):
        load_queue(tmp_path / "nowhere.csv")
