"""Arrays as users have them: there and back, and what is refused."""

import re

import numpy as np
import pytest
import torch

from stablesr.images import from_image, to_image_like

CPU = torch.device("cpu")


def there_and_back(image):
    return to_image_like(from_image(image, CPU), image)


# There


def test_a_numpy_image_has_its_bands_last():
    image = np.array([[[0, 51, 255], [255, 102, 0]]], dtype=np.uint8)  # one row, two columns
    pixels = from_image(image, CPU)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.tensor([[[-1.0, 1.0]], [[-0.6, -0.2]], [[1.0, -1.0]]]))


def test_a_tensor_has_its_bands_first():
    image = torch.tensor([[[0, 255]], [[51, 102]], [[255, 0]]], dtype=torch.uint8)
    torch.testing.assert_close(from_image(image, CPU), torch.tensor([[[-1.0, 1.0]], [[-0.6, -0.2]], [[1.0, -1.0]]]))


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_one_band_is_repeated(kind):
    assert from_image(kind([[0.0, 0.5, 1.0]]), CPU).tolist() == [[[-1.0, 0.0, 1.0]]] * 3


@pytest.mark.parametrize(
    ("dtype", "largest"), [("uint8", 255), ("uint16", 65535), ("float16", 1), ("float32", 1), ("float64", 1)]
)
def test_the_range_of_every_dtype_becomes_minus_one_to_one(dtype, largest):
    image = np.array([[0, largest]], dtype=dtype)
    for same in (image, torch.from_numpy(image)):
        assert from_image(same, CPU).tolist() == [[[-1.0, 1.0]]] * 3


def test_bfloat16_is_taken_from_tensors():
    image = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16)
    assert there_and_back(image).dtype == torch.bfloat16
    assert torch.equal(there_and_back(image), image)


def test_what_autograd_tracks_is_taken_as_it_is():
    assert not from_image(torch.zeros(2, 2, requires_grad=True), CPU).requires_grad


def test_the_image_is_left_alone():
    for image in (np.full((2, 2), 0.25, dtype=np.float32), torch.full((2, 2), 0.25)):
        from_image(image, CPU).zero_()
        assert (image == 0.25).all()


# There and back

ALL_UINT8 = np.arange(256, dtype=np.uint8).reshape(16, 16)
ALL_UINT16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("values", [ALL_UINT8, ALL_UINT16], ids=["uint8", "uint16"])
def test_every_integer_comes_back(values):
    colours = np.stack([values, values[::-1], values.T], axis=-1)
    for image in (values, colours):
        back = there_and_back(image)
        assert (back.dtype, back.shape) == (image.dtype, image.shape)
        assert np.array_equal(back, image)


@pytest.mark.parametrize("values", [ALL_UINT8, ALL_UINT16], ids=["uint8", "uint16"])
def test_every_integer_of_a_tensor_comes_back(values):
    colours = np.stack([values, values[::-1], values.T])
    for image in (torch.from_numpy(values), torch.from_numpy(colours)):
        back = there_and_back(image)
        assert (back.dtype, back.shape) == (image.dtype, image.shape)
        assert np.array_equal(back.numpy(), image.numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["one-band", "colours"])
def test_floats_come_back_as_near_as_float32_has_them(dtype, shape):
    image = np.random.default_rng(0).random(shape).astype(dtype)
    tensor = torch.from_numpy(image if len(shape) == 2 else image.transpose(2, 0, 1).copy())
    for same in (image, tensor):
        back = there_and_back(same)
        assert (back.dtype, back.shape) == (same.dtype, same.shape)
        np.testing.assert_allclose(np.asarray(back), np.asarray(same), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda image: np.flip(image, (0, 1)), id="backwards"),
        pytest.param(lambda image: image[::2, 1:], id="every-other-row"),
        pytest.param(np.asfortranarray, id="columns-first"),
        pytest.param(lambda image: image.astype(image.dtype.newbyteorder(">")), id="big-endian"),
        pytest.param(lambda image: np.lib.stride_tricks.as_strided(image, writeable=False), id="read-only"),
        pytest.param(lambda image: np.broadcast_to(image[:1], image.shape), id="one-row-broadcast"),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_memory_of_any_layout_will_do(change, dtype):
    plain = (np.random.default_rng(0).random((4, 6, 3)) * (1 if dtype == "float32" else 250)).astype(dtype)
    image = change(plain)
    assert torch.equal(from_image(image, CPU), from_image(np.array(image, dtype=dtype, order="C"), CPU))
    back = there_and_back(image)
    assert back.dtype == image.dtype
    np.testing.assert_allclose(back, image, rtol=0, atol=1.2e-7)


def test_tensors_of_any_layout_will_do():
    image = torch.rand(6, 4, 3).permute(2, 0, 1)
    assert not image.is_contiguous()
    assert torch.equal(from_image(image, CPU), from_image(image.contiguous(), CPU))


# Back


def pixels_of(*unit: float) -> torch.Tensor:
    """One pixel (3, 1, 1) from three values within [0, 1]."""
    return torch.tensor(unit).reshape(3, 1, 1) * 2 - 1


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535)])
def test_integers_are_rounded_and_not_truncated(dtype, largest):
    """The reference truncates."""
    pixels = pixels_of(99.4 / largest, 99.6 / largest, (largest - 0.4) / largest)
    back = to_image_like(pixels, np.zeros((1, 1, 3), dtype=dtype))
    assert back.tolist() == [[[99, 100, largest]]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_overshoot_is_clamped(dtype):
    back = to_image_like(pixels_of(-0.3, 0.0, 1.7), np.zeros((1, 1, 3), dtype=dtype))
    largest = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
    assert back.tolist() == [[[0, 0, largest]]]


@pytest.mark.parametrize("like", [np.zeros((1, 1), np.uint8), torch.zeros(1, 1, dtype=torch.uint8)])
def test_one_band_is_the_mean_of_three(like):
    assert to_image_like(pixels_of(0.1, 0.2, 0.6), like).tolist() == [[round(0.3 * 255)]]


def test_one_band_is_the_mean_of_what_was_clamped():
    assert to_image_like(pixels_of(1.6, 1.6, 0.0), np.zeros((1, 1))).item() == pytest.approx(2 / 3)


def test_the_result_may_be_larger_than_the_image_it_is_like():
    pixels = torch.zeros(3, 8, 12)
    assert to_image_like(pixels, np.zeros((2, 3, 3))).shape == (8, 12, 3)
    assert to_image_like(pixels, torch.zeros(3, 2, 3)).shape == (3, 8, 12)
    assert to_image_like(pixels, np.zeros((2, 3))).shape == (8, 12)


def test_a_numpy_result_is_contiguous_and_writeable():
    back = to_image_like(torch.zeros(3, 8, 12), np.zeros((2, 3, 3), dtype=np.uint8))
    assert back.flags.c_contiguous and back.flags.writeable


# Refused


def unit(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, dtype=np.float32)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(np.array([[0.5, np.nan]]), "values from nan to nan", id="nan"),
        pytest.param(np.array([[0.5, np.inf]]), "values from 0.5 to inf", id="infinite"),
        pytest.param(np.array([[0.5, -np.inf]]), "values from -inf to 0.5", id="minus-infinite"),
        pytest.param(np.array([[0.0, 255.0]]), "must lie within [0, 1]; this one has values from 0 to 255", id="0-255"),
        pytest.param(np.array([[-0.5, 0.5]]), "values from -0.5 to 0.5", id="negative"),
        pytest.param(unit(1, 4, 4, 3), "shape (1, 4, 4, 3) is not supported: give (H, W, 3) or (H, W)", id="4-d"),
        pytest.param(unit(4), "shape (4,)", id="1-d"),
        pytest.param(unit(), "shape ()", id="0-d"),
        pytest.param(unit(4, 4, 2), "shape (4, 4, 2)", id="two-bands"),
        pytest.param(unit(4, 4, 4), "shape (4, 4, 4)", id="four-bands"),
        pytest.param(unit(3, 4, 5), "shape (3, 4, 5) is not supported: give (H, W, 3)", id="bands-first"),
        pytest.param(unit(0, 4, 3), "shape (0, 4, 3)", id="no-rows"),
        pytest.param(unit(4, 0), "shape (4, 0)", id="no-columns"),
        pytest.param(unit(4, 4).astype(np.int32), "an image of int32 is not supported", id="int32"),
        pytest.param(unit(4, 4).astype(np.int8), "an image of int8", id="int8"),
        pytest.param(unit(4, 4).astype(bool), "an image of bool", id="bool"),
        pytest.param(unit(4, 4).astype(np.complex64), "an image of complex64", id="complex"),
        pytest.param(unit(4, 4).astype(np.longdouble), f"an image of {np.dtype(np.longdouble).name}", id="longdouble"),
        pytest.param(unit(4, 4).astype(object), "an image of object", id="object"),
        pytest.param(unit(4, 4).astype(str), "an image of str", id="str"),
        pytest.param(np.array([["2020-01-01"]], dtype="datetime64[D]"), "an image of datetime64", id="datetime"),
        pytest.param([[0.5]], "must be a NumPy array or a torch tensor, not list", id="list"),
        pytest.param(None, "not NoneType", id="none"),
        pytest.param(np.float32(0.5), "not float32", id="scalar"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_image(image, CPU)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(torch.tensor([[0.5, torch.nan]]), "values from nan to nan", id="nan"),
        pytest.param(torch.tensor([[0.5, torch.inf]]).half(), "values from 0.5 to inf", id="infinite"),
        pytest.param(torch.full((2, 2), 255.0), "values from 255 to 255", id="0-255"),
        pytest.param(torch.zeros(1, 3, 4, 4), "(1, 3, 4, 4) is not supported: give (3, H, W) or (H, W)", id="4-d"),
        pytest.param(torch.zeros(4, 4, 3), "shape (4, 4, 3)", id="bands-last"),
        pytest.param(torch.zeros(3, 0, 4), "shape (3, 0, 4)", id="no-rows"),
        pytest.param(torch.zeros(4, 4, dtype=torch.int32), "an image of int32", id="int32"),
        pytest.param(torch.zeros(4, 4, dtype=torch.bool), "an image of bool", id="bool"),
        pytest.param(torch.zeros(4, 4, dtype=torch.complex64), "an image of complex64", id="complex"),
    ],
)
def test_what_is_no_image_among_tensors_is_refused_by_name(image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_image(image, CPU)
