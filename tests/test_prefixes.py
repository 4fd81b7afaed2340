"""Hidden states that coalitions share: `copra_llm.prefixes`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from examples import distinct_prefixes
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from copra_llm.gates import LayerGates
from copra_llm.prefixes import Block, NotShareable, SharedBlocks, prefix_ids, trie_order

# --- the trie ---------------------------------------------------------------------------------------------


def blocks_of(*gates: list[int]) -> list[Block]:
    return [Block(str(i), nn.Identity(), inside) for i, inside in enumerate(gates)]


@pytest.mark.parametrize("n, width", [(1, 1), (1, 5), (2, 3), (40, 6), (40, 1), (200, 8)])
def test_prefix_ids_count_the_distinct_prefixes(n, width):
    masks = np.random.default_rng(n).random((n, width)) < 0.5
    blocks = blocks_of(*([i] for i in range(width)))
    ids = prefix_ids(masks[trie_order(masks, blocks)], blocks)
    assert sum(len(set(row)) for row in ids) == distinct_prefixes(masks)
    assert (np.diff(ids, axis=1) >= 0).all()


def test_ids_are_equal_where_all_gates_so_far_are():
    """Blocks with several gates, run in an order that is not that of the mask."""
    blocks = blocks_of([2, 3], [0], [1, 4])
    masks = np.random.default_rng(0).random((50, 5)) < 0.5
    masks = masks[trie_order(masks, blocks)]
    ids = prefix_ids(masks, blocks)
    for place, columns in enumerate(([2, 3], [2, 3, 0], [2, 3, 0, 1, 4])):
        for i in range(50):
            alike = (masks[:, columns] == masks[i, columns]).all(1)
            assert ((ids[place] == ids[place, i]) == alike).all()


# --- models of other architectures ------------------------------------------------------------------------

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = SIZES | SPECIAL | {"max_position_embeddings": 16}
VISION = {key: SIZES[key] for key in SIZES if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
FAMILIES = {
    # Conv1D layers, blocks under `h`, a cache by default.
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 60, "n_embd": 32, "n_layer": 4, "n_head": 4} | SPECIAL),
    # Blocks get masks of two kinds in turn.
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig",
               SIZES | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),
    # One block, called four times.
    "albert": ("AlbertModel", "AlbertConfig", SIZES | SPECIAL | {"embedding_size": 16}),
    # Rows go to experts.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig",
                SIZES | SPECIAL | {"num_key_value_heads": 2, "num_local_experts": 4}),
    # Two towers.
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TOWER, "vision_config": VISION, "projection_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_any_model_of_blocks(family):
    """Bit for bit what gates around the whole forward pass give, from fewer runs of blocks."""
    kind, config, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = getattr(transformers, kind)(getattr(transformers, config)(**settings))
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0.0, 0.5)
        batch = {"input_ids": torch.randint(3, 60, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
        if family == "clip":
            batch["pixel_values"] = torch.randn(3, 3, 16, 16)
    batch["attention_mask"][0, :3] = 0

    def run(batch: dict) -> Tensor:
        out = model(**{key: value for key, value in batch.items() if key != "labels"})
        if family == "clip":
            return out.text_embeds * out.image_embeds
        return out.logits[:, -1] if "logits" in out else out.last_hidden_state.mean(1)

    batch["labels"] = torch.zeros(3)
    gates = LayerGates(model)
    masks = np.random.default_rng(0).random((12, gates.num_layers)) < 0.5
    with torch.inference_mode():
        shared = SharedBlocks(model, gates, run, batch)
        masks = masks[shared.order(masks)]
        found = shared.scores(batch, masks)
        for mask, scores in zip(masks, found, strict=True):
            with gates.applied(mask):
                assert torch.equal(scores, run(batch))
    assert len({scores.sum().item() for scores in found}) > 1, "the adapter must matter"
    calls = 4 if family == "albert" else 1
    in_order = masks[:, [gate for block in shared.blocks for gate in block.gates]]  # CLIP runs the image's tower first
    assert shared.computed == calls * distinct_prefixes(in_order) < calls * masks.size


def test_a_block_that_is_not_called_as_a_module():
    """A model that reaches into its blocks: there is nothing to hand a hidden state out of."""

    class Reaching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer["proj"](x)
            return x

    model = get_peft_model(Reaching(), LoraConfig(r=2, target_modules=["proj"]))
    with pytest.raises(NotShareable, match="does not call layers.0 as a module"):
        SharedBlocks(model, LayerGates(model), lambda batch: model(batch["x"]), {"x": torch.ones(1, 4)})
