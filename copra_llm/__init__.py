"""copra_llm: train LoRA adapters that merge, prune and share well (CopRA, arXiv 2410.22911)."""

__version__ = "0.1.0"
