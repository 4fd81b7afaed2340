"""Which files are a saved adapter, and a run's own?"""

from __future__ import annotations

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's."""
HEAD_FILE = "head.safetensors"
"""An encoder's heads beside PEFT's files: `<task>.weight (num_labels, hidden)`, labels in the metadata."""
RUN_FOLDER = "adapter"
"""Where a run keeps its adapter."""
CONFIG, RESULT = "config.yaml", "result.json"
"""A run's settings and its record: beside that folder, or, on the Hub, beside the adapter's files."""
CARD = "README.md"
"""What the Hub shows."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
PUBLIC = (CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE, CONFIG, RESULT, CARD, *TOKENIZER_FILES)
"""All that is ever pushed to a repository or fetched from one: nothing of a kind that can run code."""
