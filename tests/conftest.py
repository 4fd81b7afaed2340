"""Models small enough to test with, and an environment in which nothing reaches the network.

The tiny models are random but real: configuration, weights and a trained tokenizer in a folder, as
`save_pretrained` writes them, so that they go through the same loading code as any model.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before torch and the hub client are imported. One thread: a process that a test starts then adds in the same
# order as this one, and runs can be compared byte for byte.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
PAD, EOS, CLS, SEP = "<pad>", "</s>", "<s>", "<sep>"
# Torch's CPU generator is the same on every machine; large weights keep the tiny models' answers apart.
WEIGHT_SEED, WEIGHT_STD = 0, 0.2


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """Accelerate keeps its state in singletons; no test sees another's."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def model_hub(monkeypatch, tmp_path):
    """A hub of this machine's own (`hub_server`), which huggingface_hub talks to; no wait is waited out.

    Yields the server; its `waits` are the seconds that were to be slept. The client reads its settings when it is
    imported, so they are changed where it keeps them.
    """
    from hub_server import TOKEN, HubServer
    from huggingface_hub import constants, hf_api

    import copra_llm.hub

    with HubServer() as server:
        settings = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
                    "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
                    "HF_HUB_DISABLE_XET": True}  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", server.waits.append)
        copra_llm.hub.download.cache_clear()
        yield server
        copra_llm.hub.download.cache_clear()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a random 4-layer LlamaForCausalLM, hidden 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=WEIGHT_STD,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return _save(LlamaForCausalLM, config, tokenizer, tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> Path:
    """Folder of a random T5ForConditionalGeneration, 2 + 2 layers, hidden 32."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer(after=f"$A {EOS}")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return _save(T5ForConditionalGeneration, config, tokenizer, tmp_path_factory.mktemp("tiny_t5"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a random BertModel of 12 layers, hidden 32: enough layers for "2 before 10" to matter."""
    from transformers import BertConfig, BertModel

    tokenizer = _tokenizer(after=f"{CLS} $A {SEP}", after_pair=f"{CLS} $A {SEP} $B:1 {SEP}:1")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        initializer_range=WEIGHT_STD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(BertModel, config, tokenizer, tmp_path_factory.mktemp("tiny_bert"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """Folder of a random CLIPModel, 3 text and 4 vision layers."""
    from image_examples import save_clip

    return save_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory) -> Path:
    """Folder of a random SiglipModel, 3 layers a tower."""
    from image_examples import save_siglip

    return save_siglip(tmp_path_factory.mktemp("tiny_siglip"))


@pytest.fixture(scope="session")
def image_data(tmp_path_factory) -> Path:
    """Data root with four classes of small noisy images, in CIFAR-10's folder."""
    from image_examples import write_images

    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def minilm() -> str:
    """Short name of the packaged encoder; its absence is a failure, not a skip."""
    from copra_llm.models import PACKAGED

    if importlib.util.find_spec(PACKAGED["minilm"].package) is None:
        pytest.fail(f"{PACKAGED['minilm'].requirement} is not installed: install with make install")
    return "minilm"


def sample_texts() -> list[str]:
    """Every text field of the packaged sample's training splits, and the label words."""
    from copra_llm.tasks.mtl15 import get_task, load_split, task_names

    tasks = [get_task(name) for name in task_names()]
    texts = [word for task in tasks for word in task.label_words]
    folder = ROOT / "copra_llm" / "tasks" / "mtl15_sample"
    for task in tasks:
        if (folder / task.name).is_dir():
            texts += [text for e in load_split(task, "train", "sample") for text in e.fields.values()]
    return texts


def _tokenizer(after: str | None = None, after_pair: str | None = None):
    """A byte-level BPE tokenizer trained on the packaged sample; `after` is its template of special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, EOS, CLS, SEP]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    if after is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=after, pair=after_pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=CLS,
        cls_token=CLS,
        sep_token=SEP,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if after_pair else [])],
    )


def _save(architecture: type, config, tokenizer, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(WEIGHT_SEED)
        model = architecture(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
