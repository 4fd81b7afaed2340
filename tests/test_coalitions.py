"""Coalitions of layers: `copra_llm.coalitions` on `copra_llm.prefixes`, and `copra_llm.ledger`."""

from __future__ import annotations

import functools
import json
import types

import numpy as np
import pytest
import torch
from examples import distinct_prefixes, tiny_adapter
from torch import nn

from copra_llm.adapters import load_adapter_weights
from copra_llm.classifiers import LabelWordClassifier
from copra_llm.coalitions import CoalitionGame, consecutive_groups
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluate import evaluate
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.ledger import Ledger, RecordedGame, identity
from copra_llm.models import add_adapter, load_base
from copra_llm.settings import LoraSettings, ModelSettings

EXAMPLES, BATCH = 5, 2
BATCHES = 3
# agnews has labels of several tokens: after the first one, llama goes on from a key-value cache.
CASES = [("tiny_bert", "sst2"), ("tiny_llama", "sst2"), ("tiny_llama", "agnews"), ("tiny_t5", "agnews")]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """`adapters(folder)`: a random adapter of a tiny model, made once."""
    place = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def adapter(model):
        return tiny_adapter(model, place / model.name, seed=0)

    return adapter


@pytest.fixture
def make_game(request, adapters):
    """`make_game(model, task, **options)`: a game on a random adapter of a tiny model."""

    def make(model: str, task: str, split: str = "dev", **options) -> CoalitionGame:
        folder = request.getfixturevalue(model)
        adapter = adapters(folder)
        config = RunConfig().replace(model_name_or_path=str(folder), tasks=[task], data_root="sample",
                                     max_length=64, max_eval_samples=EXAMPLES)  # fmt: skip
        evaluator = AdapterEvaluator(config, [task], split)
        return CoalitionGame(evaluator, load_adapter_weights(adapter), task, **{"batch_size": BATCH} | options)

    return make


def random_coalitions(n: int, n_players: int, seed: int = 0) -> np.ndarray:
    """With repetitions, nobody, and everybody among them."""
    coalitions = np.random.default_rng(seed).random((n, n_players)) < 0.5
    coalitions[1], coalitions[2], coalitions[-1] = False, True, coalitions[0]
    return coalitions


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, task", CASES)
@pytest.mark.parametrize("options", [{}, {"granularity": "module"}, {"n_groups": 3}], ids=["layer", "module", "groups"])
def test_values_are_bit_for_bit_the_plain_ways(make_game, model, task, options):
    """Gates applied around `evaluate`, one coalition after the other."""
    game = make_game(model, task, **options)
    assert game.note is None
    coalitions = random_coalitions(8, game.n_players)
    shared, plain = game.outcomes(coalitions), game.plain_outcomes(coalitions)
    assert len(np.unique(plain.nll.mean(1))) > 5, "the adapter must matter"
    assert np.array_equal(shared.nll, plain.nll)
    assert np.array_equal(shared.correct, plain.correct)
    assert np.array_equal(game(coalitions), -plain.nll.mean(1))


def test_plain_outcomes_are_gates_around_evaluate(make_game):
    """The reference of the test above, against the parts it is made of."""
    game = make_game("tiny_bert", "sst2")
    coalition = random_coalitions(4, game.n_players)[:1]
    with game.gates.applied(coalition[0]):
        outcome = evaluate(game.evaluator.accelerator, game.classifier, game.split, BATCH)
    assert np.array_equal(game.plain_outcomes(coalition).nll[0], outcome.nll)
    assert np.array_equal(game.plain_outcomes(coalition).correct[0], outcome.correct)


@pytest.mark.parametrize("model, task", CASES)
def test_everybody_is_the_adapter_and_nobody_the_base_model(make_game, model, task):
    loss = make_game(model, task, batch_size=64)
    accuracy = CoalitionGame(loss.evaluator, loss.weights, task, metric="accuracy", batch_size=64)
    ends = np.array([[True] * loss.n_players, [False] * loss.n_players])
    whole = loss.evaluator(loss.weights, task)
    with loss.classifier.model.disable_adapter():
        base = evaluate(loss.evaluator.accelerator, loss.classifier, loss.split, 64)
    assert whole.loss != base.loss
    assert loss(ends).tolist() == [-whole.loss, -base.loss]
    assert accuracy(ends).tolist() == [whole.accuracy, base.accuracy]


def test_a_subset_of_the_examples(make_game):
    chosen = [4, 0, 3]
    game, all_of_them = (make_game("tiny_bert", "sst2", examples=e, batch_size=1) for e in (chosen, None))
    coalitions = random_coalitions(5, game.n_players)
    assert np.array_equal(game.outcomes(coalitions).nll, all_of_them.outcomes(coalitions).nll[:, chosen])


def test_a_group_switches_its_layers_together(make_game):
    groups, layers = make_game("tiny_bert", "sst2", n_groups=5), make_game("tiny_bert", "sst2")
    assert groups.players[0] == "encoder.layer.0 to encoder.layer.2" and groups.n_players == 5
    one = np.array([[False, True, False, False, True]])
    alone = np.isin(np.arange(12), [3, 4, 5, 10, 11])[None]
    assert groups(one) == layers(alone) != layers(~alone)


def test_groups_cover_every_player_once():
    assert consecutive_groups(7, 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert consecutive_groups(3, None) == [[0], [1], [2]] == consecutive_groups(3, 3)


def test_another_adapter_on_the_same_model_does_not_disturb_the_game(make_game, tmp_path, tiny_bert):
    game = make_game("tiny_bert", "sst2")
    coalitions = random_coalitions(4, game.n_players)
    before = game(coalitions)
    other = load_adapter_weights(tiny_adapter(tiny_bert, tmp_path / "other", seed=1))
    game.evaluator.attach(other)
    assert np.array_equal(game(coalitions), before)
    game.evaluator.attach(load_adapter_weights(tiny_adapter(tiny_bert, tmp_path / "wider", seed=1, r=6)))
    with pytest.raises(ValueError, match="make the game anew"):
        game(coalitions)


# --- what it costs ----------------------------------------------------------------------------------------


@pytest.fixture
def one_token(monkeypatch):
    """Label words of one token, which the tiny tokenizer does not have: no cache."""
    monkeypatch.setattr(LabelWordClassifier, "_label_ids", lambda self, task: [[5], [7]])


@pytest.mark.parametrize("pack", [1, 4])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_a_block_runs_once_a_distinct_prefix(make_game, one_token, model, pack):
    """On every batch of examples; counted where the model's own projections run, not where the walk says so."""
    game = make_game(model, "sst2", pack=pack)
    assert game.pack == pack
    rows = []
    for name, module in game.classifier.model.named_modules():
        if name.endswith((".query", ".q_proj")):
            module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    coalitions = random_coalitions(20, game.n_players)
    game(coalitions)
    assert game.blocks_computed == BATCHES * distinct_prefixes(coalitions)
    assert sum(rows) == EXAMPLES * distinct_prefixes(coalitions)
    assert sum(rows) < EXAMPLES * coalitions.size


@pytest.mark.parametrize("model, task", [("tiny_llama", "agnews"), ("tiny_t5", "agnews")])
def test_passes_over_every_label_are_shared_too(make_game, model, task):
    """Two coalitions that differ in the last block alone run the others once, in every pass of the scoring."""
    game = make_game(model, task)
    n = game.n_players
    last = [block.gates[0] for block in game._shared.blocks][-1]
    coalitions = np.ones((2, n), dtype=bool)
    game(coalitions[:1])
    once, passes_of_last = game.blocks_computed, 0
    coalitions[1, last] = False
    game(coalitions)
    passes_of_last = game.blocks_computed - 2 * once
    assert 0 < passes_of_last < once / 2


@pytest.mark.parametrize("options", [{}, {"granularity": "module"}], ids=["layer", "module"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_coalitions_side_by_side_agree_up_to_rounding(make_game, one_token, model, options):
    """Products of other shapes add in another order: float32's 1e-7, grown a hundredfold over twelve layers."""
    game = make_game(model, "sst2", pack=5, **options)
    assert game.pack == 5 and game.note is None
    coalitions = random_coalitions(13, game.n_players)
    shared, plain = game.outcomes(coalitions), game.plain_outcomes(coalitions)
    np.testing.assert_allclose(shared.nll, plain.nll, rtol=1e-4, atol=1e-5)


# --- models that do not allow it --------------------------------------------------------------------------


def test_a_cache_holds_one_coalition(make_game, monkeypatch):
    """Labels of several tokens on a model that reads them one by one: said, and right."""
    monkeypatch.setattr("copra_llm.classifiers.takes_trees", lambda model, max_length: False)
    game = make_game("tiny_llama", "agnews", pack=4)
    assert game.pack == 1 and game.note.startswith("one coalition a pass instead of 4")
    coalitions = random_coalitions(6, game.n_players)
    assert np.array_equal(game.outcomes(coalitions).nll, game.plain_outcomes(coalitions).nll)


def test_a_block_that_changes_its_input_is_found_out(make_game, monkeypatch):
    """Written over by the next block, a hidden state cannot be used twice: the plain way, with a note."""
    game = make_game("tiny_llama", "sst2")
    block = game.classifier.model.get_base_model().model.layers[2]
    forward = type(block).forward

    def in_place(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states.mul_(0.5), *args, **kwargs)

    monkeypatch.setattr(block, "forward", types.MethodType(in_place, block))
    again = CoalitionGame(game.evaluator, game.weights, "sst2", batch_size=BATCH)
    assert "it changed this model's scores" in again.note and again.blocks_computed == 0
    coalitions = random_coalitions(5, again.n_players)
    assert np.array_equal(again.outcomes(coalitions).nll, again.plain_outcomes(coalitions).nll)
    assert block.forward.__func__ is in_place, "a forward that somebody else had set is still there"


def test_a_player_outside_blocks_is_played_the_plain_way(tiny_llama, tmp_path):
    """`--layer_pattern` can make one of an adapter on the output layer."""
    base = load_base(ModelSettings(model_name_or_path=str(tiny_llama)))
    model = add_adapter(base, LoraSettings(lora_target_modules=["q_proj", "lm_head"]), init_seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = RunConfig().replace(model_name_or_path=str(tiny_llama), tasks=["sst2"], data_root="sample",
                                 max_eval_samples=4)  # fmt: skip
    evaluator = AdapterEvaluator(config, ["sst2"], "dev")
    game = CoalitionGame(evaluator, load_adapter_weights(tmp_path / "adapter"), "sst2",
                         layer_pattern=r"^lm_head|^model\.layers\.\d+")  # fmt: skip
    assert game.players == ["lm_head", *(f"model.layers.{i}" for i in range(4))]
    assert "lm_head is inside no numbered block" in game.note
    whole = game(np.ones((1, 5), dtype=bool))
    assert whole == -evaluator(game.weights, "sst2").loss
    assert whole != game(np.array([[False, True, True, True, True]]))


def test_the_model_is_left_as_it_was(make_game):
    game = make_game("tiny_bert", "sst2")
    game.classifier.train()
    game(random_coalitions(3, game.n_players))
    assert game.classifier.training
    assert not any("forward" in vars(module) for module in game.classifier.modules())


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"metric": "f1"}, 'the metric is "f1", but must be one of loss, accuracy'),
        ({"granularity": "head"}, "granularity is 'head'"),
        ({"n_groups": 13}, "13 groups were asked for, but the adapter has 12 players"),
        ({"n_groups": 0}, "0 groups were asked for"),
    ],
)
def test_settings_that_cannot_be(make_game, options, sentence):
    with pytest.raises(InputError, match=sentence):
        make_game("tiny_bert", "sst2", **options)


def test_coalitions_of_another_width_are_refused(make_game):
    with pytest.raises(ValueError, match=r"\(n, 12\)"):
        make_game("tiny_bert", "sst2")(np.ones((1, 6), dtype=bool))


# --- the ledger -------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_stopped_run_goes_on_with_the_same_numbers(make_game, tmp_path, monkeypatch):
    """Stopped between two writes, with half a line left behind: what was written is not evaluated again."""
    game = make_game("tiny_bert", "sst2")
    coalitions = random_coalitions(20, game.n_players)
    uninterrupted = RecordedGame(game, Ledger(tmp_path / "one.jsonl", identity(game)), chunk=4)(coalitions)

    path = tmp_path / "two.jsonl"
    outcomes, calls = CoalitionGame.outcomes, []

    def dies(self, coalitions):
        calls.append(len(coalitions))
        if len(calls) == 3:
            raise Killed
        return outcomes(self, coalitions)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CoalitionGame, "outcomes", dies)
        RecordedGame(game, Ledger(path, identity(game)), chunk=4)(coalitions)
    with path.open("a") as f:
        f.write('{"coalition": "0101010')
    ledger = Ledger(path, identity(game))
    assert len(ledger.values) == 8
    game.evaluations = 0
    again = RecordedGame(game, ledger, chunk=4)
    assert np.array_equal(again(coalitions), uninterrupted)
    distinct = len(np.unique(coalitions, axis=0))
    assert game.evaluations == distinct - 8
    seconds = [sum(row["seconds"] for row in Ledger(path, identity(game)).values.values()), again.seconds]
    assert seconds[0] == pytest.approx(seconds[1]) and seconds[0] > 0


def test_both_metrics_from_one_evaluation(make_game, tmp_path):
    game = make_game("tiny_bert", "sst2")
    coalitions = random_coalitions(6, game.n_players)
    ledger = Ledger(tmp_path / "values.jsonl", identity(game))
    told = []
    loss = RecordedGame(game, ledger, "loss", done=told.append)
    assert np.array_equal(loss(coalitions), game.outcomes(coalitions).values("loss"))
    spent = game.evaluations
    accuracy = RecordedGame(game, ledger, "accuracy")
    accuracies = accuracy(coalitions)
    assert game.evaluations == spent
    assert np.array_equal(accuracies, game.outcomes(coalitions).values("accuracy"))
    assert sum(told) == len(np.unique(coalitions, axis=0))


def test_a_ledger_of_another_game_is_refused(make_game, tmp_path):
    path = tmp_path / "values.jsonl"
    nobody = {"000000000000": {"loss": 1.0, "accuracy": 50.0, "seconds": 0.1}}
    Ledger(path, identity(make_game("tiny_bert", "sst2"))).append(nobody)
    with pytest.raises(InputError, match=r"values.jsonl holds values of another game: players is .* remove the file"):
        Ledger(path, identity(make_game("tiny_bert", "sst2", n_groups=3)))
    with pytest.raises(InputError, match='split is "dev" there and "test" here'):
        Ledger(path, identity(make_game("tiny_bert", "sst2", "test")))
    with pytest.raises(InputError, match="examples"):
        Ledger(path, identity(make_game("tiny_bert", "sst2", examples=[0, 2, 1, 3, 4])))


def test_the_adapters_numbers_are_part_of_the_game(make_game, tmp_path, tiny_bert):
    game = make_game("tiny_bert", "sst2")
    other = load_adapter_weights(tiny_adapter(tiny_bert, tmp_path / "other", seed=1))
    assert identity(game) != identity(CoalitionGame(game.evaluator, other, "sst2", batch_size=BATCH))


@pytest.mark.parametrize("text", ["", "{", '{"game": {}}\n{"coalition": "01"}\n', '{"game": {}}\nnonsense\n', "[1]\n"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path, text):
    path = tmp_path / "values.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="values.jsonl"):
        Ledger(path, {})
    assert path.read_text() == text


def test_the_first_line_says_what_the_values_are_of(make_game, tmp_path):
    game = make_game("tiny_llama", "sst2")
    path = tmp_path / "values.jsonl"
    ledger = Ledger(path, identity(game))
    assert not path.exists(), "nothing is written before there is something to keep"
    RecordedGame(game, ledger)(np.ones((1, 4), dtype=bool))
    head = json.loads(path.read_text().splitlines()[0])["game"]
    assert head["players"] == [f"model.layers.{i}" for i in range(4)]
    assert (head["task"], head["split"], head["n_examples"]) == ("sst2", "dev", EXAMPLES)
