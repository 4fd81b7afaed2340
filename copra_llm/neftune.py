"""How is an embedding made noisy while training?

    embedding + u,  u uniform in ± alpha / sqrt(tokens * hidden)

Source: Jain et al., NEFTune (arXiv 2310.05914), algorithm 1, in transformers' implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.integrations.neftune import neftune_post_forward_hook


@contextlib.contextmanager
def noisy_embeddings(model, alpha: float | None) -> Iterator[None]:
    """Noise on the embeddings' output within the block, in training mode alone; `alpha` None: nothing."""
    if alpha is None:
        yield
        return
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    hook = embeddings.register_forward_hook(neftune_post_forward_hook)
    try:
        yield
    finally:
        hook.remove()
        del embeddings.neftune_noise_alpha
