"""Tiny dual encoders and a small set of images, as files that go through the same loading code as any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from copra_llm.config import RunConfig

CLASSES = ("cat", "deer", "frog", "truck")
SIZE = 16
"""Pixels of a side that the tiny models see."""
MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.2, 0.25]
COUNTS = {"train": 6, "val": 3, "test": 5}
"""Images of a class in each split."""
TASK = "cifar10"
RUN = {"method": "copra", "max_steps": 6, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 7,
       "learning_rate": 0.02, "lora_r": 2, "lora_dropout": 0.25, "logging_steps": 1, "shots": 4, "checkpoint_at": [],
       "tasks": [TASK]}  # fmt: skip


def write_images(root: Path, classes=CLASSES, counts=COUNTS, place: str = TASK, split_file: str = "split.json") -> Path:
    """A set's folder below `root`, with a few classes: noise around a colour of the class."""
    rng, folder = np.random.default_rng(0), root / place
    table: dict[str, list] = {split: [] for split in counts}
    for label, name in enumerate(classes):
        colour = rng.integers(40, 216, 3)
        for split, count in counts.items():
            for i in range(count):
                height, width = rng.integers(18, 30, 2)
                pixels = np.clip(colour + rng.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
                file = f"{name}/{split}_{i}.png"
                (folder / "images" / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / "images" / file)
                table[split].append([file, label, name])
    (folder / split_file).write_text(json.dumps(table), encoding="utf-8")
    return root


def image_config(model: Path, root: Path, **changes) -> RunConfig:
    """Settings of a short run on those images."""
    return RunConfig().replace(**RUN | {"model_name_or_path": str(model), "data_root": str(root)} | changes)


def save_clip(folder: Path) -> Path:
    """A random CLIPModel: 3 text layers of width 24, 4 vision layers of width 32, meeting in 16 dimensions."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    shape = {"num_attention_heads": 4, "initializer_range": 0.2, "attention_dropout": 0.0}
    text = shape | {"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3,
                    "max_position_embeddings": 40, "eos_token_id": tokenizer.eos_token_id,
                    "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = shape | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "image_size": SIZE,
                      "patch_size": 8}  # fmt: skip
    return _save(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=16), tokenizer, folder)


def save_siglip(folder: Path) -> Path:
    """A random SiglipModel: 3 layers a tower, width 24, the text tower reading 32 positions."""
    from transformers import SiglipConfig, SiglipModel

    tokenizer = clip_tokenizer()
    shape = {"num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 48, "attention_dropout": 0.0}
    text = shape | {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "max_position_embeddings": 32,
                    "pad_token_id": tokenizer.pad_token_id, "projection_size": 24}  # fmt: skip
    vision = shape | {"num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8}
    return _save(SiglipModel, SiglipConfig(text_config=text, vision_config=vision), tokenizer, folder,
                 {"height": SIZE, "width": SIZE})  # fmt: skip


def clip_tokenizer():
    """CLIP's tokenizer with letters for tokens: no merges."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def _save(architecture: type, config, tokenizer, folder: Path, size: dict | None = None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture(config)
        model.logit_scale.data.fill_(2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"image_mean": MEAN, "image_std": STD, "size": size or {"shortest_edge": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder
