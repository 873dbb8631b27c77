import subprocess
import sys
import threading

import pytest
import torch

import fitprune
from fitprune.app import screen
from fitprune.app.python_lines import Source, python_lines
from fitprune.app.recipes import Choice
from fitprune.families.inputs import to_model


def request(served, sample, percent=60, method="fitprune", scorer="", tokens=8):
    return screen.read_request(served, sample.image, sample.text, percent, method, scorer, tokens)


def generated(served, sample, recipe=None, tokens=8):
    batch = next(fitprune.make_batches([sample], served.processor))
    inputs = to_model(batch, served.model)
    if recipe is None:
        ids = served.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    else:
        with fitprune.prune(served.model, recipe):
            ids = served.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("percent", [0, 60, 90])
def test_both_answers_are_those_of_generate(served, sample, percent):
    *_, last = screen.run(served, request(served, sample, percent))
    assert last.dense.ids == generated(served, sample)
    assert last.pruned.ids == generated(served, sample, last.pruning.recipe)
    assert len(last.pruned.seconds) == len(last.pruned.ids)


def test_answers_stream_in_turn_and_what_is_left_comes_last(served, sample):
    steps = list(screen.run(served, request(served, sample)))
    lengths = [(len(step.pruned.ids), len(step.dense.ids)) for step in steps]
    assert lengths[:4] == [(1, 0), (1, 1), (2, 1), (2, 2)]
    assert [step.kept is not None for step in steps] == [False] * (len(steps) - 1) + [True]


def test_what_is_left_is_what_the_recipe_says(served, sample):
    now = screen.look(served, request(served, sample))
    assert now.kept.counts[1:] == list(now.cost.kept[:-1])
    assert now.kept.scores.shape == (8, 144)


def test_answers_stay_while_the_budget_moves_as_those_of_the_budget_before(served, sample):
    *_, last = screen.run(served, request(served, sample))
    moved = screen.look(served, request(served, sample, 80), last)
    assert moved.dense is last.dense
    assert moved.answered == Choice(60)
    assert not moved.current
    with pytest.raises(ValueError, match="of other choices than those on the page: press Run"):
        screen.attention_of(served, moved, 0)
    other = screen.read_request(served, sample.image, "How many?", 80, "fitprune", "", 8)
    assert screen.look(served, other, last).answered is None


def test_a_word_looked_at_tokens_that_were_there(served, sample):
    *_, last = screen.run(served, request(served, sample))
    attention = screen.attention_of(served, last, 1)
    assert attention.shape == (144,)
    assert 0 < attention.sum() < 1
    early, late = attention[last.kept.entered <= 2], attention[last.kept.entered == 8]
    assert early.mean() < late.mean()


def test_the_attention_of_a_word_is_that_of_eager_attention(served, sample):
    """Without pruning, transformers' own attention maps say the same."""
    *_, last = screen.run(served, request(served, sample, 0))
    word = last.words[0][1]
    got = screen.attention_of(served, last, 1)
    inputs = served.prompt(last.request.picture, last.request.question).inputs
    prompt = inputs["input_ids"].shape[1]
    answer = torch.tensor([last.pruned.ids[: max(word.tokens)]])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    before = served.model.config._attn_implementation
    served.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = served.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs["pixel_values"],
                output_attentions=True,
            )
    finally:
        served.model.set_attn_implementation(before)
    rows = torch.stack(output.attentions)[:, 0].mean((0, 1))[[prompt - 1 + token for token in word.tokens]].mean(0)
    visual = inputs["input_ids"][0] == served.model.config.image_token_id
    torch.testing.assert_close(got, rows[:prompt][visual], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("number", [-1, 99, 1.5, "0", None])
def test_a_word_that_is_not_there_is_refused(served, sample, number):
    *_, last = screen.run(served, request(served, sample))
    with pytest.raises(ValueError, match=r"word=.*: the answer has \d+ words, counted from 0; press one"):
        screen.attention_of(served, last, number)


def test_choices_are_compared_and_one_that_cannot_be_says_why(served, sample):
    choices = [Choice(0), Choice(60), Choice(95, "vtw"), Choice(60, "dart")]
    none, sixty, vtw, dart = screen.compare(served, request(served, sample), choices)
    assert none.pruned.ids == generated(served, sample)
    assert sixty.pruned.done
    assert isinstance(vtw, ValueError) or vtw.pruned.done
    assert dart.pruned.done


def test_costs_are_those_of_the_cache_that_the_model_fills(served, sample):
    now = screen.look(served, request(served, sample))
    inputs = served.prompt(now.request.picture, now.request.question).inputs
    for recipe, expected in ((now.pruning.recipe, now.cost.kv_bytes), (None, now.cost.dense_kv_bytes)):
        with torch.no_grad(), fitprune.prune(served.model, now.pruning.recipe) as pruner:
            if recipe is None:
                with pruner.paused():
                    cache = served.model(**inputs).past_key_values
            else:
                cache = served.model(**inputs).past_key_values
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == expected


def test_several_people_get_their_own_answers(served):
    samples = fitprune.load_samples("digit-scenes/test")[:4]
    alone = [list(screen.run(served, request(served, sample, 60 + 5 * n)))[-1] for n, sample in enumerate(samples)]
    together = [None] * 4

    def ask(number):
        together[number] = list(screen.run(served, request(served, samples[number], 60 + 5 * number)))[-1]

    threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert one.pruned.ids == other.pruned.ids
        assert one.dense.ids == other.dense.ids
        assert torch.equal(one.kept.entered, other.kept.entered)


def test_who_leaves_frees_the_device_and_the_model(served, sample):
    running = screen.run(served, request(served, sample))
    next(running)
    assert served._device.locked()
    running.close()
    assert not served._device.locked()
    assert generated(served, sample) == list(screen.run(served, request(served, sample)))[-1].dense.ids


@pytest.mark.parametrize(
    ("percent", "method", "scorer"),
    [(60, "fitprune", ""), (0, "fitprune", ""), (60, "fastv", "self"), (70, "random", "")],
)
def test_the_python_lines_do_what_is_on_the_screen(served, sample, tmp_path, percent, method, scorer):
    *_, last = screen.run(served, request(served, sample, percent, method, scorer))
    (tmp_path / sample.image.name).write_bytes(sample.image.read_bytes())
    lines = python_lines(last, Source("'digit-scenes'"), served.recipes.statistics)
    ran = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    texts = [served.decode(answer.ids) for answer in (last.pruned, last.dense)]
    assert ran.stdout.split() == f"pruned: {texts[0]} dense: {texts[1]}".split()
    assert (tmp_path / "kept.png").exists()


def test_lines_hold_a_question_as_text_whatever_is_in_it(served, sample):
    now = screen.look(served, request(served, sample))
    question = "Is it \"a\"?\n{x} \\ ''' é"
    now = screen.dataclasses.replace(now, request=screen.dataclasses.replace(now.request, question=question))
    lines = python_lines(now, Source("'digit-scenes'"), "stats = None")
    compiled = compile(lines, "lines", "exec")
    assert question in compiled.co_consts
