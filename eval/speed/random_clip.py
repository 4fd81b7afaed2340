"""A dual encoder of random weights, and its loss in a plain loop as CLIP-LoRA's: no speed depends on weights.

ViT-B/32's shape at a quarter of its widths; its tokenizer gives a token a word.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from copra_llm.pictures import normalise

WIDTH = 77
"""Tokens that the text tower reads."""
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
ABOUT = "random CLIP, 12 + 12 layers, widths 192 and 128, 224 pixels in 49 patches"


def save_model(folder: Path, prompts: list[str]) -> None:
    """A random CLIPModel with a token for each word of the prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    split = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for prompt in prompts for word, _ in split.pre_tokenize_str(prompt)})
    unknown, begin, end = special = ["<unk>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate([*words, *special])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = split
    around = [(token, vocabulary[token]) for token in (begin, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=around)
    names = {"unk_token": unknown, "bos_token": begin, "eos_token": end, "pad_token": end}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    ends = {"bos_token_id": vocabulary[begin], "eos_token_id": vocabulary[end], "pad_token_id": vocabulary[end]}
    text = ends | {"vocab_size": len(vocabulary), "hidden_size": 128, "intermediate_size": 512,
                   "num_attention_heads": 4, "max_position_embeddings": WIDTH}  # fmt: skip
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 4, "patch_size": 32}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)).save_pretrained(folder)
    processor = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def text_features(whole, tokens: dict[str, Tensor]) -> Tensor:
    """Features of length 1 of all prompts `(classes, dim)`."""
    return F.normalize(whole.get_text_features(**tokens).pooler_output, dim=-1)


def class_scores(whole, views: Tensor, text: Tensor, mean=MEAN, std=STD) -> Tensor:
    """Class scores `(batch, classes)` of views, uint8 `(batch, size, size, 3)`; `mean` and `std` are the model's."""
    pixels = normalise(views, mean, std).to(whole.dtype)
    image = F.normalize(whole.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    return whole.logit_scale.exp() * image @ text.T
