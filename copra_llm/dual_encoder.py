"""How does a dual encoder (CLIP, SigLIP) classify images, and what is its loss?

    score(class | image) = exp(s) <f(image), g(prompt of the class)> + b,     f and g of length 1
    loss                 = mean of -log softmax(scores)[gold]                                        [nats]

with the model's own scale s (and bias b, which SigLIP has and softmax does not see). The towers run one after the
other and meet in the scores alone; `text_tower` encodes the prompts no more often than necessary.

The module has the classifiers' interface (`classifiers.py`), so loop and evaluation are the same.

Source: CLIP (arXiv 2103.00020); SigLIP (arXiv 2303.15343); few-shot training as in CLIP-LoRA (arXiv 2405.18541).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copra_llm.classifiers import Grading
from copra_llm.errors import InputError
from copra_llm.gates import Part
from copra_llm.image_inputs import ImageInputs
from copra_llm.models import Base
from copra_llm.pictures import normalise
from copra_llm.text_tower import TextTower, surroundings
from copra_llm.towers import tower


class DualEncoder(Grading, nn.Module):
    """A dual encoder with its adapter.

    Args:
        base: the loaded base model, of the kind "dual".
        model: the same model with its adapter.
        prompts: `{task's name: one prompt a class}`.
        inputs: how the vision tower wants its images.

    Raises:
        InputError: if the base model scores in another way, or a prompt is longer than its text tower reads.
    """

    apart = ("text_",)
    """Where the names of modules begin that do not read the batch: a pass gives the same for every batch."""

    def __init__(self, base: Base, model: nn.Module, prompts: dict[str, Sequence[str]], inputs: ImageInputs):
        super().__init__()
        if not hasattr(base.model, "logit_scale"):
            raise InputError(f"{base.source.name} has no logit_scale, with which CLIP and SigLIP score classes; give "
                             "one of them as --model_name_or_path")  # fmt: skip
        self.model = model
        self.inputs = inputs
        self.prompts = {task: _tokens(base, texts) for task, texts in prompts.items()}
        self.vision = Part(lambda: tower(model.get_base_model(), "vision"))
        self.text = TextTower(Part(lambda: tower(model.get_base_model(), "text")), self._encode_prompts)
        self._last_images: tuple[Tensor, Hashable, Tensor] | None = None

    # --- images -> batches --------------------------------------------------------------------------------

    def collate(self, task, views: list[np.ndarray], labels: list[int]) -> dict:
        """Views, uint8 `(size, size, 3)` each, as a batch; they become floating-point numbers on the device."""
        pixels = torch.from_numpy(np.stack(views))  # (batch, size, size, 3)
        return {"pixels": pixels, "labels": torch.tensor(labels), "task": task.name}

    # --- batches -> scores and loss -----------------------------------------------------------------------

    def forward(self, batch: dict, scores: bool = False) -> Tensor:
        """Class scores `(batch, classes)`, or the mean cross-entropy in nats."""
        whole = self.model.get_base_model()
        text = self.text.features(batch["task"], self.training)
        image = self.image_features(batch["pixels"])
        # Scores of some 100 need more digits than bfloat16 has.
        with torch.autocast(image.device.type, enabled=False):
            text = F.normalize(text.float(), dim=-1)
            logits = whole.logit_scale.float().exp() * image @ text.T  # (batch, dim) @ (dim, classes)
            logits = logits + getattr(whole, "logit_bias", 0.0)
            return logits if scores else F.cross_entropy(logits, batch["labels"])

    def _encode_prompts(self, task: str) -> Tensor:
        """Features of the class prompts `(classes, dim)`, not of length 1 yet."""
        whole = self.model.get_base_model()
        tokens = {key: value.to(whole.device) for key, value in self.prompts[task].items()}
        return whole.get_text_features(**tokens).pooler_output

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features of length 1, float32 `(batch, dim)`, of views, uint8 `(batch, size, size, 3)`.

        Where nothing acts in the vision tower, those of the last batch are kept: coalitions of text layers all see
        the same ones.
        """
        if self.vision.acting():
            return F.normalize(self._encode_images(pixels).float(), dim=-1)
        key = surroundings(self.vision)
        if self._last_images is None or self._last_images[0] is not pixels or self._last_images[1] != key:
            with torch.no_grad():
                self._last_images = (pixels, key, self._encode_images(pixels))
        return F.normalize(self._last_images[2].float(), dim=-1)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        whole = self.model.get_base_model()
        values = normalise(pixels, self.inputs.mean, self.inputs.std).to(whole.dtype)
        return whole.get_image_features(pixel_values=values).pooler_output  # (batch, dim)

    def save_extras(self, folder: Path) -> None:
        """Nothing beyond the adapter: the prompts are the task's."""


def _tokens(base: Base, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as the text tower was trained to read them: ids `(classes, tokens)`, a mask where it needs one.

    SigLIP reads the last position of its full width, padding included. CLIP reads the end-of-text token and looks
    only to the left, so that neither its padding nor a mask changes anything.
    """
    config = base.model.config
    width = config.text_config.max_position_embeddings
    fixed = config.model_type.startswith("siglip")
    tokens = base.tokenizer(list(prompts), padding="max_length" if fixed else True, max_length=width if fixed else None)
    if max(map(len, tokens["input_ids"])) > width:
        longest = max(prompts, key=lambda prompt: len(base.tokenizer(prompt)["input_ids"]))
        raise InputError(f'the prompt "{longest}" has more tokens than the {width} that {base.source.name} reads; '
                         "shorten the class name or --template")  # fmt: skip
    kept = ("input_ids",) if fixed or config.model_type == "clip" else ("input_ids", "attention_mask")
    return {key: torch.tensor(tokens[key]) for key in kept}
