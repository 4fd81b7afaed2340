"""Dual encoders: the loss is the reference's, closed gates are the base model, nothing kept is ever stale."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_examples import CLASSES, MEAN, STD, TASK, image_config
from transformers import AutoModel

from copra_llm.adapters import AdapterWeights, load_adapter_weights, save_adapter_weights
from copra_llm.batches import eval_loader
from copra_llm.build import Workbench, build
from copra_llm.coalitions import CoalitionGame
from copra_llm.dual_encoder import DualEncoder
from copra_llm.errors import InputError
from copra_llm.evaluate import evaluate
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.export import fold
from copra_llm.gates import LayerGates
from copra_llm.image_inputs import image_inputs
from copra_llm.interpolate import interpolate, line
from copra_llm.merge import merge
from copra_llm.models import add_adapter, load_base
from copra_llm.pictures import decode, eval_view, whole_view
from copra_llm.prune import Variant
from copra_llm.settings import LoraSettings, ModelSettings
from copra_llm.tasks.clip.catalogue import get_image_task
from copra_llm.text_tower import TextTower, lowest_acting

FAMILIES = ["tiny_clip", "tiny_siglip"]
PROMPTS = [f"a photo of a {name}." for name in CLASSES]
PLAYERS = {
    "tiny_clip": [f"text_model.encoder.layers.{i}" for i in range(3)]
    + [f"vision_model.encoder.layers.{i}" for i in range(4)],
    "tiny_siglip": [f"{tower}_model.encoder.layers.{i}" for tower in ("text", "vision") for i in range(3)],
}


def shaken(bench: Workbench, seed: int = 0) -> Workbench:
    """With factors B that are not 0: the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in bench.classifier.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0.0, 0.3, generator=generator)
    return bench


@pytest.fixture
def bench(request, image_data):
    """`bench(family, **settings)`: a dual encoder with a random adapter, in evaluation mode."""

    def make(family: str, seed: int = 0, **changes) -> Workbench:
        config = image_config(request.getfixturevalue(family), image_data, **{"lora_dropout": 0.0} | changes)
        made = shaken(build(config, [TASK]), seed)
        made.classifier.eval()
        return made

    return make


@pytest.fixture
def saved(bench, tmp_path):
    """`saved(family, seed, **settings)`: such an adapter as PEFT's files, read."""

    def make(family: str, seed: int = 0, **changes) -> AdapterWeights:
        folder = tmp_path / f"{family}-{seed}-{len(list(tmp_path.iterdir()))}"
        bench(family, seed, **changes).classifier.model.save_pretrained(folder, save_embedding_layers=False)
        return load_adapter_weights(folder)

    return make


def batch_of(bench: Workbench, n: int = 5, split: str = "test") -> dict:
    batch = next(iter(eval_loader(bench.classifier, bench.splits[split][TASK], n)))
    batch.pop("index")
    return batch


def fresh_scores(bench: Workbench, batch: dict) -> torch.Tensor:
    """Scores of which nothing was kept: a new module around the same model."""
    own = bench.classifier
    again = DualEncoder(bench.base, own.model, {TASK: PROMPTS}, own.inputs).train(own.training)
    return again(batch, scores=True)


# --- the loss ---------------------------------------------------------------------------------------------


def reference_logits(model, tokenizer, pixels: torch.Tensor, siglip: bool) -> torch.Tensor:
    """CLIP's and SigLIP's scores, written out: all prompts at the tower's full width, images one by one."""
    width = model.config.text_config.max_position_embeddings
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    hidden = model.text_model(input_ids=padded).last_hidden_state  # (classes, width, hidden)
    if siglip:
        text = model.text_model.head(hidden[:, -1])
    else:
        ends = torch.tensor([row.index(tokenizer.eos_token_id) for row in rows])
        text = model.text_projection(hidden[torch.arange(len(rows)), ends])
    images = []
    for image in pixels:
        colours = [(image[..., c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)]
        pooled = model.vision_model(pixel_values=torch.stack(colours)[None]).pooler_output
        images.append(pooled[0] if siglip else model.visual_projection(pooled)[0])
    image = torch.stack(images)
    cosine = (image / image.norm(dim=-1, keepdim=True)) @ (text / text.norm(dim=-1, keepdim=True)).T
    return cosine * model.logit_scale.exp() + (model.logit_bias if siglip else 0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"lora_layers_to_transform": [2]}, {"encoder": "vision"}, {"encoder": "text"}])
def test_loss_and_gradients_are_the_references(bench, family, options):
    """Same weights, images and adapter; also when what lies below the adapters is kept from an earlier step."""
    made = bench(family, **options)
    made.classifier.train()
    batch, model = batch_of(made), made.classifier.model.get_base_model()
    trained = {n: p for n, p in made.classifier.named_parameters() if p.requires_grad}
    logits = reference_logits(model, made.base.tokenizer, batch["pixels"], family == "tiny_siglip")
    log_probs = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -log_probs[torch.arange(5), batch["labels"]].mean()
    gradients = torch.autograd.grad(expected, trained.values())
    for training in (True, True, False):
        made.classifier.train(training).zero_grad()
        loss = made.classifier(batch)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for (name, p), gradient in zip(trained.items(), gradients, strict=True):
            # Sums of numbers of the gradient's size in another order; entries near 0 have no relative accuracy.
            scale = float(gradient.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_models_own(bench, family):
    """transformers' `logits_per_image`, for the same prompts."""
    made = bench(family)
    batch, model = batch_of(made), made.classifier.model.get_base_model()
    pixels = (batch["pixels"].permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    tokens = made.classifier.prompts[TASK]
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens).logits_per_image
        found = made.classifier(batch, scores=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- players ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_players_are_the_layers_of_both_towers(bench, family):
    gates = LayerGates(bench(family).classifier)
    assert gates.keys == PLAYERS[family]
    assert all(len(modules) == 3 for modules in gates.modules), "q, k and v"


def test_towers_stand_in_order_before_indices_do(tiny_clip):
    """Layer 3 of one tower is not layer 3 of the other, whichever was adapted first."""
    from copra_llm.gates import group_players

    names = [f"{tower}_model.encoder.layers.{i}.self_attn.q_proj" for i in (10, 2) for tower in ("vision", "text")]
    expected = [f"{tower}_model.encoder.layers.{i}" for tower in ("text", "vision") for i in (2, 10)]
    assert list(group_players(names)) == expected


@pytest.mark.parametrize("encoder, begins", [("vision", "vision_model."), ("text", "text_model.")])
def test_one_tower_alone(bench, encoder, begins):
    keys = LayerGates(bench("tiny_clip", encoder=encoder).classifier).keys
    assert keys == [key for key in PLAYERS["tiny_clip"] if key.startswith(begins)]


def test_siglips_own_pooling_gets_no_adapter(tiny_siglip):
    """Torch's attention would read its weights past an adapter on it: that would be trained for nothing."""
    base = load_base(ModelSettings(model_name_or_path=str(tiny_siglip)))
    model = add_adapter(base, LoraSettings(lora_target_modules=["all-linear"]), init_seed=0)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert any(".fc1." in name for name in adapted) and not any("vision_model.head" in name for name in adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_gates_closed_is_the_base_model_bit_for_bit(bench, request, family):
    made = bench(family)
    batch, gates = batch_of(made), LayerGates(made.classifier)
    base = AutoModel.from_pretrained(request.getfixturevalue(family)).eval()
    plain = dataclasses.replace(made.base, model=base)
    wrapped = add_adapter(plain, LoraSettings(), init_seed=0)
    untouched = DualEncoder(plain, wrapped, {TASK: PROMPTS}, made.classifier.inputs).eval()
    with torch.no_grad():
        whole = made.classifier(batch, scores=True)
        with gates.applied([False] * gates.num_layers):
            closed = made.classifier(batch, scores=True)
        with wrapped.disable_adapter():
            expected = untouched(batch, scores=True)
    assert torch.equal(closed, expected)
    assert not torch.allclose(whole, expected)


# --- nothing kept is stale --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_change_of_the_adapter_is_seen(bench, family):
    """Gates, flags, values written past autograd, swapped factors: the same bits as of a module that keeps nothing."""
    made = bench(family)
    batch, gates, own = batch_of(made), LayerGates(made.classifier), made.classifier
    text_B = next(p for n, p in own.named_parameters() if "text_model" in n and "lora_B" in n)
    seen = []

    def check():
        with torch.inference_mode():
            seen.append(own(batch, scores=True))
            assert torch.equal(seen[-1], fresh_scores(made, batch))

    check()
    rng = np.random.default_rng(0)
    for mask in rng.random((6, gates.num_layers)) < 0.5:
        with gates.applied(mask):
            check()
    with own.model.disable_adapter():
        check()
    text_B.data += 1.0
    check()
    with torch.no_grad():
        text_B.mul_(2.0)
    check()
    layer = next(m for n, m in own.named_modules() if "text_model" in n and hasattr(m, "scaling"))
    layer.scaling["default"] *= 3.0
    check()
    norm = made.base.model.text_model.final_layer_norm
    norm.weight.data = torch.linspace(0.5, 2.0, len(norm.weight))
    check()
    distinct = {tuple(scores.flatten().tolist()) for scores in seen}
    assert len(distinct) == len(seen), "each of the changes must change the scores"


def test_one_state_is_encoded_once(bench):
    """A split of several batches needs one pass through the text tower, and none when a known state comes back."""
    made = bench("tiny_clip")
    from accelerate import Accelerator

    split, text = made.splits["test"][TASK], made.classifier.text
    first = evaluate(Accelerator(), made.classifier, split, 4)
    assert len(split) > 4 and text.encoded == 1
    with made.classifier.model.disable_adapter():
        base = evaluate(Accelerator(), made.classifier, split, 4)
    assert text.encoded == 2 and base.loss != first.loss
    assert evaluate(Accelerator(), made.classifier, split, 4).loss == first.loss and text.encoded == 2


def test_a_module_that_was_exchanged_is_seen(bench):
    """Folded away, or wrapped after the first look, without a word to the classifier."""
    made = bench("tiny_clip")
    own, batch = made.classifier, batch_of(made)
    layer = made.base.model.text_model.encoder.layers[1].self_attn
    with torch.no_grad():
        whole, projection = own(batch, scores=True), layer.q_proj
        layer.q_proj = projection.base_layer
        without = own(batch, scores=True)
        layer.q_proj = projection
        assert torch.equal(own(batch, scores=True), whole) and not torch.equal(without, whole)
        made.base.model.text_projection.weight.requires_grad_(True)
        made.base.model.text_projection.weight.mul_(-1)
        assert not torch.equal(own(batch, scores=True), whole), "a trained weight of the base itself"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"encoder": "text"}, {"encoder": "vision"}])
def test_interpolation_meets_fresh_models(bench, saved, request, image_data, family, options):
    """Every point of a line, its factors swapped in place, equals the merged adapter loaded by itself."""
    ends = [saved(family, seed, **options) for seed in (1, 2)]
    config = image_config(request.getfixturevalue(family), image_data, **options)
    curve = interpolate(*ends, AdapterEvaluator(config, [TASK], "test"), TASK, method="fusion", alphas=line(5))
    assert len(set(curve.loss.tolist())) == 5
    for alpha, nll in zip(curve.alpha, curve.nll, strict=True):
        merged = merge(ends, "fusion", [float(alpha), 1 - float(alpha)])
        fresh = AdapterEvaluator(config, [TASK], "test")(merged, TASK)
        assert np.array_equal(nll, fresh.nll)


@pytest.mark.parametrize("keep", ["every-other", "low", "text_model.encoder.layers", "vision_model.encoder.layers"])
def test_pruned_adapters_meet_fresh_models(saved, tiny_clip, image_data, keep):
    whole, config = saved("tiny_clip"), image_config(tiny_clip, image_data)
    evaluator = AdapterEvaluator(config, [TASK], "test")
    before = evaluator(whole, TASK)
    pruned = Variant(keep).of(whole)
    found = evaluator(pruned, TASK)
    assert np.array_equal(found.nll, AdapterEvaluator(config, [TASK], "test")(pruned, TASK).nll)
    assert np.array_equal(evaluator(whole, TASK).nll, before.nll) and before.loss != found.loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"encoder": "text"}, {"encoder": "vision"}])
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_coalitions_share_what_they_may(saved, request, image_data, monkeypatch, family, options, granularity):
    """Bit for bit the plain way's values, and those of a text tower that keeps nothing."""
    config = image_config(request.getfixturevalue(family), image_data, **options)
    evaluator = AdapterEvaluator(config, [TASK], "test")
    game = CoalitionGame(evaluator, saved(family, **options), TASK, granularity=granularity, batch_size=4)
    assert game.note is None
    coalitions = np.random.default_rng(0).random((10, game.n_players)) < 0.5
    coalitions[3], coalitions[4] = True, False
    shared, plain = game.outcomes(coalitions), game.plain_outcomes(coalitions)
    assert np.array_equal(shared.nll, plain.nll)
    assert len(set(plain.nll.mean(1).tolist())) == len(np.unique(coalitions, axis=0)), "the adapter must matter"
    monkeypatch.setattr(TextTower, "features", lambda self, task, training: self.encode(task))
    assert np.array_equal(game.plain_outcomes(coalitions).nll, plain.nll)


def test_coalitions_compute_a_text_state_once_a_split(saved, tiny_clip, image_data):
    """Not once a batch; and a vision block once for each prefix of its own tower, whatever the text layers do."""
    evaluator = AdapterEvaluator(image_config(tiny_clip, image_data), [TASK], "test")
    game = CoalitionGame(evaluator, saved("tiny_clip"), TASK, batch_size=5)
    batches = -(-len(game.split) // 5)
    text = game.classifier.text
    before = text.encoded
    masks = np.array([[t, 1, 1, v, 1, 1, 1] for t in (0, 1) for v in (0, 1)], dtype=bool)
    game.outcomes(masks)
    assert batches == 4 and text.encoded - before <= 2
    assert game.blocks_computed == batches * 2 * 4, "two prefixes in each of four vision blocks"


def test_packing_falls_back(saved, tiny_clip, image_data):
    """Coalitions side by side would need a text tower each; one at a time they are right."""
    evaluator = AdapterEvaluator(image_config(tiny_clip, image_data), [TASK], "test")
    game = CoalitionGame(evaluator, saved("tiny_clip"), TASK, batch_size=5, pack=4)
    assert game.pack == 1 and "instead of 4" in game.note


# --- training: what is not computed ----------------------------------------------------------------------


def count_calls(modules) -> list[int]:
    calls = [0] * len(modules)
    for i, module in enumerate(modules):
        run = module.forward

        def counted(*args, run=run, i=i, **kwargs):
            calls[i] += 1
            return run(*args, **kwargs)

        module.forward = counted
    return calls


def test_a_step_computes_the_text_tower_from_its_lowest_active_layer(bench):
    """What lies below is kept from the first time; masked off, the whole tower is; bits do not change."""
    made = bench("tiny_clip")
    own = made.classifier.train()
    blocks = made.base.model.text_model.encoder.layers
    calls, gates, batch = count_calls(blocks), LayerGates(own), batch_of(made)

    def step(text_mask):
        own.zero_grad()
        with gates.applied([*text_mask, True, True, True, True]):
            own(batch).backward()
        return {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}

    first, again = step([0, 0, 1]), step([0, 0, 1])
    assert calls == [1, 1, 2]
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert not any("text_model.encoder.layers.0" in name for name in first)
    step([0, 1, 0]), step([0, 1, 0])
    assert calls == [2, 3, 4]
    step([1, 0, 0])
    assert calls == [3, 4, 5]
    vision_only, once_more = step([0, 0, 0]), step([0, 0, 0])
    assert calls == [4, 5, 6], "frozen features once"
    assert not any("text_model" in name for name in vision_only) and vision_only.keys() == once_more.keys()


@pytest.mark.parametrize("options", [{"encoder": "vision"}, {"encoder": "text"}, {"lora_layers_to_transform": [1]}])
def test_what_inference_mode_has_kept_serves_a_later_step(bench, options):
    """Its tensors cannot be saved for a gradient: those that would have to be are not kept."""
    made = bench("tiny_clip", **options)
    batch = batch_of(made)
    with torch.inference_mode():
        made.classifier(batch, scores=True)
        made.classifier.train()
        made.classifier(batch, scores=True)
    made.classifier(batch).backward()
    assert made.classifier.text.encoded == (1 if options == {"encoder": "vision"} else 3)


def test_a_random_frozen_tower_is_not_kept_below(bench):
    """Where the base itself drops out, what lies below changes from step to step."""
    made = bench("tiny_clip", lora_layers_to_transform=[2])
    for layer in made.base.model.text_model.encoder.layers[:2]:
        layer.self_attn.dropout = 0.5
    own, batch = made.classifier.train(), batch_of(made)
    torch.manual_seed(0)
    losses = {own(batch).item() for _ in range(4)}
    assert len(losses) == 4


@pytest.mark.parametrize(
    "names, lowest",
    [
        (["t.layers.2.q", "t.layers.10.k"], 2),
        (["text_projection"], 12),
        (["text_projection", "t.layers.4.q"], 4),
        (["t.embeddings.token", "t.layers.4.q"], 0),
    ],
)
def test_lowest_acting(names, lowest):
    assert lowest_acting(names, "t.layers.", 12) == lowest


# --- what is refused --------------------------------------------------------------------------------------


def test_no_dual_encoder(tiny_bert, image_data):
    with pytest.raises(InputError, match="is of the kind encoder, but images"):
        build(image_config(tiny_bert, image_data), [TASK])


def test_a_prompt_that_is_too_long(tiny_clip, image_data):
    template = "a photo of a {}, " + "seen from afar, " * 4
    with pytest.raises(InputError, match="more tokens than the 40"):
        build(image_config(tiny_clip, image_data, template=template), [TASK])


def test_a_model_without_its_image_processor(tiny_clip, image_data, tmp_path):
    copy = Path(shutil.copytree(tiny_clip, tmp_path / "model"))
    (copy / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}')
    with pytest.raises(InputError, match="must be three numbers"):
        build(image_config(copy, image_data), [TASK])
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="has no preprocessor_config.json"):
        build(image_config(copy, image_data), [TASK])
    (copy / "processor_config.json").write_text(
        '{"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}'
    )
    assert build(image_config(copy, image_data), [TASK]).classifier.inputs.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("processor", "crop"),
    [
        ({"size": {"shortest_edge": 16}}, True),
        ({"size": {"height": 16, "width": 16}}, False),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": None}, False),
        ({"size": {"shortest_edge": 16}, "do_center_crop": False}, False),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": True}, True),
        ({"size": 16}, True),
    ],
)
def test_whether_the_middle_is_cut_out(tiny_clip, image_data, tmp_path, processor, crop):
    """As the processor says, or as its size implies; and evaluation then sees that view."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_clip, copy)
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1], **processor}
    (copy / "preprocessor_config.json").write_text(json.dumps(values))
    made = build(image_config(copy, image_data), [TASK])
    assert made.classifier.inputs.crop is crop
    split = made.splits["test"][TASK]
    image = decode(split.encoded[0].source)
    assert image.shape[0] != image.shape[1]
    expected = (eval_view if crop else whole_view)(image, made.classifier.inputs.size)
    assert np.array_equal(split.views(split.encoded[0], None), expected)


def test_images_of_no_fixed_size(bench):
    base = bench("tiny_clip").base
    base.model.config.vision_config.image_size = None
    with pytest.raises(InputError, match="reads images of size None"):
        image_inputs(base)


def test_another_way_to_score(bench):
    base = bench("tiny_clip").base
    del base.model.logit_scale
    with pytest.raises(InputError, match="has no logit_scale"):
        DualEncoder(base, base.model, {TASK: PROMPTS}, image_inputs(base))


def test_noise_on_embeddings_is_refused(tiny_clip, image_data):
    with pytest.raises(InputError, match="neftune"):
        build(image_config(tiny_clip, image_data, neftune_noise_alpha=5.0), [TASK])


def test_prompts_are_the_templates(bench):
    made = bench("tiny_clip", template="{} texture.")
    ids = made.classifier.prompts[TASK]["input_ids"]
    assert made.base.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].replace(" ", "") == "cattexture."
    assert get_image_task(TASK).template == "a photo of a {}."


def test_folded_into_its_base(saved, tiny_clip, image_data, tmp_path):
    """What transformers loads gives the adapter's scores; the image processor comes along."""
    weights = saved("tiny_clip")
    fold(weights.source, tmp_path / "folded", model_name_or_path=str(tiny_clip))
    inputs = AdapterEvaluator(image_config(tiny_clip, image_data), [TASK], "test")
    expected = inputs(weights, TASK).nll
    folded = AdapterEvaluator(image_config(tmp_path / "folded", image_data), [TASK], "test")
    silent = weights.with_factors(
        {name: dataclasses.replace(f, lora_B=0 * f.lora_B) for name, f in weights.factors.items()}, "silent"
    )
    # Float32 sums W + BA before, not after, the product with x.
    np.testing.assert_allclose(folded(silent, TASK).nll, expected, rtol=1e-4)


def test_saved_adapter_is_plain_peft(saved, tiny_clip, tmp_path):
    """`PeftModel.from_pretrained` loads it with this package absent."""
    from peft import PeftModel

    weights = saved("tiny_clip")
    save_adapter_weights(weights, tmp_path / "again")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_clip), str(tmp_path / "again"))
    loaded = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(loaded) == 3 * len(PLAYERS["tiny_clip"]) and weights.config["task_type"] == "FEATURE_EXTRACTION"
