"""Image files of every kind become the right pixels, and views are CLIP's, at random but repeatable."""

from __future__ import annotations

import io
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from copra_llm.errors import InputError
from copra_llm.pictures import (
    RATIO,
    SCALE,
    PictureCache,
    decode,
    eval_view,
    needed_side,
    normalise,
    random_box,
    reduced,
    train_view,
    view_rng,
    whole_view,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = PIXELS[:, :, 0]


def written(folder, image: Image.Image, name: str, **options):
    path = folder / name
    image.save(path, **options)
    return path


def grey(pixels) -> np.ndarray:
    return np.repeat(np.asarray(pixels, dtype=np.uint8)[:, :, None], 3, axis=2)


def test_colours_and_grey(tmp_path):
    """What has eight bits comes out as it is; one channel is repeated, a single bit is 0 or 255."""
    assert np.array_equal(decode(written(tmp_path, Image.fromarray(PIXELS), "rgb.png")), PIXELS)
    assert np.array_equal(decode(written(tmp_path, Image.fromarray(GREY), "grey.png")), grey(GREY))
    bits = Image.fromarray(GREY).convert("1")
    assert np.array_equal(decode(written(tmp_path, bits, "bits.png")), grey(np.asarray(bits) * 255))


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    """65535 is white, not 255 and above, as a plain conversion would have it."""
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    expected = grey(np.round(deep / 257))
    assert expected.max() == 255 and expected[0, 2, 0] == 1
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(decode(written(tmp_path, Image.fromarray(deep), name)), expected)


def test_a_palette_is_looked_up_and_what_is_transparent_shows(tmp_path, recwarn):
    colours = Image.fromarray(PIXELS).quantize(8)
    assert np.array_equal(decode(written(tmp_path, colours, "palette.png")), np.asarray(colours.convert("RGB")))
    path = written(tmp_path, colours, "see-through.png", transparency=bytes([0, 100] + [255] * 6))
    assert np.array_equal(decode(path), np.asarray(colours.convert("RGB")))
    rgba = np.dstack([PIXELS, np.full((5, 7), 3, dtype=np.uint8)])
    assert np.array_equal(decode(written(tmp_path, Image.fromarray(rgba), "alpha.png")), PIXELS)
    assert not recwarn.list


def test_cmyk_is_printed_colour(tmp_path):
    """No ink is white, full cyan has no red; losslessly, so that the values can be told."""
    inks = np.zeros((1, 3, 4), dtype=np.uint8)
    inks[0, 1] = (255, 0, 0, 0)
    inks[0, 2] = (0, 0, 0, 255)
    path = written(tmp_path, Image.fromarray(inks, mode="CMYK"), "cmyk.tif")
    assert decode(path)[0].tolist() == [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    jpeg = written(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "cmyk.jpg", quality=100)
    # Adobe stores inks the other way round; JPEG itself may be off by some levels.
    assert np.abs(decode(jpeg).astype(int) - (0, 255, 255)).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_carried_out(tmp_path, orientation):
    """The eight orientations of EXIF, by their definition: where row 0 and column 0 of the file belong."""
    upright = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1), 6: np.rot90(PIXELS, -1), 7: PIXELS[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(PIXELS),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(tmp_path, Image.fromarray(PIXELS), "turned.png", exif=exif)
    assert np.array_equal(decode(path), upright[orientation])


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    for name in ("moving.gif", "moving.webp"):
        path = written(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(path)[0, 0].tolist() == [255, 0, 0]


def test_one_pixel_and_lines_of_one_pixel_have_views():
    """Also a strip that would not fit into memory when it is resized as a whole."""
    for shape in ((1, 1), (1, 9), (9, 1), (1, 200_000), (200_000, 1)):
        image = np.full((*shape, 3), 77, dtype=np.uint8)
        assert (eval_view(image, 32) == 77).all() and eval_view(image, 32).shape == (32, 32, 3)
        for position in range(3):
            view = train_view(image, 32, view_rng(0, 0, position))
            assert (view == 77).all() and view.shape == (32, 32, 3)


def broken_files(folder):
    whole = io.BytesIO()
    Image.fromarray(PIXELS).resize((64, 64)).save(whole, "JPEG")
    floats = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(floats, "TIFF")
    contents = {"cut.jpg": whole.getvalue()[:300], "empty.png": b"", "text.jpg": b"<html>404</html>"}
    contents["floats.tif"] = floats.getvalue()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / "absent.jpg", *(folder / name for name in contents)]


def test_what_cannot_be_read_is_named(tmp_path):
    """One sentence with the file and the remedy."""
    for path in broken_files(tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path)) + ".*; (replace|put|store)"):
            decode(path)


def test_bytes_that_are_no_file_are_read_too():
    class Row:
        def __init__(self, content):
            self.content = content

        def read(self):
            return self.content

        def __str__(self):
            return "owner/name, train, row 3"

    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    assert np.array_equal(decode(Row(file.getvalue())), PIXELS)
    with pytest.raises(InputError, match="owner/name, train, row 3"):
        decode(Row(b"nothing"))


@pytest.mark.parametrize("shape", [(50, 80), (81, 40), (30, 33), (224, 224), (32, 32), (300, 301)])
def test_the_view_for_evaluation_is_clips(shape):
    """Exactly what transformers' own processor gives: the same Pillow resize, the same corner."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    views = torch.from_numpy(eval_view(image, 32).copy())[None]
    ours = normalise(views, theirs.image_mean, theirs.image_std)
    expected = torch.as_tensor(np.asarray(theirs(Image.fromarray(image))["pixel_values"][0]))
    # Division by 255 and multiplication with 1/255 may differ in float32's last bit, times 1 / std < 4.
    torch.testing.assert_close(ours[0], expected, atol=4 * 2**-23, rtol=2**-23)


@pytest.mark.parametrize("shape", [(50, 80), (81, 40), (32, 32), (300, 301)])
def test_the_whole_view_is_siglips(shape):
    """Exactly what transformers' own processor gives: both sides resized, nothing cut off."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    ours = normalise(torch.from_numpy(whole_view(image, 32).copy())[None], theirs.image_mean, theirs.image_std)
    expected = torch.as_tensor(np.asarray(theirs(Image.fromarray(image))["pixel_values"][0]))
    torch.testing.assert_close(ours[0], expected, atol=4 * 2**-23, rtol=2**-23)  # as above


def test_a_part_is_uniform_in_area_and_log_aspect():
    """Moments of the law, on an image that most parts fit into; pure in the generator's key."""
    boxes = np.array([random_box(1000, 1000, view_rng(0, m, 0)) for m in range(4000)])
    top, left, height, width = boxes.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 1000) & (left + width <= 1000)).all()
    area, aspect = height * width / 1e6, np.log(width / height)
    # Sides are rounded to whole pixels of 1000.
    assert SCALE[0] - 0.002 < area.min() and area.max() <= 1
    assert np.abs(aspect).max() <= math.log(RATIO[1]) + 0.01
    # Symmetric by turning the image; five standard errors.
    assert abs(aspect.mean()) < 5 * aspect.std() / math.sqrt(len(boxes))
    # Large parts are refused where their aspect does not fit, so the mean is below 0.54 but not by much.
    assert 0.45 < area.mean() < 0.54


def test_a_part_that_nothing_fits_is_the_middle():
    assert random_box(10, 1000, view_rng(0, 0, 0)) == (0, 493, 10, 13)
    assert random_box(1000, 10, view_rng(0, 0, 0)) == (493, 0, 13, 10)


def test_views_are_pure_in_seed_batch_and_position():
    """The same numbers, the same view; another of any, another view. Both ways round are seen."""
    image = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    views = [train_view(image, 16, view_rng(*key)) for key in keys]
    again = [train_view(image, 16, view_rng(*key)) for key in reversed(keys)]
    assert all(np.array_equal(a, b) for a, b in zip(views, reversed(again), strict=True))
    assert len({view.tobytes() for view in views}) == len(keys)


def test_half_of_the_views_are_flipped():
    """On a picture that is dark on the left, a view that is darker on the right is a flipped one."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    views = [train_view(np.ascontiguousarray(ramp), 8, view_rng(0, m, 0)).astype(int) for m in range(400)]
    flipped = sum(view[0, 0, 0] > view[0, -1, 0] for view in views)
    # Binomial: standard deviation 10.
    assert abs(flipped - 200) < 50


def test_golden_view():
    """What a seed means must not change with a version: runs would no longer resume to themselves."""
    assert random_box(375, 500, view_rng(7, 11, 3)) == (5, 49, 326, 401)


@pytest.fixture
def files(tmp_path):
    images = [RNG.integers(0, 256, (20, 30 + i, 3), dtype=np.uint8) for i in range(5)]
    return [written(tmp_path, Image.fromarray(image), f"{i}.png") for i, image in enumerate(images)]


@pytest.mark.parametrize("limit", [0, 4000, 10**6])
@pytest.mark.parametrize("side", [None, 10])
def test_the_limit_changes_no_pixel(files, limit, side):
    """What is kept and what is decoded anew are the same, filled ahead or not; the limit holds."""
    prepare = None if side is None else partial(reduced, side=side)
    plain, filled = PictureCache(0, prepare), PictureCache(limit, prepare)
    filled.fill(files, threads=2)
    for _ in range(2):
        for file in files:
            assert np.array_equal(filled[file], plain[file])
    assert filled.kept_bytes <= limit and len(plain) == 0
    assert min(plain[files[0]].shape[:2]) == (side or 20)
    expected = {0: 0, 4000: 2 if side is None else 5, 10**6: 5}
    assert len(filled) == expected[limit]


def test_what_is_kept_is_not_read_again(files):
    cache = PictureCache(10**6)
    cache.fill(files)
    for file in files:
        file.unlink()
    assert cache[files[0]].shape == (20, 30, 3)


def test_a_broken_file_stops_filling(files):
    files[3].write_bytes(b"")
    with pytest.raises(InputError, match=re.escape(str(files[3]))):
        PictureCache(10**6).fill(files, threads=2)


def test_reducing_takes_nothing_from_a_view(files):
    """Small images stay as they are; no training view is drawn from fewer pixels than it has."""
    image = decode(files[0])
    assert reduced(image, 20) is image
    assert math.isqrt(int(SCALE[0] * needed_side(224) ** 2)) >= 224
