"""The ways people call a model, under `prune`: each row as its sample alone, and as the masked dense oracle."""

import contextlib
import copy
import threading

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, StoppingCriteria, TextIteratorStreamer

from fitprune import prune
from fitprune.engine.prune import kept_positions
from helpers.calls import KEEP, NEW, ONE, PLAIN, SEVERAL, generate, recipe_of
from helpers.models import CACHE, IMAGE, Oracle, batch_of, cache_in, converse, prompts, replay, tiny_model

# Not multiples of anything: images of different size lose different numbers, and rows of a batch become ragged.
HOW = {
    "greedy": PLAIN,
    "sample": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 4},
}


def draw_by_sample(monkeypatch, samples):
    """Let each row draw from its own seeded numbers, so that a sample draws alike in any batch."""
    uniform = [torch.rand(NEW, generator=torch.Generator().manual_seed(sample)) for sample in samples]
    step = iter(range(NEW))

    def multinomial(probabilities, num_samples):
        assert num_samples == 1
        number = next(step)
        threshold = torch.stack([row[number] for row in uniform])[:, None]
        return (probabilities.cumsum(-1) < threshold).sum(-1, keepdim=True).clamp(max=probabilities.shape[-1] - 1)

    monkeypatch.setattr(torch, "multinomial", multinomial)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("layouts", [ONE, SEVERAL], ids=["one image", "0-3 images"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_each_row_equals_its_sample_alone_and_the_oracle(family, batch, side, layouts, how, attention, monkeypatch):
    model = tiny_model(family, attention=attention)
    samples = prompts(model, layouts[:batch])
    inputs = batch_of(samples, side)
    length = inputs["input_ids"].shape[1]
    with prune(model, recipe_of(model)):
        draw_by_sample(monkeypatch, range(batch))
        together = generate(model, inputs, **HOW[how])
        answer = together.sequences[:, length:]
        pruned = replay(model, inputs, answer)
        for number, sample in enumerate(samples):
            draw_by_sample(monkeypatch, [number])
            alone = generate(model, sample, **HOW[how])
            assert torch.equal(answer[number], alone.sequences[0, sample["input_ids"].shape[1] :])
            if how == "beam":
                assert torch.allclose(together.sequences_scores[number], alone.sequences_scores[0], atol=1e-4)
            else:
                assert torch.allclose(
                    torch.stack(together.logits)[:, number], torch.stack(alone.logits)[:, 0], atol=1e-4
                )
    if how != "beam":
        assert torch.allclose(torch.stack(together.logits, 1), pruned, atol=1e-4)
    reference = tiny_model(family, attention="eager")
    expected = replay(reference, inputs, answer, oracle=Oracle(reference, KEEP))
    assert torch.allclose(pruned, expected, atol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_equal_length_become_ragged(family, masked):
    """No padding in the prompt, so no mask of the model's own; but the rows keep different numbers of tokens."""
    model = tiny_model(family)
    layouts = [[3, 6], [4, 2, 5], [9]]
    lengths = [sample["input_ids"].shape[1] for sample in prompts(model, layouts)]
    for layout, length in zip(layouts, lengths, strict=True):
        layout[-1] += max(lengths) - length
    samples = prompts(model, layouts)
    inputs = batch_of(samples)
    if not masked:
        del inputs["attention_mask"]
    with prune(model, recipe_of(model)):
        together = generate(model, inputs, **PLAIN)
        for number, sample in enumerate(samples):
            alone = generate(model, sample, **PLAIN)
            assert torch.equal(together.sequences[number], alone.sequences[0])
            assert torch.allclose(torch.stack(together.logits)[:, number], torch.stack(alone.logits)[:, 0], atol=1e-4)


# -- conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_turns_in_any_order_of_text_and_images(family, side, attention):
    """Rows differ in length in every turn; a text turn before the images leaves its padding in layers pruned later."""
    model, reference = tiny_model(family, attention=attention), tiny_model(family, attention="eager")
    text, images, more = [[2], [6], [4]], [[3, 5], [4, 4], [2, 1, 6]], [[1, 4], [7], [5, 2]]
    answers = torch.randint(10, 97, (4, 3, 3), generator=torch.Generator().manual_seed(4))
    for order in ([images, text], [images, more], [text, images], [images, text, more], [text, text, images, text]):
        turns = [
            (batch_of(prompts(model, layouts, seed=number), side), answers[number])
            for number, layouts in enumerate(order)
        ]
        with prune(model, recipe_of(model)):
            pruned = converse(model, turns)
            for row in range(3):
                alone = converse(model, [(one_of(turn, row), answer[row : row + 1]) for turn, answer in turns])
                assert torch.allclose(pruned[row], alone[0], atol=1e-4)
        expected = converse(reference, turns, oracle=Oracle(reference, KEEP))
        assert torch.allclose(pruned, expected, atol=1e-4)


def test_a_turn_with_images_may_hide_some_of_the_past(family):
    model, reference = tiny_model(family), tiny_model(family, attention="eager")
    first, second = prompts(model, [[4, 6], [3, 5]])
    length = first["input_ids"].shape[1]
    mask = grown(torch.cat([first["attention_mask"], second["attention_mask"]], 1), 3)
    mask[:, [1, 2, 6, length - 1]] = 0
    oracle = Oracle(reference, KEEP)

    def talk(model, prefill, step):
        images = {n: v for n, v in second.items() if n not in ("input_ids", "attention_mask")}
        with prefill(first["input_ids"], first["attention_mask"]):
            cache = cache_in(model(**first))
        upto = mask[:, :-3]
        with prefill(second["input_ids"], upto):
            call = {"input_ids": second["input_ids"], "attention_mask": upto, CACHE: cache, **images}
            found = [model(**call).logits[:, -1]]
        for number in (2, 1, 0):
            upto = mask[:, : mask.shape[1] - number]
            with step(upto):
                call = {"input_ids": torch.tensor([[11]]), "attention_mask": upto, CACHE: cache}
                found.append(model(**call).logits[:, -1])
        return torch.stack(found)

    def nothing(*_):
        return contextlib.nullcontext()

    with torch.no_grad():
        with prune(model, recipe_of(model)):
            pruned = talk(model, nothing, nothing)
        assert torch.allclose(pruned, talk(reference, oracle.prefill, oracle.step), atol=1e-4)


def one_of(batch, row):
    """A sample of a batch without its padding."""
    valid = batch["attention_mask"][row].bool()
    sample = {name: batch[name][row : row + 1, valid] for name in ("input_ids", "attention_mask")}
    if "pixel_values" in batch:
        per_image = (batch["input_ids"] == IMAGE).sum(1).tolist()
        images = [0, *images_until(batch, per_image)]
        some = slice(images[row], images[row + 1])
        sample |= {n: batch[n][some] for n in ("pixel_values", "image_sizes") if n in batch and per_image[row]}
    return sample


def images_until(batch, per_row):
    """How many of the batch's images belong to the rows up to each row."""
    ids = torch.nn.functional.pad(batch["input_ids"], (1, 0))
    starts = (ids[:, 1:] == IMAGE) & (ids[:, :-1] != IMAGE)
    return starts.sum(1).cumsum(0).tolist()


def test_generate_continues_a_conversation(family):
    """The way of the transformers documentation: the whole text again, and the cache."""
    model = tiny_model(family)
    samples = prompts(model, SEVERAL[:3])
    question = torch.randint(10, 97, (3, 5), generator=torch.Generator().manual_seed(9))

    def talk(inputs, question):
        first = model.generate(**inputs, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True, **PLAIN)
        ids = torch.cat([first.sequences, question], 1)
        mask = grown(inputs["attention_mask"], 9)
        cache = cache_in(first)
        second = model.generate(
            input_ids=ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=4, eos_token_id=None, **PLAIN
        )
        return second[:, ids.shape[1] - 9 :]

    with prune(model, recipe_of(model)):
        together = talk(batch_of(samples), question)
        for row, sample in enumerate(samples):
            assert torch.equal(together[row : row + 1], talk(sample, question[row : row + 1]))


def grown(mask, tokens):
    return torch.nn.functional.pad(mask, (0, tokens), value=1)


def test_what_is_kept_without_a_question_serves_any_question(family):
    """With scorer "self", prefix and question in one call equal the question put to the prefix's cache."""
    model = tiny_model(family)
    prefix = batch_of(prompts(model, [[3, 4, 2], [6, 1], [2, 3, 4, 1]]))
    past = prefix["input_ids"].shape[1]
    with prune(model, recipe_of(model), scorer="self"), torch.no_grad():
        cache = cache_in(model(**prefix, position_ids=positions(prefix)))
        for seed in range(3):
            question = torch.randint(10, 97, (3, 7), generator=torch.Generator().manual_seed(seed))
            whole = dict(prefix, input_ids=torch.cat([prefix["input_ids"], question], 1))
            whole["attention_mask"] = grown(prefix["attention_mask"], 7)
            expected = model(**whole, position_ids=positions(whole)).logits[:, past:]
            served = model(
                input_ids=question,
                attention_mask=whole["attention_mask"],
                position_ids=positions(whole)[:, past:],
                **{CACHE: copy.deepcopy(cache)},
            )
            assert torch.allclose(served.logits, expected, atol=1e-4)

    def kept(scorer, seed):
        whole["input_ids"][:, past:] = torch.randint(10, 97, (3, 7), generator=torch.Generator().manual_seed(seed))
        entered = kept_positions(model, recipe_of(model), whole, scorer)
        return [[row[row < past].tolist() for row in layer] for layer in entered]

    assert kept("self", 0) == kept("self", 1) == kept("self", 2)
    assert kept("fitprune", 0) != kept("fitprune", 1)


def positions(inputs):
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def test_adjacent_images_are_two_and_pooled_images_are_one(family):
    model = tiny_model(family)
    (inputs,) = prompts(model, [[3, 0, 6]])
    ids = inputs["input_ids"][0]
    recipe = recipe_of(model)
    with torch.no_grad():
        sizes = {n: inputs[n] for n in ("pixel_values", "image_sizes") if n in inputs}
        lengths = [len(features) for features in model.model.get_image_features(**sizes).pooler_output]
    own = kept_positions(model, recipe, inputs)[-1][0]
    border = 3 + lengths[0]
    own = own[ids[own] == IMAGE]
    assert [int((own < border).sum()), int((own >= border).sum())] == [recipe.kept(n)[-2] for n in lengths]
    pooled = kept_positions(model, recipe, inputs, pool_images=True)[-1][0]
    pooled = pooled[ids[pooled] == IMAGE]
    assert len(pooled) == recipe.kept(sum(lengths))[-2]


# -- ways of decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_without_a_cache_equals_decoding_with_one(family, side, beams):
    """Every step sends the answer so far; it must not become part of the question."""
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:3]), side)
    options = {"max_new_tokens": 6, "eos_token_id": None, "num_beams": beams, "suppress_tokens": [IMAGE], **PLAIN}
    with prune(model, recipe_of(model)):
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), model.generate(**inputs, **options))


@pytest.mark.parametrize("encoded", [False, True])
def test_another_prompt_of_one_more_token_is_no_answer(encoded):
    """Calls without a cache, the same images object: only a repeated prompt makes the second a continuation."""
    model = tiny_model()
    first, second = prompts(model, [[3, 5], [3, 6]])
    images = {"pixel_values": first["pixel_values"]}
    with torch.no_grad(), prune(model, recipe_of(model)):
        if encoded:
            images = {"mm_encoder_outputs": {"image": model.get_image_features(**images, return_dict=True)}}
        first, second = ({"input_ids": sample["input_ids"], **images} for sample in (first, second))
        expected = model(**second, use_cache=False).logits
        model(**first, use_cache=False)
        assert torch.equal(model(**second, use_cache=False).logits, expected)


def test_return_sequences_and_beams_share_a_prompt(family):
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    with prune(model, recipe_of(model)):
        greedy = generate(model, inputs, **PLAIN)
        torch.manual_seed(0)
        several = generate(model, inputs, do_sample=True, num_return_sequences=3)
        beams = generate(model, inputs, num_beams=4, num_return_sequences=4, **PLAIN)
    first = torch.stack(several.logits, 1)[:, 0]
    assert torch.allclose(first, torch.stack(greedy.logits, 1)[:, 0].repeat_interleave(3, 0), atol=1e-4)
    assert len(several.sequences) == 9
    assert len(beams.sequences.unique(dim=0)) == 12


@pytest.mark.parametrize("draft", ["the model itself", "another model", "text only"])
def test_assisted_decoding_equals_greedy(family, draft):
    model = tiny_model(family)
    if draft == "text only":
        torch.manual_seed(3)
        helper = {"assistant_model": LlamaForCausalLM(model.config.text_config).eval()}
    else:
        helper = {"assistant_model": tiny_model(family, seed=0 if draft == "the model itself" else 1)}
    with prune(model, recipe_of(model)):
        for seed in range(4):
            (inputs,) = prompts(model, [[3, 4, 6]], seed=seed)
            options = {"max_new_tokens": 12, "eos_token_id": None, **PLAIN}
            assert torch.equal(model.generate(**inputs, **options, **helper), model.generate(**inputs, **options))


@pytest.mark.parametrize("draft", ["look-up", "model"])
def test_drafts_behind_right_padding(family, draft):
    """Padding lies between prompt and draft; neither may shift what is asked."""
    model = tiny_model(family)
    helper = {"prompt_lookup_num_tokens": 3} if draft == "look-up" else {"assistant_model": tiny_model(family, seed=1)}
    for seed in range(4):
        (sample,) = prompts(model, [[3, 8]], seed=seed)
        sample["input_ids"][0, -3:] = sample["input_ids"][0, -6:-3]  # a repetition, for the look-up to find
        padded = dict(sample)
        for name in ("input_ids", "attention_mask"):
            padded[name] = torch.nn.functional.pad(sample[name], (0, 3))
        options = {"max_new_tokens": 8, "eos_token_id": None, "suppress_tokens": [IMAGE], **PLAIN}
        with prune(model, recipe_of(model)):
            expected = model.generate(**sample, **options)[:, -8:]
            assert torch.equal(model.generate(**padded, **options)[:, -8:], expected)
            assert torch.equal(model.generate(**padded, **options, **helper)[:, -8:], expected)


def test_a_streamer_gets_the_tokens_while_another_thread_generates(family):
    model = tiny_model(family)
    (inputs,) = prompts(model, [[3, 6]])

    class Words:
        def decode(self, ids, **_):
            return "".join(f" {int(i)}" for i in ids)

    with prune(model, recipe_of(model)):
        expected = generate(model, inputs, **PLAIN).sequences[0, inputs["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
        thread = threading.Thread(target=generate, args=(model, inputs), kwargs={"streamer": streamer, **PLAIN})
        thread.start()
        words = "".join(streamer).split()
        thread.join()
    assert words == [str(int(token)) for token in expected]


def test_logits_keep_their_places(family):
    """Dense shape, the same rows by any index, zero hidden state where a token left."""
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    ids = inputs["input_ids"]
    with prune(model, recipe_of(model)), torch.no_grad():
        whole = model(**inputs).logits
        last = model(**inputs, logits_to_keep=1).logits
        chosen = model(**inputs, logits_to_keep=torch.tensor([0, ids.shape[1] - 1])).logits
        pair = model(**inputs, logits_to_keep=torch.tensor([ids.shape[1] - 2, -1])).logits
        short = model(**inputs, logits_to_keep=2).logits
    assert whole.shape == (*ids.shape, 97)
    assert torch.allclose(whole[:, -1:], last, atol=1e-5)
    assert torch.allclose(whole[:, [0, -1]], chosen, atol=1e-5)
    assert torch.allclose(pair, short, atol=1e-5)  # both end the question one token early
    # The last layer's removals leave after the last entry of kept_positions; the recipe removes none there.
    kept = kept_positions(model, recipe_of(model), inputs)[-1]
    there = torch.zeros(len(ids), ids.shape[1] + 1, dtype=torch.bool).scatter(1, kept % (ids.shape[1] + 1), True)
    assert torch.equal((whole != 0).any(-1), there[:, :-1])


@pytest.mark.skipif(transformers.__version__.startswith("5.19."), reason="it takes no logits_to_keep by row")
def test_logits_asked_for_by_row_end_the_question_of_that_row(family):
    """In every form that transformers takes: columns or a mask, for all rows or each."""
    model = tiny_model(family)
    samples = prompts(model, [[3, 6], [2, 11], [4, 8]])
    inputs = batch_of(samples, "right")
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    columns = last - torch.tensor([[2], [1], [0]])  # of each row another number of tokens is answer
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool).scatter(1, columns, True)
    with prune(model, recipe_of(model)), torch.no_grad():
        by_row = model(**inputs, position_ids=positions(inputs), logits_to_keep=columns).logits
        assert torch.allclose(model(**inputs, position_ids=positions(inputs), logits_to_keep=mask).logits, by_row[:, 0])
        for row, sample in enumerate(samples):
            alone = model(**sample, logits_to_keep=3 - row).logits[:, :1]
            assert torch.allclose(by_row[row], alone[0], atol=1e-4)
        whole = model(**samples[0]).logits
        length = whole.shape[1]
        for everything in (length, torch.ones(length, dtype=torch.bool), torch.arange(length)):
            assert torch.equal(model(**samples[0], logits_to_keep=everything).logits, whole)
        three = model(**samples[0], logits_to_keep=3).logits
        for same in ([-3, -2, -1], slice(-3, None), 3 - length, torch.tensor([-1, -2, -3])):
            found = model(**samples[0], logits_to_keep=same).logits
            assert torch.equal(found.flip(1) if isinstance(same, torch.Tensor) else found, three)


def test_a_hook_may_call_the_model_again(family):
    model = tiny_model(family)
    outer, inner = prompts(model, [[3, 6], [2, 4, 5]])
    with torch.no_grad(), prune(model, recipe_of(model)):
        expected = [model(**outer).logits, model(**inner).logits]
        for layer in (0, 2, 4):
            found = []

            def call_again(*_, found=found):
                if not found:
                    found.append(None)  # the inner call comes by here too
                    found.append(model(**inner).logits)

            handle = model.model.language_model.layers[layer].mlp.act_fn.register_forward_hook(call_again)
            found.append(model(**outer).logits)
            handle.remove()
            assert torch.equal(found[1], expected[1])
            assert torch.equal(found[2], expected[0])


def test_a_nested_call_that_dies_early_does_not_end_the_outer_one():
    """In a hook that the user put on before prune's."""
    model = tiny_model()
    outer, inner = prompts(model, [[3, 6], [2, 5]])
    with torch.no_grad(), prune(model, recipe_of(model)):
        expected = model(**outer).logits
    nested = []

    def refuse(*_):
        if nested:
            raise RuntimeError("not now")

    def call_again(*_):
        nested.append(True)
        with pytest.raises(RuntimeError, match="not now"):
            model(**inner)
        nested.clear()

    handles = [model.register_forward_pre_hook(refuse)]
    handles.append(model.model.language_model.layers[4].mlp.register_forward_hook(call_again))
    with torch.no_grad(), prune(model, recipe_of(model)):
        assert torch.equal(model(**outer).logits, expected)
    for handle in handles:
        handle.remove()


def test_a_call_between_the_steps_of_generate_does_not_disturb_it(family):
    model = tiny_model(family)
    inputs, other = prompts(model, [[3, 6], [2, 5]])

    class CallsTheModel(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            model(**other, use_cache=False)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"max_new_tokens": 5, "eos_token_id": None, "suppress_tokens": [IMAGE], "use_cache": False, **PLAIN}
    with prune(model, recipe_of(model)):
        expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, stopping_criteria=[CallsTheModel()]), expected)


def test_positions_of_ones_own_stay(family):
    """Only generate's miscount behind right padding is put right."""
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:3]), "right")
    more = grown(inputs["attention_mask"], 1)
    with torch.no_grad(), prune(model, recipe_of(model)):
        cache = cache_in(model(**inputs, position_ids=positions(inputs)))
        step = {"input_ids": torch.full((3, 1), 11), "attention_mask": more}
        found = []
        for where in (positions({"attention_mask": more})[:, -1:], torch.ones(3, 1).long(), torch.full((3, 1), 99)):
            found.append(model(**step, position_ids=where, **{CACHE: copy.deepcopy(cache)}).logits)
    ends_in_padding = inputs["attention_mask"][:, -1] == 0
    assert torch.equal(found[0][ends_in_padding], found[1][ends_in_padding])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_a_mask_that_hides_the_image_leaves_nothing_to_prune(family):
    model = tiny_model(family)
    (inputs,) = prompts(model, [[3, 6]])
    inputs["attention_mask"] = (inputs["input_ids"] != IMAGE).long()
    with torch.no_grad():
        dense = model(**inputs).logits[:, -6:]
        with prune(model, recipe_of(model)):
            assert torch.allclose(model(**inputs).logits[:, -6:], dense, atol=1e-5)


def test_labels_give_the_loss_of_the_masked_dense_model(family):
    """And neither the answer nor its length decides what leaves."""
    model, reference = tiny_model(family), tiny_model(family, attention="eager")
    samples = prompts(model, [[3, 5], [2, 4, 6]])
    question = batch_of(samples, "right")
    answer = torch.randint(10, 97, (2, 4), generator=torch.Generator().manual_seed(1))
    long = [dict(sample) for sample in samples]
    for row, sample in enumerate(long):
        sample["input_ids"] = torch.cat([sample["input_ids"], answer[row : row + 1]], 1)
        sample["attention_mask"] = grown(sample["attention_mask"], 4)
    for side in ("left", "right"):
        inputs = batch_of(long, side)
        labels = torch.full_like(inputs["input_ids"], -100)
        for row in range(2):
            end = int(inputs["attention_mask"][row].nonzero().max()) + 1
            labels[row, end - 4 : end] = answer[row]
        with prune(model, recipe_of(model)):
            loss = model(**inputs, position_ids=positions(inputs), labels=labels).loss
            loss.backward()
        expected = replay(reference, question, answer, oracle=Oracle(reference, KEEP))
        masked = torch.nn.functional.cross_entropy(expected.flatten(0, 1), answer.flatten())
        assert torch.allclose(loss, masked, atol=1e-4)
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_inputs_embeds_in_place_of_ids(family):
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    with prune(model, recipe_of(model)), torch.no_grad():
        expected = generate(model, inputs, **PLAIN).sequences[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(generate(model, embedded, **PLAIN).sequences, expected)
        assert torch.equal(model(**embedded).logits, model(**inputs).logits)


def test_cropping_a_pruned_cache_takes_columns_off(family):
    """Back to the end of the prompt, into it, and before its image: as if the rest had never been."""
    model = tiny_model(family)
    (inputs,) = prompts(model, [[5, 8]])
    length = inputs["input_ids"].shape[1]
    answer = torch.tensor([[11, 12, 13]])
    with prune(model, recipe_of(model)), torch.no_grad():
        cache = cache_in(model(**inputs))
        first = model(input_ids=answer, **{CACHE: cache}).logits
        for back in (3, 3 + 4):  # the answer; the answer and half of the question
            cache.crop(-back)
            again = torch.cat([inputs["input_ids"], answer], 1)[:, -back:]
            assert torch.allclose(model(input_ids=again, **{CACHE: cache}).logits[:, -3:], first, atol=1e-4)
        cache.crop(-(length + 3 - 5))
        assert [cache.get_seq_length(layer) for layer in range(5)] == [5] * 5
        again = torch.cat([inputs["input_ids"][:, 5:], answer], 1)
        question = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
        logits = model(input_ids=again, **{CACHE: cache}, logits_to_keep=4, **question).logits
        assert torch.allclose(logits[:, 1:], first, atol=1e-4)


def test_cropping_a_ragged_cache_takes_from_each_row_its_own(family):
    """Into the images, where rows keep different numbers of tokens: then each row goes on as its sample does."""
    model = tiny_model(family)
    samples = prompts(model, [[5, 8], [2, 3, 4], [9, 4]])
    inputs = batch_of(samples)
    length = inputs["input_ids"].shape[1]
    more = torch.randint(10, 97, (3, 4), generator=torch.Generator().manual_seed(2))

    def back_and_on(inputs, more, back):
        cache = cache_in(model(**inputs, position_ids=positions(inputs)))
        cache.crop(-back)
        mask = grown(inputs["attention_mask"][:, :-back], 4)
        where = positions({"attention_mask": mask})[:, -4:]
        return model(input_ids=more, attention_mask=mask, position_ids=where, **{CACHE: cache}).logits

    with torch.no_grad(), prune(model, recipe_of(model)):
        for back in (3, 6, 12):
            together = back_and_on(inputs, more, back)
            for row, sample in enumerate(samples):
                assert torch.allclose(
                    together[row : row + 1], back_and_on(sample, more[row : row + 1], back), atol=1e-4
                )
    assert length > 12


@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_of_a_ragged_cache_move_with_their_columns(family, how):
    """What beam search, several return sequences and contrastive search do to a cache, here across samples."""
    model = tiny_model(family)
    inputs = batch_of(prompts(model, SEVERAL[:3]))
    tokens = torch.tensor([[11, 12], [13, 14], [15, 16]])
    rows = {"reorder_cache": [2, 0, 0], "batch_select_indices": [2, 1], "batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}[
        how
    ]

    def go_on(cache, rows):
        mask = grown(inputs["attention_mask"], 2)[rows]
        where = positions({"attention_mask": mask})[:, -2:]
        call = {"input_ids": tokens[rows], "attention_mask": mask, "position_ids": where, CACHE: cache}
        return model(**call).logits

    with torch.no_grad(), prune(model, recipe_of(model)):
        cache = cache_in(model(**inputs, position_ids=positions(inputs)))
        expected = go_on(copy.deepcopy(cache), [0, 1, 2])[rows]
        getattr(cache, how)(2 if how == "batch_repeat_interleave" else torch.tensor(rows))
        assert torch.allclose(go_on(cache, rows), expected, atol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        first = model(**inputs, position_ids=positions(inputs), **{CACHE: cache})
        assert torch.allclose(go_on(cache_in(first), [0, 1, 2])[rows], expected, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_that_hides_more_of_the_past_later_is_obeyed(family, side):
    """Decoding takes a short way while the mask says of the past what it said then; no longer."""
    model, reference = tiny_model(family), tiny_model(family, attention="eager")
    inputs = batch_of(prompts(model, SEVERAL[:3]), side)
    oracle = Oracle(reference, KEEP)
    mask = grown(inputs["attention_mask"], 1)
    where = positions({"attention_mask": mask})[:, -1:]
    hidden = mask.clone()
    hidden[:, 1:8] = 0
    with torch.no_grad():
        with oracle.prefill(inputs["input_ids"], inputs["attention_mask"]):
            dense = cache_in(reference(**inputs, position_ids=positions(inputs)))
        with prune(model, recipe_of(model)):
            cache = cache_in(model(**inputs, position_ids=positions(inputs)))
            for now in (mask, hidden):
                step = {"input_ids": torch.full((3, 1), 11), "attention_mask": now, "position_ids": where}
                found = model(**step, **{CACHE: copy.deepcopy(cache)}).logits
                with oracle.step(now):
                    expected = reference(**step, **{CACHE: copy.deepcopy(dense)}).logits
                assert torch.allclose(found, expected, atol=1e-4)
