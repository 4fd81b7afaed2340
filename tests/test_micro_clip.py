"""The recipe of the micro CLIP: which classes it sees, which tokens it has, and that it repeats itself."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPModel

from copra_llm.errors import InputError
from copra_llm.results import read_result
from copra_llm.tasks.clip.catalogue import get_image_task

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pretrain_micro_clip.py"
spec = importlib.util.spec_from_file_location("pretrain_micro_clip", RECIPE)
recipe = sys.modules["pretrain_micro_clip"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
OTHERS = {
    "oxford_flowers": [f"seen flower {i}" for i in range(3)],
    "dtd10": sorted(set(get_image_task("dtd10").classes) - set(get_image_task("dtd5").classes)),
    "cifar10": ["airplane", "bird", "deer", "frog", "ship"],
}
"""Classes that the model may see, by set."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The three sets with all classes that are kept apart and some others; one picture a class, named several times."""
    root = tmp_path_factory.mktemp("images")
    for apart, whole in recipe.KEPT_APART.items():
        task, table = get_image_task(whole), {"train": [], "val": [], "test": []}
        names = OTHERS[whole] + list(get_image_task(apart).classes)
        for label, name in enumerate(names):
            path = root / task.folder / task.images / f"{label}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(label).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            for split, n in (("train", recipe.SHOTS), ("val", 1), ("test", 1)):
                table[split] += [[path.name, label, name]] * n
        (root / task.folder / task.split_file).write_text(json.dumps(table))
    return root


@pytest.fixture(scope="module")
def merges(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("merges") / "merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('"version: 0\np h\nph o\npho to</w>\nt o</w>\n')
    return path


@pytest.fixture(scope="module")
def plan(root, merges, tmp_path_factory):
    return recipe.Plan(
        data_root=str(root), output_dir=str(tmp_path_factory.mktemp("micro") / "clip"), clip_merges=str(merges),
        image_size=16, width=32, vision_layers=1, text_layers=1, steps=3, batch_size=6, warmup_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(plan) -> Path:
    flags = [word for key, value in vars(plan).items() if value is not None for word in (f"--{key}", str(value))]
    assert recipe.main(flags) == 0
    return Path(plan.output_dir)


def test_an_ordinary_folder_is_written(folder):
    """Which transformers loads with its own classes; images and texts have features of one width."""
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "config.json", "preprocessor_config.json"}
    pixels = processor.image_processor(Image.new("RGB", (20, 30)), return_tensors="pt")["pixel_values"]
    tokens = tokenizer(["a photo", "a longer photo"], padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**tokens, pixel_values=pixels)
    assert pixels.shape == (1, 3, 16, 16) and outputs.logits_per_image.shape == (1, 2)
    # Padding is the end token, as in CLIP: a text's feature is that of its own end, whatever it is padded to.
    with torch.no_grad():
        alone = model.get_text_features(**tokenizer(["a photo"], return_tensors="pt")).pooler_output
        padded = model.get_text_features(**tokens).pooler_output[:1]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)


def test_classes_kept_apart_are_not_trained_on(folder, root):
    record = read_result(folder / "result.json")
    seen = set(record.data["classes"])
    assert seen == {name for names in OTHERS.values() for name in names}
    for apart in recipe.KEPT_APART:
        assert seen.isdisjoint(get_image_task(apart).classes)
        assert record.metrics[f"test/{apart}/chance"] == 100 / len(get_image_task(apart).classes)
        # The test picture is the shots' own picture here.
        assert record.metrics[f"test/{apart}/nearest_mean_accuracy"] == 100
    _, examples, shares = recipe.read_classes(root)
    sets = np.array([str(example.source.parents[1].name) for example in examples])
    assert [shares[sets == name].sum() for name in sorted(set(sets))] == pytest.approx([1 / 3] * 3)


def test_a_run_repeats_itself(folder, plan, tmp_path):
    """The same bytes; another seed, others; the random token embeddings stay as they were drawn."""
    recipe.pretrain(recipe.Plan(**vars(plan) | {"output_dir": str(tmp_path / "again")}))
    recipe.pretrain(recipe.Plan(**vars(plan) | {"output_dir": str(tmp_path / "other"), "seed": 1}))
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights
    fresh = recipe.new_model(plan, recipe.tokenizer_of(Path(plan.clip_merges))).state_dict()
    moved = {
        name for name, value in CLIPModel.from_pretrained(folder).state_dict().items() if not value.equal(fresh[name])
    }
    embedding = "text_model.embeddings.token_embedding.weight"
    assert embedding in fresh and embedding not in moved and "visual_projection.weight" in moved


def test_the_tokens_of_merges(merges):
    """Bytes, bytes at a word's end, merges, two special ones; what no merge joins is spelled."""
    tokenizer = recipe.tokenizer_of(merges)
    assert len(tokenizer) == 2 * 256 + 4 + 2
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a Photo to")["input_ids"])
    assert tokens == ["<|startoftext|>", "a</w>", "photo</w>", "to</w>", "<|endoftext|>"]


@pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="needs pip install --no-deps -r requirements-models.txt"
)
def test_the_tokens_are_clips():
    """Ids as in CLIP's published vocabulary."""
    tokenizer = recipe.tokenizer_of(recipe.merges_file(None))
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat.")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 269, 49407]


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match=re.escape("--clip_merges names nowhere.gz, which is no file")):
        recipe.merges_file("nowhere.gz")
