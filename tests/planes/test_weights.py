"""PlaneWeight: what it refuses, what it counts, what it names its tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import random_weight

from bitstrata.planes import AffineScales, Codebook, PlaneWeight, decode, group_count, words_per_row
from bitstrata.planes.weights import scales_shapes


def with_plane(weight, index, plane):
    return replace(weight, planes=(*weight.planes[:index], plane, *weight.planes[index + 1 :]))


def with_scales(weight, bits, scales):
    return replace(weight, scales={**weight.scales, bits: scales})


def with_scale(weight, bits, change):
    scales = weight.scales[bits]
    return with_scales(weight, bits, replace(scales, scale=change(scales.scale)))


def with_offset(weight, bits, change):
    scales = weight.scales[bits]
    return with_scales(weight, bits, replace(scales, offset=change(scales.offset)))


AFFINE_FAULTS = {
    "plane-int64": (lambda w: with_plane(w, 1, w.planes[1].long()), "plane_1: expected int32"),
    "plane-too-narrow": (lambda w: with_plane(w, 2, w.planes[2][:, :2]), r"plane_2: expected int32 \(5, 3\)"),
    "plane-too-short": (lambda w: with_plane(w, 3, w.planes[3][:4]), "plane_3: "),
    "plane-one-dimensional": (lambda w: with_plane(w, 3, w.planes[3].flatten()), "plane_3: "),
    "scale-float32": (lambda w: with_scale(w, 3, torch.Tensor.float), "scale_3: expected torch.float16"),
    "scale-bfloat16": (lambda w: with_scale(w, 3, torch.Tensor.bfloat16), "scale_3: expected torch.float16"),
    "scale-of-other-bits": (lambda w: with_scales(w, 4, w.scales[3]), r"scale_4: expected .*\(4, 5, 3\)"),
    "scale-group-missing": (lambda w: with_scale(w, 2, lambda s: s[..., :2]), "scale_2: "),
    "offset-transposed": (lambda w: with_offset(w, 2, torch.t), r"offset_2: expected .*\(5, 3\).*\(3, 5\)"),
    "offset-float32": (lambda w: with_offset(w, 4, torch.Tensor.float), "offset_4: "),
    "group-size-of-another-weight": (lambda w: replace(w, group_size=64), "scale_2: "),
    "in-features-of-another-weight": (lambda w: replace(w, in_features=64), "plane_0: "),
    "plane-missing": (lambda w: replace(w, planes=w.planes[:3]), "bits 4 needs as many planes, got 3"),
    "no-planes": (lambda w: replace(w, planes=()), "at least one plane"),
    "no-scales": (lambda w: replace(w, scales={}), "one set of scales"),
    "group-size-zero": (lambda w: replace(w, group_size=0), "group_size 0"),
    "in-features-zero": (lambda w: replace(w, in_features=0), "in_features 0"),
    "bits-zero": (lambda w: with_scales(w, 0, w.scales[2]), "bits must lie in 1..8"),
    "bits-nine": (lambda w: with_scales(w, 9, w.scales[2]), "bits must lie in 1..8"),
    "nine-planes": (lambda w: replace(w, planes=w.planes[:1] * 9), "bits must lie in 1..8"),
}


@pytest.mark.parametrize("fault", AFFINE_FAULTS)
def test_wrong_shapes_and_dtypes_are_refused_by_name(fault):
    change, message = AFFINE_FAULTS[fault]
    weight = random_weight(5, 70)
    with pytest.raises(ValueError, match=message):
        change(weight)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t[:, :7], id="entry-missing"),
        pytest.param(lambda t: t[:4], id="row-missing"),
        pytest.param(lambda t: t.float(), id="float32"),
    ],
)
def test_wrong_tables_are_refused_by_name(change):
    weight = random_weight(5, 70, kind="codebook")
    with pytest.raises(ValueError, match="table_3: expected"):
        with_scales(weight, 3, Codebook(change(weight.scales[3].table)))


def test_unknown_scales_kind_is_refused():
    with pytest.raises(ValueError, match="unknown scales 'vector'; known: affine, affine8, codebook"):
        scales_shapes("vector", 2, 1, 1, 1)


@pytest.mark.parametrize(
    ("columns", "group_size", "groups"), [(1, 1, 1), (70, 32, 3), (64, 32, 2), (70, 128, 1), (70, 1, 70)]
)
def test_group_count_includes_a_short_last_group(columns, group_size, groups):
    assert group_count(columns, group_size) == groups


@pytest.mark.parametrize(("columns", "words"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (70, 3)])
def test_words_per_row(columns, words):
    assert words_per_row(columns) == words


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.375), (3, 3.5), (4, 4.625)])
@pytest.mark.parametrize("K", [128, 384])
def test_bytes_read_at_group_128_is_the_published_bits_per_weight(K, bits, expected):
    weight = random_weight(6, K, group_size=128)
    assert 8 * weight.bytes_read(bits) / (6 * K) == expected


def test_bytes_read_counts_padding_words_and_only_that_scales():
    affine = random_weight(5, 70, bits=(2, 4), group_size=32)
    assert affine.bytes_read(2) == 2 * 5 * 3 * 4 + (2 + 1) * 5 * 3 * 2
    assert affine.bytes_read(4) == 4 * 5 * 3 * 4 + (4 + 1) * 5 * 3 * 2
    codebook = random_weight(5, 70, bits=(2, 4), kind="codebook")
    assert codebook.bytes_read(2) == 2 * 5 * 3 * 4 + 5 * 2**2 * 2
    with pytest.raises(KeyError):
        affine.bytes_read(3)


@pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])
def test_rows_are_those_rows_and_no_copy(scales, seed):
    weight = random_weight(9, 70, (2, 4), 43, scales, seed)
    part = weight.outputs(2, 7)
    assert (part.out_features, part.bits, part.group_size) == (5, (2, 4), 43)
    assert part.planes[1].data_ptr() == weight.planes[1][2].data_ptr()
    for bits in (2, 4):
        assert torch.equal(decode(part, bits), decode(weight, bits)[2:7])


def test_tensors_carry_the_names_of_the_checkpoint():
    planes = ["plane_0", "plane_1", "plane_2", "plane_3"]
    assert list(random_weight(2, 33, bits=(2, 4)).tensors()) == [*planes, "scale_2", "offset_2", "scale_4", "offset_4"]
    assert list(random_weight(2, 33, bits=(2, 4), kind="codebook").tensors()) == [*planes, "table_2", "table_4"]


def test_tensors_are_not_copied():
    weight = random_weight(2, 33, bits=(2,))
    named = weight.tensors()
    assert named["plane_1"] is weight.planes[1]
    assert named["scale_2"] is weight.scales[2].scale


def test_bits_and_features_are_read_off_the_tensors():
    weight = random_weight(5, 70, bits=(4, 2))
    assert (weight.bits, weight.out_features, weight.in_features) == ((2, 4), 5, 70)
    assert weight.kind == "affine"
    assert random_weight(5, 70, kind="codebook").kind == "codebook"


def test_a_decoder_alone_needs_no_model():
    scales = AffineScales(torch.ones(1, 2, 1).half(), torch.zeros(2, 1).half())
    weight = PlaneWeight((torch.zeros(2, 1, dtype=torch.int32),), {1: scales}, 7, 7)
    assert weight.bytes_read(1) == 16
