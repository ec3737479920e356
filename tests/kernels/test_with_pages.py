"""A weight that grows and shrinks by pages is the one that would be packed at once; planes that stay are shared."""

from __future__ import annotations

import pytest
from helpers import assert_same_weight, random_weight

from bitstrata.kernels import pack, registry
from bitstrata.kernels.cpu import missing
from bitstrata.planes import PlaneWeight

BITS = tuple(range(1, 9))
LAYOUTS = [
    pytest.param("", marks=pytest.mark.skipif(bool(missing), reason="the native kernels are not built"), id="blocked"),
    pytest.param("triton", id="tiled"),
    pytest.param("reference", id="stored"),
]
DECODERS = ["affine", "affine8", "codebook"]


@pytest.fixture(params=LAYOUTS)
def first(request, monkeypatch):
    """first(weight, bits) -> what a module that gets its first pages holds, in a kernel's layout."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(registry.ENVIRONMENT, request.param)

    def make(weight, bits):
        made = pack(only(weight, bits), apart=True)
        assert made.layout == {"": "blocked", "triton": "tiled", "reference": "stored"}[request.param]
        return made

    return make


def only(weight, bits):
    """What of `weight` a plan at `bits` holds."""
    return PlaneWeight(weight.planes[:bits], {bits: weight.scales[bits]}, weight.in_features, weight.group_size)


@pytest.mark.parametrize("scales", DECODERS)
@pytest.mark.parametrize(("N", "K", "group"), [(33, 70, 32), (16, 128, 128), (50, 300, 43)])
def test_any_way_to_a_size_gives_the_same_weight(scales, N, K, group, first, seed):
    weight = random_weight(N, K, BITS, group, scales, seed)
    held = first(weight, 3)
    for bits in (3, 8, 5, 1, 6, 2):
        have = len(held.planes)
        held = held.with_pages(bits, weight.planes[have:bits], weight.scales[bits])
        assert held.bits == (bits,)
        assert_same_weight(held.stored(), only(weight, bits))


def test_planes_that_stay_are_shared_and_the_old_weight_is_left_alone(first, seed):
    weight = random_weight(40, 256, BITS, 64, "affine", seed)
    small = first(weight, 3)
    large = small.with_pages(5, weight.planes[3:5], weight.scales[5])
    assert [plane.data_ptr() for plane in large.planes[:3]] == [plane.data_ptr() for plane in small.planes]
    assert_same_weight(small.stored(), only(weight, 3))


@pytest.mark.parametrize("scales", DECODERS)
def test_pages_that_do_not_fit_are_refused(scales, first, seed):
    weight = random_weight(40, 256, BITS, 64, scales, seed)
    other = random_weight(40, 256, BITS, 64, "codebook" if scales != "codebook" else "affine", seed)
    wide = random_weight(40, 320, BITS, 64, scales, seed)
    held = first(weight, 3)
    for planes, given in (
        ((), weight.scales[5]),
        (weight.planes[3:6], weight.scales[5]),
        (wide.planes[3:5], weight.scales[5]),
        (tuple(plane.long() for plane in weight.planes[3:5]), weight.scales[5]),
        (weight.planes[3:5], wide.scales[5] if scales != "codebook" else weight.scales[4]),
        (weight.planes[3:5], weight.scales[4]),
        (weight.planes[3:5], other.scales[5]),
    ):
        with pytest.raises(ValueError, match=r"planes|expected|cannot have"):
            held.with_pages(5, planes, given)


def test_bytes_and_halves_are_not_mixed_up(first, seed):
    """Up to 4 bits an affine8 weight has bytes; scales of halves there would be read beyond its end."""
    bytes_, halves = (random_weight(40, 256, BITS, 64, kind, seed) for kind in ("affine8", "affine"))
    held = first(bytes_, 2)
    with pytest.raises(ValueError, match="cannot have"):
        held.with_pages(3, bytes_.planes[2:3], halves.scales[3])
    assert held.with_pages(5, bytes_.planes[2:5], halves.scales[5]).bits == (5,)
