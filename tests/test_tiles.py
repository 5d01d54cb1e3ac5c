"""Blended tiles against the plain weighted mean, and against a network that looks at single pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.tiles import Rows, blended_strips, windows

SIZES = [(81, 113), (37, 200), (32, 33), (33, 32), (65, 64), (20, 90), (1, 70)]


def pixelwise(images):
    """Three probabilities of each pixel, from its colour alone."""
    return (images.float() / 64).sin().softmax(dim=1)


def photograph_of(size):
    return torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def strips(predict, photograph, tile):
    """`blended_strips` of a function of tiles, not of places. The rows of the strips follow one another, to the end."""
    size = tuple(photograph.shape[-2:])
    rows, maps = zip(*blended_strips(lambda place: predict(photograph[(..., *place)]), size, tile), strict=True)
    starts = [*windows(size[0], tile)[0], size[0]]
    assert list(rows) == [slice(start, end) for start, end in zip(starts, starts[1:], strict=False)]
    assert [len(range(size[0])[each]) for each in rows] == [strip.shape[-2] for strip in maps]
    return maps


def plain(predict, photograph, tile):
    """The weighted mean, pixel by pixel of each tile."""
    height, width = photograph.shape[-2:]
    total, weights = 0, torch.zeros(height, width)
    side = [min(tile, length) for length in (height, width)]
    for top in windows(height, tile)[0]:
        for left in windows(width, tile)[0]:
            maps = predict(photograph[..., top : top + side[0], left : left + side[1]])
            part, weight = torch.zeros(1, maps.shape[1], height, width), torch.zeros(height, width)
            for y in range(side[0]):
                for x in range(side[1]):
                    value = min(y + 1, side[0] - y) * min(x + 1, side[1] - x)
                    weight[top + y, left + x] = value
                    part[0, :, top + y, left + x] = value * maps[0, :, y, x]
            total, weights = total + part, weights + weight
    return total / weights


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 150))
def test_weights_add_up_to_one_at_every_pixel(length, tile):
    starts, weights = windows(length, tile)
    side = min(length, tile)
    assert weights.shape == (len(starts), side) and starts[0] == 0 and starts[-1] == length - side
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + side] += weight
    torch.testing.assert_close(total, torch.ones(length))
    overlaps = [a + side - b for a, b in zip(starts, starts[1:], strict=False)]
    assert all(overlap >= side // 4 for overlap in overlaps)
    assert len(starts) == 1 or len(starts) == 1 + -(-(length - side) // (side - side // 4))  # no tile too many


@pytest.mark.parametrize("size", SIZES)
def test_a_network_of_single_pixels_gives_the_same_maps_with_and_without_tiles(size):
    photograph = photograph_of(size)
    maps = torch.cat(strips(pixelwise, photograph, 32), dim=2)
    torch.testing.assert_close(maps, pixelwise(photograph), atol=1e-6, rtol=0)
    assert torch.equal(maps.argmax(dim=1), pixelwise(photograph).argmax(dim=1))


@pytest.mark.parametrize("size, tile", [((21, 30), 12), ((13, 12), 12), ((9, 25), 12), ((8, 8), 12)])
def test_tiles_that_disagree_are_averaged_with_weights_that_fall_to_their_ends(size, tile):
    calls = []

    def predict(part):
        """What is not the same for two tiles at one pixel: a number of each call, and the place in the tile."""
        calls.append(len(calls) % 7)
        place = torch.arange(part.shape[-2])[:, None] * torch.arange(part.shape[-1])
        return torch.stack([place.float(), torch.full(place.shape, float(calls[-1]))])[None]

    photograph = photograph_of(size)
    maps = torch.cat(strips(predict, photograph, tile), dim=2)
    calls.clear()
    torch.testing.assert_close(maps, plain(predict, photograph, tile), atol=1e-4, rtol=1e-5)


def test_there_is_no_seam_between_tiles():
    """Of two tiles, all 0 and all 1, the mean changes by little from pixel to pixel."""
    values = iter([0.0, 1.0])
    (strip,) = strips(lambda part: torch.full((1, 1, *part.shape[-2:]), next(values)), photograph_of((8, 56)), 32)
    steps = strip[0, 0, 0].diff()
    assert strip[0, 0, 0, 0] == 0 and strip[0, 0, 0, -1] == 1
    assert steps.min() >= -1e-6 and steps.max() <= 0.13


@pytest.mark.parametrize("size, tile", [((81, 50), 32), ((33, 40), 32), ((20, 40), 32), ((70, 9), 12)])
def test_strips_are_one_map_to_a_second_pass_over_the_tiles(size, tile):
    photograph, places = photograph_of(size), []
    whole = pixelwise(photograph)
    rows = Rows(blended_strips(lambda place: pixelwise(photograph[(..., *place)]), size, tile))

    def again(place):
        places.append(place)
        torch.testing.assert_close(rows[place], whole[(..., *place)], atol=1e-6, rtol=0)
        assert rows._kept.shape[-2] <= 2 * tile
        return rows[place]

    maps = torch.cat([strip for _, strip in blended_strips(again, size, tile)], dim=2)
    torch.testing.assert_close(maps, whole, atol=1e-6, rtol=0)
    assert len(places) == len(windows(size[0], tile)[0]) * len(windows(size[1], tile)[0])
