"""How are all labels of a prompt scored in one forward pass?

    score(label) = sum_k log p(token_k | prompt, tokens < k)                                          [nats]

What has to be read to predict every label's tokens are the labels without their last ones. Put together by common
beginnings they form a tree, whose nodes stand after the prompt in one row: a node sees the prompt and the nodes above
it, at the position it would have alone. "very positive" and "very negative" share the node "very"; labels of one token
need none. So a prompt costs its own tokens and one for each node, and no keys and values are kept for later.

That wants a model that heeds a mask of any shape and positions of its own; `takes_trees` says which do.

Source: tree attention as in SpecInfer (arXiv 2305.09781), section 4.2.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from copra_llm.models import sharded_at_load

_PROMPT, _BETWEEN = 3, 9
"""Tokens of the trial in `takes_trees`: nine between prompt and node change what the node predicts, if it sees them."""


@dataclass(frozen=True)
class LabelTree:
    """Some labels' tokens as a tree below the prompt."""

    tokens: Tensor
    """Of each node `(nodes,)`."""
    depths: Tensor
    """Tokens from the prompt's end to each node, itself included `(nodes,)`."""
    sees: Tensor
    """Bool `(nodes, nodes)`: True where the column is the row's node or above it."""
    sources: Tensor
    """Of each token to be predicted: 0 after the prompt, i + 1 after node i `(predicted,)`."""
    targets: Tensor
    """Ids of the tokens to be predicted `(predicted,)`."""
    labels: Tensor
    """Whose they are `(predicted,)`."""

    def __len__(self) -> int:
        return len(self.tokens)

    def after(self, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """A model's inputs: the nodes after prompts that are padded on the left.

        Args:
            ids: `(rows, prompt)`.
            mask: 1 where a prompt is `(rows, prompt)`.
            dtype: of the attention mask: bool, or a floating type for a mask that is added.

        Returns:
            `input_ids` and `position_ids` `(rows, prompt + nodes)`; `attention_mask`
            `(rows, 1, prompt + nodes, prompt + nodes)`.
        """
        rows, prompt = ids.shape
        nodes = len(self)
        allowed = ids.new_ones(prompt + nodes, prompt + nodes, dtype=torch.bool).tril()
        allowed[prompt:, prompt:] = self.sees.to(ids.device)
        there = torch.cat([mask.bool(), mask.new_ones(rows, nodes, dtype=torch.bool)], dim=1)
        # Padding sees itself: a softmax over nothing is not a number.
        allowed = (allowed & there[:, None]) | torch.eye(prompt + nodes, dtype=torch.bool, device=ids.device)
        attention = allowed[:, None]
        if dtype != torch.bool:
            attention = torch.zeros(attention.shape, dtype=dtype, device=ids.device)
            attention.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)
        last = mask.sum(1, keepdim=True) - 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": torch.cat([ids, self.tokens.to(ids.device).expand(rows, -1)], dim=1),
            "position_ids": torch.cat([positions, last + self.depths.to(ids.device)], dim=1),
            "attention_mask": attention,
        }

    def scores(self, logits: Tensor) -> Tensor:
        """Label scores `(rows, num_labels)` in nats, float32, of `logits (rows, 1 + nodes, vocabulary)`."""
        sources, targets, labels = (t.to(logits.device) for t in (self.sources, self.targets, self.labels))
        # By columns: the logits are large, and this needs their exponentials beside them.
        total = torch.stack([column.float().logsumexp(-1) for column in logits.unbind(1)], dim=1)
        found = logits[:, sources, targets].float() - total[:, sources]  # (rows, predicted)
        return found.new_zeros(len(logits), int(labels.max()) + 1).index_add(1, labels, found)


def label_tree(label_ids: list[list[int]]) -> LabelTree:
    """The tree of labels, each given by its token ids; no label may be without tokens."""
    nodes: dict[tuple[int, ...], int] = {}
    predicted = []
    for label, ids in enumerate(label_ids):
        for length, token in enumerate(ids):
            above = tuple(ids[:length])
            source = nodes.setdefault(above, len(nodes)) if above else -1
            predicted.append((source + 1, token, label))
    paths = list(nodes)
    sees = torch.tensor([[row[: len(column)] == column for column in paths] for row in paths], dtype=torch.bool)
    sources, targets, labels = torch.tensor(predicted).unbind(1)
    return LabelTree(
        torch.tensor([path[-1] for path in paths], dtype=torch.long),
        torch.tensor([len(path) for path in paths], dtype=torch.long),
        sees.view(len(paths), len(paths)),
        sources,
        targets,
        labels,
    )


def mask_dtype(model: nn.Module) -> torch.dtype:
    """What a mask of any shape is made of: bool, or the model's own type where it is added to the products."""
    return torch.bool if model.config._attn_implementation == "sdpa" else model.dtype


def takes_trees(model: nn.Module, max_length: int) -> bool:
    """Whether a causal model gives a node of a tree the logits that it would have in a row of its own.

    It is tried on a few tokens; a model whose weights are not all here is not.
    """
    if not wide_enough(model, max_length) or model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    if sharded_at_load(model):
        return False
    ids = torch.arange(_PROMPT + _BETWEEN + 1, device=model.device) % model.config.get_text_config().vocab_size
    prompt, first, second = ids[None, :_PROMPT], ids[_PROMPT:-1].tolist(), ids[-1:].tolist()
    tree = label_tree([[*first, 0], [*second, 0]])
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            inputs = tree.after(prompt, torch.ones_like(prompt), mask_dtype(model))
            found = model(**inputs, use_cache=False).logits[0, -1].float()
            alone = torch.cat([prompt, ids[None, -1:]], dim=1)
            expected = model(input_ids=alone, use_cache=False).logits[0, -1].float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        # A model that makes more of its mask than adding it: nothing to be shared with this one.
        return False
    finally:
        model.train(was_training)
    # Rounding stays below the square root of the precision; nine more tokens in view lie above.
    return bool((found - expected).abs().max() <= torch.finfo(model.dtype).eps ** 0.5 * expected.abs().max())


def wide_enough(model: nn.Module, max_length: int) -> bool:
    """Whether positions are a model's inputs, and its sliding window, which counts places, is wider than any row."""
    accepted = inspect.signature(model.forward).parameters
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return {"position_ids", "past_key_values"} <= accepted.keys() and (window is None or window > 2 * max_length)
