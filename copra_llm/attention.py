"""Which of torch's attention kernels may a training step use? All but cuDNN's.

cuDNN's backward pass gives gradients that are no numbers, on H100 and H200, where a mask is given, 64 is the rest of
the length divided by 128, and a row has nothing to attend to, as padding on the left has not. torch chooses it by
itself from 2.11 on. A run of ours lost one step in a hundred to it, those whose longest text had just that length.

Source: pytorch/pytorch#196678, huggingface/trl#7181 (torch 2.11 to 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """`scaled_dot_product_attention` chooses among its other kernels; afterwards as before."""
    before = cudnn_sdp_enabled()
    enable_cudnn_sdp(False)
    try:
        yield
    finally:
        enable_cudnn_sdp(before)
