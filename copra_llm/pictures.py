"""How does an image file become the square that a vision tower sees?

    decode        file -> (height, width, 3), 8 bits, sRGB as stored; upright, first frame
    train_view    random resized crop (area 0.08 to 1 of the image, aspect 3/4 to 4/3) and a flip at even odds
    eval_view     shorter side to `size`, centre crop
    normalise     (x / 255 - mean) / std

All resizing is Pillow's bicubic, with which CLIP was trained. A view for training is a pure function of (seed,
micro-batch, position), so a resumed run sees what an uninterrupted one would have seen.

Source: CLIP (Radford et al. 2021, arXiv 2103.00020), its published preprocessing; CLIP-LoRA (arXiv 2405.18541) and
torchvision's RandomResizedCrop for training.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from copra_llm.errors import InputError

if TYPE_CHECKING:
    import torch

SCALE = (0.08, 1.0)
"""Share of an image's area that a training view shows."""
RATIO = (3 / 4, 4 / 3)
"""Width to height of what it shows."""
LONGEST = 50
"""Shorter sides that the longer one may have: of a longer strip, resized whole for its middle, memory would run out."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow's readers raise for broken files."""


class Stored(Protocol):
    """An image file's bytes that are no file of their own; `str` names the place."""

    def read(self) -> bytes: ...


def decode(source: Path | Stored) -> np.ndarray:
    """The image of a file, or of a file's bytes.

    Greyscale is repeated over the colours, 16 bits are rounded to 8, CMYK and palettes become RGB, what is under a
    transparent pixel shows, EXIF's rotation is carried out, and of an animation the first frame counts.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        InputError: if the file is missing, cut off, no image, or has pixels whose range nothing says (floats).
    """
    return np.asarray(as_rgb(open_image(source), source))


def open_image(source: Path | Stored) -> Image.Image:
    """The file as Pillow sees it, in its own mode, read to its end.

    Raises:
        InputError: if it is missing, cut off, or no image.
    """
    file = source if isinstance(source, Path) else io.BytesIO(source.read())
    try:
        image = Image.open(file)
        image.load()
    except FileNotFoundError:
        raise InputError(f"{source} does not exist; put the image there or leave it out") from None
    except UnidentifiedImageError:
        raise InputError(f"{source} is no image that Pillow knows; replace it or leave it out") from None
    except UNREADABLE as error:
        raise InputError(f"{source} cannot be read as an image ({error}); replace it or leave it out") from None
    return image


def as_rgb(image: Image.Image, source: Path | Stored) -> Image.Image:
    """The image upright, in mode RGB.

    Raises:
        InputError: for pixels whose range nothing says; the message names `source`.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode, source))
    elif image.mode == "P" and "transparency" in image.info:
        # Straight to RGB Pillow warns; the colours are the same.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray, mode: str, source: Path | Stored) -> np.ndarray:
    """Grey values of 0 to 65535 as 0 to 255."""
    if mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{source} has pixels of mode {mode} beyond 0 to 65535; store it with 8 or 16 bits")
    return np.round(pixels / 257).astype(np.uint8)


def view_rng(seed: int, micro_batch: int, position: int) -> np.random.Generator:
    """The random numbers of one view: of the example at `position` of a micro-batch.

    Counter word 2 is 3, where batches have 1 and 2, masks 0 and shots 5: with equal seeds the streams differ.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, micro_batch, 3, position]))


def train_view(
    image: np.ndarray, size: int, rng: np.random.Generator, scale: tuple[float, float] = SCALE
) -> np.ndarray:
    """A random part of the image, flipped at even odds.

    Args:
        image: uint8 `(height, width, 3)`.
        size: of the view, pixels.
        rng: from `view_rng`.
        scale: least and greatest share of the image's area.

    Returns:
        uint8 `(size, size, 3)`.
    """
    top, left, height, width = random_box(*image.shape[:2], rng, scale)
    part = Image.fromarray(image[top : top + height, left : left + width])
    view = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
    return view[:, ::-1] if rng.random() < 0.5 else view


def random_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float] = SCALE
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part: area uniform in `scale`, log of the aspect uniform in `RATIO`.

    Ten tries; if none fits into the image, the middle, as wide or high as `RATIO` allows.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def eval_view(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of the image, its shorter side resized to `size`.

    Args:
        image: uint8 `(height, width, 3)`.
        size: of the view, pixels.

    Returns:
        uint8 `(size, size, 3)`.
    """
    longest = LONGEST * min(image.shape[:2])
    resized = shorter_side(_middle(image, longest, longest), size)
    return _middle(resized, size, size)


def whole_view(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image, squeezed into a square; arguments and result as of `eval_view`."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of the image, at most so high and wide."""
    top, left = (max(0, have - want) // 2 for have, want in zip(image.shape, (height, width), strict=False))
    return image[top : top + height, left : left + width]


def shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """The image with its shorter side of `size` pixels, the longer one rounded down."""
    height, width = image.shape[:2]
    short = min(height, width)
    if short == size:
        return image
    new = (int(size * width / short), int(size * height / short))
    return np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC))


def normalise(views: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Views as a vision tower takes them, on the device where they are.

    Args:
        views: uint8 `(n, size, size, 3)`.
        mean: of each colour, on a scale of 0 to 1 (the model's preprocessor_config).
        std: likewise.

    Returns:
        float32 `(n, 3, size, size)`.
    """
    # The bytes are put in order first: there are four times fewer of them than of the numbers.
    pixels = views.permute(0, 3, 1, 2).contiguous().float().div_(255)
    return pixels.sub_(pixels.new_tensor(mean)[:, None, None]).div_(pixels.new_tensor(std)[:, None, None])


def needed_side(size: int) -> int:
    """The shorter side, in pixels, from which on no training view of `size` is drawn from fewer pixels than it has."""
    return math.ceil(size / math.sqrt(SCALE[0]))


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """The image with its shorter side of at most `side` pixels."""
    return shorter_side(image, side) if min(image.shape[:2]) > side else image


class PictureCache:
    """Decoded images, kept in memory up to a limit.

    Whether an image is kept changes how long it takes, never what it is. `fill` decodes ahead, in threads (Pillow
    lets go of the interpreter while it decodes); worker processes that are forked afterwards share what was filled.
    """

    def __init__(self, limit_bytes: int, prepare: Callable[[np.ndarray], np.ndarray] | None = None):
        """
        Args:
            limit_bytes: of pixels that are kept; 0: every image is decoded anew each time.
            prepare: what is given, and kept, of a decoded image: a `reduced` one for training, the view itself for
                evaluation; None: all of it.
        """
        self.limit_bytes, self.prepare = limit_bytes, prepare
        self.kept_bytes = 0
        self._kept: dict[Path | Stored, np.ndarray] = {}

    def __getitem__(self, source: Path | Stored) -> np.ndarray:
        """uint8 `(height, width, 3)`, not to be written to.

        Raises:
            InputError: as `decode`.
        """
        if source in self._kept:
            return self._kept[source]
        image = self._decoded(source)
        self._keep(source, image)
        return image

    def __len__(self) -> int:
        """Images kept."""
        return len(self._kept)

    def fill(
        self, sources: Iterable[Path | Stored], threads: int = 1, progress: Callable[[Iterable], Iterable] = iter
    ) -> None:
        """Decode images ahead, until the limit is reached.

        Raises:
            InputError: for the first that cannot be read.
        """
        from concurrent.futures import ThreadPoolExecutor

        todo = list(dict.fromkeys(source for source in sources if source not in self._kept))
        with ThreadPoolExecutor(threads) as pool:
            # By the batch: `map` over everything would hold all of it before the limit could stop it.
            for first in progress(range(0, len(todo), FILL)):
                some = todo[first : first + FILL]
                if not all(list(map(self._keep, some, pool.map(self._decoded, some)))):
                    return

    def _decoded(self, source: Path | Stored) -> np.ndarray:
        image = decode(source)
        return image if self.prepare is None else self.prepare(image)

    def _keep(self, source: Path | Stored, image: np.ndarray) -> bool:
        """Keep it if it fits; whether it did."""
        fits = self.kept_bytes + image.nbytes <= self.limit_bytes
        if fits:
            self._kept[source] = image
            self.kept_bytes += image.nbytes
        return fits


FILL = 64
"""Images that are decoded between two looks at the limit."""
