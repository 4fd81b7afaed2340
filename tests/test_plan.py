"""Plans against real models, closed forms and sums by hand; what they refuse."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from copra_llm.cli import main
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.fused_linear import products_made_again
from copra_llm.gates import LayerGates
from copra_llm.masks import sample_mask
from copra_llm.models import Base, Source, add_adapter, load_base
from copra_llm.plan.cluster import ClusterSettings, ShapeSettings
from copra_llm.plan.estimate import make_plan
from copra_llm.plan.expected import Participation, lowest_inactive_prob, participation
from copra_llm.plan.layout import layout
from copra_llm.plan.memory import memory
from copra_llm.plan.sizes import Sizes, configuration, empty_model, measure
from copra_llm.plan.trace import Batch, Work, _run, trace
from copra_llm.plan.traffic import seconds, traffic
from copra_llm.results import read_result
from copra_llm.schedule import METHODS
from copra_llm.settings import LoraSettings, ModelSettings, ScheduleSettings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "large-runs.md"
ALL = LoraSettings(lora_r=4, lora_target_modules=["all-linear"])
SMALL = Batch(2, 16, checkpointing=False, autocast=False, dropout=False, fused=False, masked=False)
WORK = Work(kept=1000, beyond=100, forward=1, forward_lora=1, backward_blocks=1, backward_head=0, backward_lora=1)
SIZES = Sizes(
    base_params=1000, base_bytes=2000, whole_bytes=0, divided_blocks=(800, 800), divided_rest=400, largest_rows=64,
    largest_matrix=0, trained=(40, 40), trained_bytes=320, players_of_block=(1, 1), block_trained=80, adapter_file=500,
)  # fmt: skip
HALF = Participation(active=0.5, reached=0.75)


def sizes_of(model: ModelSettings, lora: LoraSettings, gates: ScheduleSettings | None = None) -> Sizes:
    base, peft = empty_model(*configuration(model, ShapeSettings(), 64), model.dtype, lora)
    return measure(base, peft, model, lora, gates or ScheduleSettings())


# --- counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "minilm", "smollm2"])
@pytest.mark.parametrize("lora", [ALL, LoraSettings(lora_r=2, use_dora=True)], ids=["all-linear", "dora"])
def test_counts_are_those_of_the_real_model(model, lora, request, tmp_path):
    """Parameters, bytes, players and the adapter's file, all exact."""
    name = model if model == "smollm2" else str(request.getfixturevalue(model))
    settings = ModelSettings(name)
    planned = sizes_of(settings, lora)
    base = load_base(settings)
    assert planned.base_params == sum(p.numel() for p in base.model.parameters())
    assert planned.base_bytes == sum(p.numel() * p.element_size() for p in base.model.parameters())
    peft = add_adapter(base, lora, 0)
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert planned.trained_params == sum(p.numel() for p in trained)
    assert planned.trained_bytes == sum(p.numel() * p.element_size() for p in trained)
    assert len(planned.players_of_block) == LayerGates(peft).num_layers
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    assert planned.adapter_file == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_a_start_taken_from_the_base_is_saved_at_twice_the_rank(tiny_llama):
    plain, pissa = (sizes_of(ModelSettings(str(tiny_llama)), LoraSettings(lora_r=r, init_lora_weights=start))
                    for r, start in ((8, "default"), (4, "pissa")))  # fmt: skip
    assert pissa.trained_params == plain.trained_params // 2
    assert pissa.adapter_file == plain.adapter_file


def test_modules_as_players(tiny_llama):
    planned = sizes_of(ModelSettings(str(tiny_llama)), LoraSettings(), ScheduleSettings(granularity="module"))
    assert planned.players_of_block == (3, 3, 3, 3)


@pytest.mark.parametrize("flags", [{"load_in_4bit": True}, {"load_in_8bit": True},
                                   {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}])  # fmt: skip
def test_quantised_weights_take_what_bitsandbytes_holds(tiny_llama, flags):
    """Packed numbers, scales and code books of the loaded model, added up."""
    settings = ModelSettings(str(tiny_llama), **flags)
    model = load_base(settings).model
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        if getattr(p, "SCB", None) is not None:
            held += p.SCB.numel() * 4
        if state is not None:
            parts = [state.absmax, state.code]
            parts += [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            held += sum(t.numel() * t.element_size() for t in parts)
    assert sizes_of(settings, LoraSettings()).base_bytes == held


def test_no_weights_are_needed(tiny_llama, tmp_path):
    """A folder with the configuration alone is enough."""
    shutil.copy(tiny_llama / "config.json", tmp_path)
    assert sizes_of(ModelSettings(str(tmp_path)), ALL) == sizes_of(ModelSettings(str(tiny_llama)), ALL)


# --- a step's work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_blocks_tell_of_all(tiny_llama, checkpointing):
    """Four blocks, run as a whole, keep and compute what two and three say."""
    config, _ = configuration(ModelSettings(str(tiny_llama)), ShapeSettings(), 16)
    batch = replace(SMALL, checkpointing=checkpointing, fused=True)
    said, whole = (
        trace(config, "float32", ALL, None, batch),
        _run(config, "float32", ALL, None, batch, first_only=False),
    )
    assert said.kept == whole.kept
    assert said.kept + said.beyond == whole.peak
    assert said.flops(1.0, 1.0) == pytest.approx(whole.forward + whole.backward, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_operations_of_a_step_by_hand(tiny_llama, fused):
    """Forward 2 a weight and token, backward 2 (frozen: no gradient of weights) and 4 a weight of the adapter."""
    config, _ = configuration(ModelSettings(str(tiny_llama)), ShapeSettings(), 16)
    work = trace(config, "float32", ALL, None, replace(SMALL, fused=fused))
    tokens = SMALL.rows * SMALL.length
    linear = 4 * (4 * 32 * 32 + 3 * 32 * 64)
    attention = 4 * 4 * SMALL.rows * SMALL.length**2 * 32 // 2  # blocks; 4 s^2 d, half of it as it is causal
    # The frozen head's loss takes its gradient along in the forward pass.
    head = 2 * 2 * 32 * config.vocab_size * tokens
    assert work.forward == 2 * linear * tokens + attention + head
    adapter = sizes_of(ModelSettings(str(tiny_llama)), ALL).trained_params
    assert work.forward_lora == 2 * adapter * tokens
    assert work.backward_lora == 4 * adapter * tokens
    # Every frozen product has one of its size backward, attention 2.5. But the first block's input needs no
    # gradient, so its q, k and v give it none, nor do their factors A.
    missing = 3 * (2 * 32 * 32 + 2 * ALL.lora_r * 32) * tokens
    assert work.backward_blocks == 2 * linear * tokens - missing + 2.5 * attention


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dropout, packed", [(0.0, False), (0.1, False), (0.0, True)])
def test_bytes_kept_are_what_autograd_keeps(tiny_llama, fused, dropout, packed):
    """On real tensors: the distinct storages that autograd saves, but for parameters; PEFT's path and the loop's."""
    lora = replace(ALL, lora_dropout=dropout)
    config, _ = configuration(ModelSettings(str(tiny_llama)), ShapeSettings(), 16)
    config.num_key_value_heads = config.num_attention_heads // 2  # which a mask undoes
    model = LlamaForCausalLM(config).requires_grad_(False)
    base = Base(model, None, Source("", ""), "causal", "")
    model = add_adapter(base, lora, 0).train()
    gates = LayerGates(model, fused=fused)
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in owned:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.zeros(SMALL.rows, SMALL.length, dtype=torch.long)
    everything = gates.applied([True] * gates.num_layers)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with everything, hooks, products_made_again():
        positions = torch.arange(SMALL.length)[None].expand(SMALL.rows, -1)
        positions = positions % (SMALL.length // 2) if packed else positions
        base.model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    kept = sum(t.untyped_storage().nbytes() for t in saved.values())
    # Besides what autograd saves there are the hidden states themselves, and positions of a few bytes a token.
    extra = trace(config, "float32", lora, None, replace(SMALL, fused=fused, masked=packed)).kept - kept
    assert 0 <= extra <= 2 * SMALL.rows * SMALL.length * 32 * 4


def test_recomputing_keeps_less_and_computes_more(tiny_llama):
    config, _ = configuration(ModelSettings(str(tiny_llama)), ShapeSettings(), 16)
    plain = trace(config, "float32", ALL, None, SMALL)
    again = trace(config, "float32", ALL, None, replace(SMALL, checkpointing=True))
    assert again.kept < plain.kept / 5
    assert again.forward == plain.forward and again.backward_blocks > 1.5 * plain.backward_blocks


# --- expected shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.2, 0.9, 1.0])
def test_the_lowest_active_layer_against_all_masks(p):
    """Enumerated: P(the lowest k inactive | some layer is active), for every k."""
    masks = [np.array([i >> j & 1 for j in range(5)], dtype=bool) for i in range(1, 32)]
    weights = np.array([p ** m.sum() * (1 - p) ** (5 - m.sum()) for m in masks])
    if p == 0.0:
        weights = np.array([float(m.sum() == 1) for m in masks])
    for k in range(6):
        expected = sum(w for m, w in zip(masks, weights, strict=True) if not m[:k].any()) / weights.sum()
        # 1e-7: at p = 1e-9 the enumeration itself cancels.
        assert lowest_inactive_prob(p, 5, k) == pytest.approx(expected, rel=1e-7, abs=1e-15)


def test_participation_over_the_papers_schedule():
    """30 layers: 62.5 % are active, and a tenth of that depth is spared (measured: 6.3 %)."""
    share = participation(METHODS["copra"], [1] * 30, 1000)
    assert share.active == pytest.approx(0.625, abs=0.02)  # the condition of one active layer adds a little
    assert 1 - share.reached == pytest.approx(0.063, abs=0.005)
    assert participation(METHODS["lora"], [1] * 30, 1000) == Participation(1.0, 1.0)


def test_participation_against_drawn_masks():
    """Modules as players, two a block: means over the very masks of a run."""
    steps, schedule = 4000, METHODS["coto"]
    masks = [sample_mask(schedule(t / steps), 6, seed=0, step=t) for t in range(steps)]
    active = np.mean(masks)
    reached = np.mean([[m[: 2 * b + 2].any() for b in range(3)] for m in masks])
    share = participation(schedule, [2, 2, 2], steps)
    # Four standard errors of a mean of 4000 draws of at most 1/2.
    assert share.active == pytest.approx(active, abs=4 * 0.5 / math.sqrt(steps))
    assert share.reached == pytest.approx(reached, abs=4 * 0.5 / math.sqrt(steps))


# --- bytes between processes, and memory, by hand ---------------------------------------------------------


def flow(backend: str, nodes: int = 2, per_node: int = 4, accumulation: int = 1, sizes: Sizes = SIZES, **cluster):
    cluster = ClusterSettings(backend=[backend], num_nodes=nodes, processes_per_node=per_node, **cluster)
    at = layout(backend, cluster)
    return traffic(at, sizes, HALF, accumulation), at, cluster


@pytest.mark.parametrize("backend, sent", [
    ("ddp", {"gradients": 2 * 7 / 8 * 4 * 40}),
    ("fsdp2", {"gradients": 2 * 7 / 8 * 4 * 40, "weights": 7 / 8 * 3 * 1.75 * 2000}),
    ("hsdp", {"gradients": 2 * 7 / 8 * 4 * 40, "weights": 3 / 4 * 3 * 1.75 * 2000}),
    ("zero1", {"gradients": 2 * 7 / 8 * 4 * 40, "adapter": 7 / 8 * 4 * 80}),
    ("zero2", {"gradients": 3 * 2 * 7 / 8 * 4 * 40, "adapter": 7 / 8 * 4 * 80}),
    ("zero3", {"gradients": 3 * 7 / 8 * 4 * 40, "weights": 7 / 8 * (3 * 1.75 * 1600 + 3 * 2 * 400),
               "adapter": 7 / 8 * 4 * 80}),
])  # fmt: skip
def test_bytes_sent_in_a_step_of_three_micro_batches(backend, sent):
    """Half of the players active, three quarters of the blocks reached, 8 processes on 2 nodes."""
    found = flow(backend, accumulation=3)[0]
    for what in ("gradients", "weights", "adapter"):
        assert found.sent(what) == pytest.approx(sent.get(what, 0.0), rel=1e-12)
    assert found.sent() == pytest.approx(sum(sent.values()), rel=1e-12)


def test_one_process_sends_nothing():
    assert all(flow(name, 1, 1)[0].sent() == 0 for name in ("ddp", "fsdp2", "zero1", "zero3"))


def test_zero3_gathers_large_factors_with_their_layers():
    """Beside 40 entries that stay, 200,000 in each pass that they are active in: three micro-batches, two ways."""
    large = replace(SIZES, trained=(40, 200_000), block_trained=200_040)
    found = flow("zero3", accumulation=3, sizes=large)[0]
    assert found.sent("adapter") == pytest.approx(7 / 8 * 4 * (40 + 3 * 2 * 0.5 * 200_000), rel=1e-12)


def test_quantised_weights_stay_whole_under_fsdp2():
    """1200 of the 2000 bytes are quantised: they are neither divided, nor gathered, nor sent to the host."""
    packed = replace(SIZES, whole_bytes=1200, divided_blocks=(200, 200), divided_rest=400)
    found, at, _ = flow("fsdp2", sizes=packed)
    held = memory(at, packed, WORK, 1, 4)
    assert held.base_weights == 1200 + 800 / 8 and held.buffers == 400 + 2 * 200
    assert found.sent("weights") == pytest.approx(7 / 8 * 1.75 * 800, rel=1e-12)
    found, at, _ = flow("fsdp2", sizes=packed, offload="base")
    held = memory(at, packed, WORK, 1, 4)
    assert (held.base_weights, held.host) == (1200, 800 / 8)
    assert found.host == pytest.approx(1.75 * 800 / 8, rel=1e-12)


def test_time_of_a_ring_is_that_of_its_slowest_link_and_its_hops():
    links = {"intra_node_bandwidth": 100.0, "inter_node_bandwidth": 10.0, "intra_node_latency": 1.0,
             "inter_node_latency": 5.0}  # fmt: skip
    found, at, cluster = flow("ddp", **links)
    assert seconds(found, at, cluster) == pytest.approx(found.sent() / 10 + 2 * (1 * 5.0 + 6 * 1.0))
    found, at, cluster = flow("ddp", nodes=1, **links)
    assert seconds(found, at, cluster) == pytest.approx(found.sent() / 100 + 2 * 3 * 1.0)


def test_memory_of_each_backend():
    """T = 80 trained entries, 2000 bytes of base, 8 processes: the table of `memory.py`."""

    def held(name, **cluster):
        _, at, _ = flow(name, **cluster)
        return memory(at, SIZES, WORK, 1, 4)

    def parts(m):
        return m.base_weights, m.adapter, m.gradients, m.optimizer

    assert parts(held("ddp")) == (2000, 320, 320, 640)
    assert parts(held("fsdp2")) == (250, 320, 320, 640)
    assert parts(held("hsdp")) == (500, 320, 320, 640)
    assert parts(held("zero1")) == (2000, 320, 320, 120)
    assert parts(held("zero2")) == (2000, 320, 40, 120)
    assert parts(held("zero3")) == (250, 320, 40, 120)  # tensors as small as these stay whole
    assert held("zero2").buffers == 4 * 5e8 and held("zero3").buffers == 4 * 5e8 + 2 * 1000
    assert held("fsdp2").buffers == 400 + 2 * 800 and held("fsdp2", nodes=1, per_node=1).buffers == 0


def test_gradients_come_when_activations_go():
    """320 bytes of gradients and 320 of their flat copy, against the 1100 of the passes; 2960 stay between steps."""

    def total(name, accumulation=1, work=WORK, **cluster):
        return memory(flow(name, **cluster)[1], SIZES, work, accumulation, 4).total

    assert total("ddp") == 2960 + 1100
    assert total("ddp", accumulation=2) == 2960 + 1100 + 320
    few = replace(WORK, kept=100)
    assert total("ddp", work=few) == 2960 + 640
    assert total("ddp", work=few, nodes=1, per_node=1) == 2960 + 320
    assert total("zero2") == 2000 + 320 + 120 + 1100 + 4 * 5e8 + 40


# --- the command ------------------------------------------------------------------------------------------


def plan(*argv) -> int:
    return main(["plan", *map(str, argv)])


def test_the_command_says_and_writes(tiny_llama, tmp_path, capsys):
    """The table's figures are the record's; the settings in it make the same plan again."""
    file = tmp_path / "plan.json"
    flags = ["--model_name_or_path", tiny_llama, "--max_steps", 40, "--lora-target-modules", "all-linear",
             "--max_length", 16, "--processes_per_node", 2, "--backend", "ddp", "fsdp2"]  # fmt: skip
    assert plan(*flags, "--json", file) == 0
    said, found = capsys.readouterr().out, read_result(file)
    assert "| a process | ddp | fsdp2 |" in said
    assert f"| trained parameters | {found.metrics['trained_parameters']:,} |" in said
    assert found.metrics["tokens"] == 40 * 2 * 16 * 16 and found.steps == 40
    again = make_plan(RunConfig().replace(model_name_or_path=str(tiny_llama), max_steps=40, max_length=16,
                                          lora_target_modules=["all-linear"]),
                      ClusterSettings(backend=["ddp", "fsdp2"], processes_per_node=2))  # fmt: skip
    assert [b.memory.total for b in again.backends] == [found.metrics[f"{b}/memory/total"] for b in ("ddp", "fsdp2")]
    json.loads(file.read_text())  # no NaN


def test_epochs_become_steps(tiny_bert, capsys):
    assert plan("--model_name_or_path", tiny_bert, "--num_train_examples", 100, "--num_train_epochs", 2,
                "--per_device_train_batch_size", 8, "--max_length", 16) == 0  # fmt: skip
    assert "| steps, tokens in all | 25, 3,200 |" in capsys.readouterr().out


def test_some_blocks_alone(tiny_llama, capsys):
    """Two of four blocks: half of the parameters."""
    flags = ["--model_name_or_path", tiny_llama, "--max_steps", 4, "--max_length", 16, "--method", "lora"]
    found = []
    for more in ([], ["--lora_layers_to_transform", 0, 2]):
        assert plan(*flags, *more) == 0
        found.append(int(re.search(r"trained parameters \| ([\d,]+)", capsys.readouterr().out)[1].replace(",", "")))
    assert found[1] * 2 == found[0]


SIZE = ["--hidden_size", "32", "--intermediate_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "2",
        "--vocab_size", "50"]  # fmt: skip


@pytest.mark.parametrize("flags, words", [
    (["--backend", "dpd"], ['"dpd"', 'did you mean "ddp"', "zero3"]),
    (["--num_nodes", "0"], ["--num_nodes is 0"]),
    (["--backend", "fsdp2", "--num_nodes", "100", *SIZE, "--max_steps", "4"], ["100 processes", "has 64", "ddp"]),
    (["--num_train_examples", "30", "--num_nodes", "4"], ["64 examples", "30", "fewer processes"]),
    (["--load_in_4bit", "--backend", "zero3", *SIZE, "--max_steps", "4"], ["--load_in_4bit and ZeRO-3", "2"]),
    (["--load_in_8bit", "--backend", "zero3", *SIZE, "--max_steps", "4"], ["--load_in_8bit and ZeRO-3", "2"]),
    (["--use_dora", "--backend", "zero3", *SIZE, "--max_steps", "4"], ["--use_dora", "ZeRO-3"]),
    (["--fp16", "--backend", "zero1", *SIZE, "--max_steps", "4"], ["--fp16 under DeepSpeed", "--bf16"]),
    (["--offload", "base", "--backend", "fsdp2", "ddp"], ["--offload base", "ddp"]),
    (["--offload", "optimizer", "--backend", "zero2"], ["its own Adam", "base"]),
    (["--offload", "disk"], ["disk", "must be base"]),
    (["--hidden_size", "32"], ["--hidden_size", "--intermediate_size"]),
    ([*SIZE, "--model_name_or_path", "minilm"], ["--model_name_or_path minilm", "one of them"]),
    ([*SIZE[:-4], "--num_attention_heads", "3", "--vocab_size", "9"], ["--num_attention_heads is 3", "32"]),
    (SIZE, ["--max_steps", "--num_train_examples"]),
    (["--achieved_flops", "0"], ["--achieved_flops is 0"]),
    (["--batch_size", "3"], ["--batch_size"]),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(flags, words, capsys):
    assert plan(*flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


def test_a_folder_without_a_configuration_is_refused(tmp_path, capsys):
    assert plan("--model_name_or_path", tmp_path, "--max_steps", 4) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("model, kind", [("tiny_t5", "seq2seq"), ("tiny_clip", "dual")])
def test_models_that_cannot_be_planned_are_named(model, kind, request, capsys):
    assert plan("--model_name_or_path", request.getfixturevalue(model), "--max_steps", 4) == 2
    assert f"{kind} model" in capsys.readouterr().err


def test_nothing_is_written_where_the_plan_is_refused(tmp_path):
    assert plan("--backend", "none", "--json", tmp_path / "plan.json") == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="--backend is empty"):
        ClusterSettings(backend=[])


# --- the page for large runs ------------------------------------------------------------------------------

BLOCKS = re.findall(r"<!-- begin (\w+) -->\n```\ncopra plan (.*?)```\n\n(.*?)<!-- end \1 -->", PAGE.read_text(), re.S)


@pytest.mark.parametrize("command, text", [b[1:] for b in BLOCKS], ids=[b[0] for b in BLOCKS])
def test_the_pages_tables_are_what_the_command_says(command, text, capsys):
    assert plan(*shlex.split(command.replace("\\\n", " "))) == 0
    assert capsys.readouterr().out == text


def test_the_page_has_its_tables():
    assert [block[0] for block in BLOCKS] == ["bf16", "nf4"]


def test_saved_adapters_agree_with_their_own_header(tmp_path):
    """The header's length depends on names and shapes alone: a file of odd ones."""
    from safetensors.torch import save_file

    from copra_llm.plan.sizes import safetensors_bytes

    tensors = {"b": torch.zeros(3, 5), "a.long.name": torch.zeros(7), "c": torch.zeros(1, 2, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    described = {name: ("F32", tuple(t.shape), t.numel() * 4) for name, t in tensors.items()}
    assert safetensors_bytes(described, {"format": "pt"}) == (tmp_path / "x.safetensors").stat().st_size
    assert set(load_file(tmp_path / "x.safetensors")) == set(tensors)


def test_the_table_of_checks_says_how_far_off_a_plan_was():
    """Errors in percent of what was measured; the run that gave the speed has none."""
    from copra_llm.results import Result
    from copra_llm.summaries.plan import plan_table

    figures = {"trained_parameters": 10.0, "adapter_file_bytes": 50.0, "checkpoint_bytes": 100.0, "memory": 2e6,
               "between_steps": 1e6}  # fmt: skip
    found = {name: {**figures, "memory": 4e6, "between_steps": 1.5e6, "step_seconds": 2.0} for name in ("a", "b")}
    said = {"a": {**figures, "step_seconds": 2.0}, "b": {**figures, "trained_parameters": 11.0, "step_seconds": 3.0}}
    metrics = {f"{n}/measured/{k}": v for n in found for k, v in found[n].items()}
    metrics |= {f"{n}/predicted/{k}": v for n in said for k, v in said[n].items()}
    lines = plan_table([Result("plan_check", {"model_name_or_path": "m", "runs": {"a": {}, "b": {}}}, metrics)])
    first, second = lines.splitlines()[2:]
    memory = "2 MB | 4 MB | -50.0 % | -500 kB | -60.0 %"
    assert first == f"| m | a | 10 | both exact | +0.0 % | {memory} | 2.00 s | 2.00 s | calibrated |"
    assert second == f"| m | b | 10 | no | +0.0 % | {memory} | 3.00 s | 2.00 s | +50.0 % |"
