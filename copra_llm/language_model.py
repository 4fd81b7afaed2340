"""How is a causal language model trained on conversations, and how good is it on them?

    loss     = sum of -log p(token | tokens before it) over the trained tokens / their number        [nats]
    right    : every trained token is the likeliest one, so greedy decoding would give the whole answer

Only the positions that predict a trained token go through the output layer (`linear_loss`). A row of a batch holds
one example, or several (`packing`): positions start anew with each example, and transformers keeps the attention of
one from the others by them. Padding stands on the right, where no token of a causal model looks, so no attention mask
is needed.

The module has the classifiers' interface (`classifiers.py`), so loop and evaluation are the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from copra_llm.errors import InputError
from copra_llm.linear_loss import token_losses
from copra_llm.models import Base, sharded_at_load
from copra_llm.tasks.instruct.encode import Encoded

PROBE = 8
"""Tokens on which the model is asked whether it can be taken apart, and packed."""


class LanguageModel(nn.Module):
    """A causal language model with its adapter.

    Args:
        base: the loaded base model.
        model: the same model with its adapter.

    Raises:
        InputError: if the base model is no causal language model.
    """

    def __init__(self, base: Base, model: nn.Module):
        super().__init__()
        if base.kind != "causal":
            raise InputError(f"{base.source.name} is a {base.kind} model, but conversations need a causal language "
                             "model; give one as --model_name_or_path")  # fmt: skip
        self.model = model
        self.tokenizer = base.tokenizer
        self._linear_head = ends_with_its_head(base.model)
        # FlashAttention reads where examples begin and computes nothing across them; others would build a mask of
        # all tokens by all tokens.
        self.padding_free = str(base.model.config._attn_implementation).startswith("flash_attention")

    # --- texts -> batches ---------------------------------------------------------------------------------

    def collate(self, task, rows: list[list[Encoded]], labels: list[int]) -> dict:
        """Rows of examples as a batch: ids and positions `(rows, width)`, and where trained tokens stand.

        Padding-free, all of them are one row `(1, tokens)`; `rows` still says which each trained token is of.
        """
        lengths = [sum(map(len, row)) for row in rows]
        width = max(lengths)
        begins = [sum(lengths[:i]) if self.padding_free else i * width for i in range(len(rows))]
        shape = (1, sum(lengths)) if self.padding_free else (len(rows), width)
        ids, positions = torch.full(shape, self.tokenizer.pad_token_id), torch.zeros(shape, dtype=torch.long)
        places, owners = [], []
        for i, (row, start) in enumerate(zip(rows, begins, strict=True)):
            for example in row:
                stop = start + len(example)
                ids.view(-1)[start:stop] = torch.from_numpy(example.input_ids.astype("int64"))
                positions.view(-1)[start:stop] = torch.arange(stop - start)
                # An example's first token is predicted from nothing.
                at = start + 1 + torch.from_numpy(example.trained[1:].nonzero()[0])
                places.append(at)
                owners.append(torch.full((len(at),), i))
                start = stop
        batch = {
            "input_ids": ids,
            "trained": torch.cat(places),
            "rows": torch.cat(owners),
            "labels": torch.tensor(labels),
        }
        several = self.padding_free or any(len(row) > 1 for row in rows)
        return batch | ({"position_ids": positions} if several else {})

    # --- batches -> losses --------------------------------------------------------------------------------

    def forward(self, batch: dict, scores: bool = False) -> Tensor:
        """The mean loss over the trained tokens; or `(rows, 2)`: each row's summed loss, and how many are not right.

        Args:
            batch: of `collate`; `items`, if there, is the number of tokens to divide the loss by.
            scores: whether rows are asked for.
        """
        losses, right = self.token_losses(batch)
        if not scores:
            return losses.sum() / batch.get("items", max(1, len(losses)))
        n = len(batch["labels"])
        summed = losses.new_zeros(n, dtype=torch.float64).index_add_(0, batch["rows"], losses.double())
        wrong = torch.zeros_like(summed).index_add_(0, batch["rows"], (~right).double())
        return torch.stack([summed, wrong], dim=1)

    def graded(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of `forward`'s scores: each row's summed loss in nats `(rows,)`; 1 where all of it is right `(rows,)`."""
        return scores[:, 0], (scores[:, 1] == 0).long()

    def token_losses(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Loss in nats `(trained,)` and correctness `(trained,)` of the trained tokens."""
        ids, trained = batch["input_ids"], batch["trained"]
        inputs = {"input_ids": ids, "use_cache": False}
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"]
        targets = ids.flatten()[trained]
        whole = self.model.get_base_model()
        if self._linear_head:
            hidden = whole.get_decoder()(**inputs).last_hidden_state  # (rows, width, hidden)
            return token_losses(hidden.flatten(0, 1)[trained - 1], whole.get_output_embeddings(), targets)
        logits = self.model(**inputs).logits.flatten(0, 1)[trained - 1]
        return token_losses(logits, nn.Identity(), targets)

    def save_extras(self, folder: Path) -> None:
        """Nothing beyond the adapter."""


def ends_with_its_head(model: nn.Module) -> bool:
    """Whether the logits are the output layer's answer to the decoder's last hidden states, and nothing besides.

    Some models scale or cap their logits afterwards; they are asked as a whole.
    """
    if not (hasattr(model, "get_decoder") and model.get_output_embeddings() is not None):
        return False
    # It could only be asked with all its weights on each process.
    if sharded_at_load(model):
        return False
    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            whole = model(input_ids=ids, use_cache=False).logits
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            return torch.equal(whole, model.get_output_embeddings()(hidden))
    finally:
        model.train(was_training)


def refuse_leaking_packs(base: Base) -> None:
    """Refuse a model in which an example in a row changes what another one reads.

    Raises:
        InputError: if an example's logits depend on the one before it, or are not what they are alone.
    """
    model = base.model
    vocabulary = model.config.get_text_config().vocab_size
    alone = torch.arange(PROBE, device=model.device)[None] % vocabulary
    positions = torch.arange(PROBE, device=model.device).repeat(2)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            expected = model(input_ids=alone, use_cache=False).logits.float()
            first, second = (
                model(input_ids=torch.cat([other, alone], dim=1), position_ids=positions, use_cache=False)
                .logits[:, PROBE:]
                .float()
                for other in (alone.flip(1), (alone + PROBE) % vocabulary)
            )
    except TypeError:
        first = None  # it takes no positions
    finally:
        model.train(was_training)
    # Behind two others of one length the same sums are made in the same order, whatever the precision. Alone they are
    # made in another order, which 16 bits feel (3 % in the mean); positions that run on change all of it.
    if (
        first is None
        or (first - second).abs().max() > 1e-3 * expected.abs().max()
        or (first - expected).abs().mean() > 0.1 * expected.abs().mean()
    ):
        raise InputError(f"{base.source.name} does not keep packed examples apart (its attention reads across them); "
                         "leave --packing out, or choose another --attn_implementation")  # fmt: skip
