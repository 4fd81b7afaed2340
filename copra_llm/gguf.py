"""How does a GGUF file become a folder that anything can load?

It is dequantised to float32 once, into the cache; its tokenizer can be read without that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from copra_llm.errors import InputError
from copra_llm.paths import cache_dir
from copra_llm.results import atomic_folder

UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises for files that are torn, of another architecture, or need a package that is absent."""
TORN_GGUF = (IndexError, struct.error)
"""What it raises beside those for a GGUF that is cut short."""


def gguf_folder(path: Path) -> Path:
    """Where the converted copy of a GGUF is kept."""
    stat = path.stat()
    # By content where it counts: a changed file changes size or time, a moved one is converted again.
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return cache_dir() / "models" / f"{path.stem}-{key}"


def gguf_arguments(path: Path) -> dict[str, str]:
    """By which `from_pretrained` reads a GGUF."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path.name} is a GGUF file, and reading one needs the gguf package: pip install gguf")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def converted_gguf(path: Path) -> Path:
    """The folder with a GGUF's weights, dequantised to float32; converted on first use."""
    folder = gguf_folder(path)
    if (folder / "config.json").is_file():
        return folder
    where = gguf_arguments(path)
    try:
        with quiet_loading():
            loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (*UNREADABLE, *TORN_GGUF) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"{path} could not be read as a GGUF model: {first}") from None
    # transformers flags the loaded model as quantised and refuses to save it: move the weights to a plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(loaded).__name__]
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    with atomic_folder(folder) as fresh, quiet_loading():
        plain.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return folder


@contextmanager
def quiet_loading():
    """Without transformers' loading reports: the keys an encoder leaves unread (a pooler) are left on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
