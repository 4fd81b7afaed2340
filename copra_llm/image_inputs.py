"""How does a vision tower want its images: how large, their middle or all of them, and with which mean and spread?

The size is that of the model's position embeddings; the rest is what its image processor does
(`preprocessor_config.json`, or `processor_config.json`, which newer versions of transformers write).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from copra_llm.errors import InputError
from copra_llm.models import Base

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ImageInputs:
    """What a vision tower was trained on."""

    size: int
    """Pixels of a side."""
    mean: tuple[float, ...]
    """Of each colour, on a scale of 0 to 1."""
    std: tuple[float, ...]
    """Likewise."""
    crop: bool = True
    """Whether evaluation sees the middle square (CLIP) or the whole image, squeezed into one (SigLIP)."""


def image_inputs(base: Base) -> ImageInputs:
    """What the model's configuration and its image processor's say.

    Raises:
        InputError: if the model is no dual encoder, has no image processor's configuration, or it lacks what is needed.
    """
    if base.kind != "dual":
        raise InputError(f"{base.source.name} is of the kind {base.kind}, but images are classified by a dual encoder "
                         "(CLIP, SigLIP); give one as --model_name_or_path")  # fmt: skip
    values = _processor(base.source.load_from)
    if values is None:
        raise InputError(f"{base.source.name} has no {FILES[0]}, which says how its images are normalised; save its "
                         "image processor beside the weights")  # fmt: skip
    mean, std = values.get("image_mean"), values.get("image_std")
    if not (_three_numbers(mean) and _three_numbers(std)):
        raise InputError(f"the {FILES[0]} of {base.source.name} has image_mean {mean} and image_std {std}, but both "
                         "must be three numbers; mend it")  # fmt: skip
    size = getattr(base.model.config.vision_config, "image_size", None)
    if not isinstance(size, int):
        raise InputError(f"{base.source.name} reads images of size {size}, but squares of one size are needed; give "
                         "another --model_name_or_path")  # fmt: skip
    return ImageInputs(size, tuple(mean), tuple(std), _crops(values))


def _crops(values: dict) -> bool:
    """Whether the processor cuts out the middle: it says so, or gives a shorter side rather than both sides."""
    said = values.get("do_center_crop")
    if said is not None:
        return bool(said)
    size = values.get("size")
    return not (isinstance(size, dict) and {"height", "width"} <= size.keys())


def _three_numbers(values) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)


def _processor(load_from: str) -> dict | None:
    """The image processor's settings, of a folder or a hub id."""
    path = processor_file(load_from)
    if path is None:
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return values.get("image_processor", values)


def processor_file(load_from: str) -> Path | None:
    """The file with the image processor's settings, of a folder or a hub id; None if there is none."""
    for file in FILES:
        path = Path(load_from) / file
        if not Path(load_from).is_dir():
            from transformers.utils import cached_file

            found = cached_file(load_from, file, _raise_exceptions_for_missing_entries=False)
            path = Path(found) if found else path
        if path.is_file():
            return path
    return None
