"""BlockedWeight: the stored weight in another order, never anything else."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import assert_same_weight, random_weight
from hypothesis import given
from hypothesis import strategies as st
from randomness import examples

from bitstrata.kernels import pack, registry
from bitstrata.kernels.cpu import BlockedWeight, missing
from bitstrata.planes import PlaneWeight
from bitstrata.planes.weights import make_scales, map_scales, scales_shapes

pytestmark = pytest.mark.skipif(bool(missing), reason="the native kernels are not built")


@pytest.fixture(autouse=True)
def not_forced(monkeypatch):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)


scales = pytest.mark.parametrize("scales", ["affine", "affine8", "codebook"])


def any_bits(shape, dtype, generator):
    """A tensor whose memory holds every pattern, NaN with payloads included."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


@st.composite
def weights(draw):
    """Any weight, its fp16 numbers of any bits; the bits beyond K in a plane's last word are 0."""
    N, K, group_size = draw(st.integers(1, 50)), draw(st.integers(1, 300)), draw(st.integers(1, 320))
    bits = sorted(draw(st.sets(st.integers(1, 8), min_size=1)))
    kind = draw(st.sampled_from(["affine", "affine8", "codebook"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = random_weight(N, K, bits, group_size, kind, draw(st.integers(0, 2**31)))
    made = {}
    for value in bits:
        shapes = scales_shapes(kind, value, N, K, group_size).items()
        tensors = {
            name: weight.tensors()[name] if name.startswith("unit") else any_bits(shape, dtype, generator)
            for name, (dtype, shape) in shapes
        }
        made[value] = make_scales(kind, value, tensors)
    return replace(weight, scales=made)


def as_integers(weight):
    return {name: tensor.view(torch.int8) for name, tensor in weight.tensors().items() if "plane" not in name}


@examples(200)
@given(weight=weights(), threads=st.sampled_from([1, 3]))
def test_unpack_gives_back_what_was_packed_bit_for_bit(weight, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = pack(weight)
        found = packed.stored()
    finally:
        torch.set_num_threads(before)
    assert (found.in_features, found.group_size, found.bits) == (weight.in_features, weight.group_size, weight.bits)
    assert (packed.out_features, packed.bits, packed.kind) == (
        weight.out_features,
        weight.bits,
        weight.kind,
    )
    for name, tensor in as_integers(weight).items():
        assert torch.equal(as_integers(found)[name], tensor), name
    for plane, expected in zip(found.planes, weight.planes, strict=True):
        assert torch.equal(plane, expected)


@scales
def test_packing_leaves_the_weight_alone_and_shares_nothing_with_it(scales, seed):
    weight = random_weight(19, 70, kind=scales, seed=seed)
    packed = pack(weight)
    unpacked = packed.stored()
    assert_same_weight(weight, random_weight(19, 70, kind=scales, seed=seed))
    for tensor in unpacked.tensors().values():
        tensor.zero_()
    for tensor in weight.tensors().values():
        tensor.zero_()
    assert_same_weight(packed.stored(), random_weight(19, 70, kind=scales, seed=seed))


@scales
def test_packing_takes_views(scales, seed):
    """Rows of a larger weight, and tensors that are not contiguous."""
    whole = random_weight(40, 70, kind=scales, seed=seed)
    part = whole.outputs(3, 22)
    assert_same_weight(pack(part).stored(), part)
    strided = replace(
        part,
        planes=tuple(plane.t().contiguous().t() for plane in part.planes),
        scales={bits: map_scales(d, lambda t, dim: torch.stack([t, t], -1)[..., 0]) for bits, d in part.scales.items()},
    )
    assert not strided.planes[0].is_contiguous()
    assert_same_weight(pack(strided).stored(), part)


@scales
def test_padding_is_zero(scales, seed):
    """Else two copies of one weight would differ."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        first = pack(random_weight(19, 70, kind=scales, seed=seed))
    finally:
        torch.use_deterministic_algorithms(False)
    second = pack(first.stored())
    for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
        assert torch.equal(a, b)
        assert not (a.float() if a.dtype == torch.float16 else a).isnan().any()


def tensors_of(packed):
    return [*packed.planes, *packed.scales.values()]


def test_scales_of_both_kinds_are_refused():
    affine, codebook = random_weight(5, 70), random_weight(5, 70, kind="codebook")
    mixed = PlaneWeight(affine.planes, {2: affine.scales[2], 3: codebook.scales[3]}, 70, 32)
    with pytest.raises(ValueError, match="affine and codebook scales cannot be packed"):
        pack(mixed)


def halved(tensor):
    return torch.cat([tensor, tensor])[::2]


FAULTS = {
    "dtype": (lambda t: t.view(torch.int16), "contiguous entries of"),
    "size": (lambda t: t[:-1], "expected [0-9]+ contiguous entries"),
    "empty": (lambda t: t[:0], "expected [0-9]+ contiguous entries"),
    "larger": (lambda t: torch.cat([t, t]), "expected [0-9]+ contiguous entries"),
    "not-contiguous": (halved, "contiguous entries"),
    "device": (lambda t: t.to("meta"), "on the CPU, got .* on meta"),
}


@scales
@pytest.mark.parametrize("part", ["plane", "scales"])
@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_refused(scales, part, fault):
    """The native code gets addresses only, and could not notice."""
    packed = pack(random_weight(19, 70, kind=scales))
    change, message = FAULTS[fault]
    planes, made = packed.planes, dict(packed.scales)
    if part == "plane":
        planes = (planes[0], change(planes[1]), *planes[2:])
    else:
        made[3] = change(made[3])
    with pytest.raises(ValueError, match=f"{'plane 1' if part == 'plane' else 'scales for 3 bits'}: .*{message}"):
        BlockedWeight(planes, made, 19, 70, 32, scales, packed.kernel)


def test_a_weight_is_refused_whose_shape_is_not_that_of_its_tensors():
    packed = pack(random_weight(19, 70))
    for shape in ((70, 70, 32), (19, 300, 32), (19, 70, 8)):
        with pytest.raises(ValueError, match="contiguous entries"):
            BlockedWeight(packed.planes, packed.scales, *shape, "affine", packed.kernel)
    for shape in ((0, 70, 32), (19, 0, 32), (19, 70, 0)):
        with pytest.raises(ValueError, match="cannot be empty"):
            BlockedWeight(packed.planes, packed.scales, *shape, "affine", packed.kernel)
    with pytest.raises(ValueError, match="need as many planes"):
        BlockedWeight(packed.planes[:3], packed.scales, 19, 70, 32, "affine", packed.kernel)
    with pytest.raises(IndexError, match="planes are numbered 0 to 7"):
        BlockedWeight(packed.planes[:1] * 9, packed.scales, 19, 70, 32, "affine", packed.kernel)


def through_pickle(packed):
    return pickle.loads(pickle.dumps(packed))


def through_torch(packed):
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def result(packed, x):
    return packed.linear(x, 3)


@scales
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch], ids=lambda f: f.__name__)
def test_copies_work_and_outlive_the_original(scales, copied, seed):
    weight = random_weight(19, 70, kind=scales, seed=seed)
    packed, x = pack(weight), torch.randn(2, 70)
    expected = result(packed, x)
    twin = copied(packed)
    if copied is not copy.copy:
        assert not {t.data_ptr() for t in tensors_of(packed)} & {t.data_ptr() for t in tensors_of(twin)}
        for tensor in tensors_of(packed):
            tensor.zero_()
    del packed
    assert torch.equal(result(twin, x), expected)
    assert_same_weight(twin.stored(), weight)


def test_a_pickle_holds_every_tensor_once():
    packed = pack(random_weight(64, 512))
    size = sum(tensor.nbytes for tensor in tensors_of(packed))
    assert len(pickle.dumps(packed)) < 1.2 * size + 4096


@scales
def test_bytes_read_counts_the_planes_of_the_prefix_and_one_scales(scales):
    weight = random_weight(32, 256, kind=scales)
    packed = pack(weight)
    wider = 2 * 32 if scales == "affine8" else 0  # units become fp32
    for bits in weight.bits:  # nothing is padded at this shape
        assert packed.bytes_read(bits) == weight.bytes_read(bits) + wider
    odd = random_weight(19, 70, kind=scales)
    padded = pack(odd)
    for bits in odd.bits:
        used = [*padded.planes[:bits], padded.scales[bits]]
        assert padded.bytes_read(bits) == sum(tensor.nbytes for tensor in used) > odd.bytes_read(bits)


def test_padding_stays_small_for_the_shapes_of_models():
    for shape, group_size in (((64, 1024), 128), ((48, 1024), 64), ((64, 960), 32)):
        weight = random_weight(*shape, group_size=group_size)
        assert pack(weight).bytes_read(4) <= 1.07 * weight.bytes_read(4)


@scales
def test_torchs_default_device_does_not_matter(scales, seed):
    weight = random_weight(35, 70, (2, 4), 32, scales, seed)
    x = torch.randn(20, 70, generator=torch.Generator().manual_seed(seed))
    bits = torch.full((20,), 4)
    index = torch.tensor([3, 34])

    def everything():
        packed = pack(weight)
        ys = [packed.linear(x[:3], 4), packed.linear(x, 2), packed.linear(x, bits)]
        return packed.stored(), [*ys, packed.lookup(index, 4, x.dtype)]

    _, expected = everything()
    with torch.device("meta"):
        stored, results = everything()
    assert_same_weight(stored, weight)
    for y, wanted in zip(results, expected, strict=True):
        assert torch.equal(y, wanted)
