"""Every family, on a tiny random model built from its real config class. A new one is a row of `families.ROWS`."""

import copy
import dataclasses
import functools

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

from fitprune import PruningRecipe, fit, fit_sequential, make_batches, measure, prune, search
from fitprune.baselines.table import make_method
from fitprune.calibration.samples import Sample
from fitprune.costs import flops
from fitprune.engine.prune import kept_positions
from fitprune.evaluation.entries import Entry, readable
from fitprune.families.adapter import adapt
from fitprune.families.config import fingerprint_of, say_generic
from fitprune.families.images import read_images
from fitprune.families.table import Family
from fitprune.fitting.budget import OutOfReach, checked_budget
from fitprune.fitting.fit import Fitter
from helpers.families import PADDING, ROWS, picture
from helpers.models import COUNTED, cache_in

STEPS = 8
FRACTIONS = (0.8, 0.8, 0.6, 0.6, 0.3, 0.3)  # kept after each layer, where the family lets tokens leave


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request):
    return request.param


@functools.cache
def built(name):
    """A row's model and samples, once for all tests."""
    row = next(row for row in ROWS if row.name == name)
    model = row.make_model()
    return model, row.samples(model)


def recipe_for(model):
    """Tokens leave at every second layer, or where the family lets them."""
    fingerprint = adapt(model).fingerprint
    keep, left = [], 1.0
    for layer, fraction in enumerate(FRACTIONS):
        left = min(left, fraction) if layer in fingerprint.decoder.prunable else left
        keep.append(left)
    return PruningRecipe(tuple(keep), fingerprint, 16)


def greedy(model, inputs, steps=STEPS):
    """Logits of the prompt's last token and of each greedy step [B, steps + 1, V], tokens and cache, by generate."""
    made = model.generate(
        **inputs,
        max_new_tokens=steps + 1,
        do_sample=False,
        suppress_tokens=[*adapt(model).token_ids.values()],  # a visual token in the answer has no image
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.logits, 1), made.sequences[:, inputs["input_ids"].shape[1] :], cache_in(made)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_a_recipe_that_removes_nothing_is_bit_identical_to_dense(row):
    model, samples = built(row.name)
    batch = row.collate(samples)
    recipe = PruningRecipe.dense(adapt(model).fingerprint, 16)
    with torch.no_grad():
        dense = model(**batch).logits
        answers = greedy(model, batch)
        with prune(model, recipe):
            assert torch.equal(model(**batch).logits, dense)
            pruned = greedy(model, batch)
    assert torch.equal(pruned[0], answers[0])
    assert torch.equal(pruned[1], answers[1])


class GatheredOracle:
    """The dense eager model, layer by layer, without the tokens that left. Shares no code with fitprune.

    One sample, no cache: prompt and answer run together, and at each layer the rows that are gone are taken out of
    hidden states, positions and mask. Which go, full attention maps of the prompt's rows decide: of each image, those
    with the lowest product of received self and cross attention, maximum over heads.
    """

    def __init__(self, model, keep, image, prompt):
        self.model, self.keep, self.prompt = model, keep, prompt
        self.image = image  # [N] of the prompt: which image each column belongs to, -1 for text
        base = model.model
        decoder = getattr(base, "language_model", None) or base.text_model
        self.layers = decoder.layers

    def logits(self, inputs, answer):
        """Logits of the prompt's last token and of every token of `answer` [T]: [T + 1, V]."""
        length = self.prompt + len(answer)
        kept = torch.arange(length)
        handles = []

        def cut(value):
            if not isinstance(value, torch.Tensor) or value.ndim < 2 or length not in value.shape:
                return value
            if value.ndim == 4 and value.shape[-2:] == (length, length):
                return value[:, :, kept][..., kept]
            axis = -1 if value.shape[-1] == length else -2
            return value.index_select(axis, kept)

        def before(_, args, kwargs):
            kwargs = {
                name: tuple(cut(v) for v in value) if isinstance(value, tuple) else cut(value)
                for name, value in kwargs.items()
            }
            return args, kwargs

        def attended(number):
            def hook(_, __, output):
                nonlocal next_kept
                weights = output[1][0].amax(0)  # [rows, keys]
                own_image = torch.where(kept < self.prompt, self.image[kept.clamp(max=self.prompt - 1)], -1)
                last = int(torch.nonzero(self.image >= 0).max())
                question = (kept > last) & (kept < self.prompt)
                leaves = torch.zeros(len(kept), dtype=torch.bool)
                for which in range(int(self.image.max()) + 1):
                    member = torch.nonzero(own_image == which)[:, 0]
                    whole = int((self.image == which).sum())
                    left = int(self.keep[number] * whole + 0.5)
                    score = weights[member][:, member].mean(0) * weights[question][:, member].mean(0)
                    leaves[member[score.argsort(stable=True)[: len(member) - left]]] = True
                next_kept = torch.nonzero(~leaves)[:, 0]

            return hook

        def after(_, __, output):
            nonlocal kept, next_kept
            if next_kept is None:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            kept, chosen, next_kept = kept[next_kept], next_kept, None
            hidden = hidden[:, chosen]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        next_kept = None
        entered = []
        handles.append(self.layers[0].register_forward_pre_hook(lambda *_: entered.clear()))
        for number, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_pre_hook(lambda *_: entered.append(len(kept))))
            if hasattr(layer, "self_attn"):
                handles.append(layer.self_attn.register_forward_hook(attended(number)))
            handles.append(layer.register_forward_hook(after))
        try:
            with torch.no_grad():
                # All rows left, in order: the answer's are the last ones.
                found = self.model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return found, entered


def whole_inputs(model, sample, answer):
    """The prompt with the answer after it, as one dense prefill."""
    inputs = dict(sample)
    typed = adapt(model).family.answer_type
    inputs["input_ids"] = torch.cat([sample["input_ids"], answer[None]], 1)
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in sample:
            value = 1 if name == "attention_mask" else typed
            inputs[name] = torch.cat([sample[name], torch.full_like(answer[None], value)], 1)
    inputs.pop("labels", None)
    return inputs


def test_pruned_logits_and_greedy_steps_equal_the_dense_oracle(row):
    """And the KV cache holds what the recipe says."""
    model, samples = built(row.name)
    recipe = recipe_for(model)
    reference = row.make_model()
    reference.set_attn_implementation({"text_config": "eager"})
    adapted = adapt(model)
    for sample in samples[:2]:
        with torch.no_grad(), prune(model, recipe):
            logits, answer, cache = greedy(model, sample)
            image = read_images(adapted, sample).image[0]
        prompt = sample["input_ids"].shape[1]
        oracle = GatheredOracle(reference, recipe.keep, image, prompt)
        expected, entered = oracle.logits(whole_inputs(model, sample, answer[0, :-1]), answer[0, :-1])
        assert relative(logits[0], expected) < 1e-4
        expected[:, [*adapted.token_ids.values()]] = -torch.inf
        assert torch.equal(expected.argmax(-1), answer[0])
        held = [cache.layers[layer].keys.shape[-2] for layer in adapted.fingerprint.decoder.attention_layers]
        windows = [adapted.windows[layer] for layer in adapted.fingerprint.decoder.attention_layers]
        expected_held = [entered[layer] for layer in adapted.fingerprint.decoder.attention_layers]
        for there, predicted, window in zip(held, expected_held, windows, strict=True):
            assert there == predicted or (window and there <= min(predicted, 2 * window))


def assert_rows_as_alone(model, batch, samples):
    together, answers, _ = greedy(model, batch)
    for number, sample in enumerate(samples):
        alone, answer, _ = greedy(model, sample)
        assert relative(together[number], alone[0]) < 1e-4
        assert torch.equal(answers[number], answer[0])


def test_a_ragged_batch_equals_its_rows_alone(row):
    model, samples = built(row.name)
    rows = samples[:3]
    with torch.no_grad(), prune(model, recipe_for(model)):
        assert_rows_as_alone(model, row.collate(rows), rows)


def test_executed_flops_and_kv_bytes_equal_the_cost_model(row, monkeypatch):
    """FLOPs of decoder, scoring and head; the images are encoded ahead, as generate does."""
    model, samples = built(row.name)
    adapted, recipe = adapt(model), recipe_for(model)
    if adapted.decoder.config._attn_implementation != "sdpa":  # no log-sum-exp, so the softmax is made, in small blocks
        monkeypatch.setattr(flops, "SCORE_BLOCK", 64)
        monkeypatch.setattr(flops, "LSE_COLUMNS", 0)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the counter does not know grouped matrix products
    sample = dict(samples[0])
    sample.pop("labels", None)
    with torch.no_grad():
        seen = read_images(adapted, sample)
        call = {**sample, **seen.changed, "use_cache": False, "logits_to_keep": 1}
        counts = []
        for recipe_used in (PruningRecipe.dense(adapted.fingerprint, 16), recipe):
            with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, prune(model, recipe_used):
                model(**call)
            counts.append(counter.get_total_flops())
    visual = int(seen.visual.sum())
    where = torch.nonzero(seen.visual[0])[:, 0]
    length = sample["input_ids"].shape[1]
    after = length - 1 - int(where[-1])
    sizes = torch.unique(seen.image[seen.image >= 0], return_counts=True)[1].tolist()
    for executed, used in zip(counts, (PruningRecipe.dense(adapted.fingerprint, 16), recipe), strict=True):
        removed = [sum(layer) for layer in zip(*(used.counts(size) for size in sizes), strict=True)]
        cost = flops.prefill_flops(
            adapted.fingerprint, visual, removed, text_before=length - visual - after, text_after=after, value_bytes=4
        )
        assert executed == pytest.approx(cost.decoder + cost.scoring + cost.head, rel=0.01)
        with torch.no_grad(), prune(model, used):
            cache = cache_in(model(**{**call, "use_cache": True}))
        layers = [cache.layers[layer] for layer in adapted.fingerprint.decoder.attention_layers]
        held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in layers)
        priced = flops.kv_bytes(
            adapted.fingerprint.decoder, visual, removed, text_tokens=length - visual, value_bytes=4
        )
        assert held == priced or (any(adapted.windows) and held < priced)


def test_measure_and_fit_give_a_recipe_that_the_model_takes(row):
    model, samples = built(row.name)
    stats = measure(model, samples)
    assert stats.model.config_hash
    decoder = stats.model.decoder
    bound = flops.visual_flops_reduction(
        decoder, 16, [0] * decoder.first_prunable + [16] + [0] * (5 - decoder.first_prunable)
    )
    recipe = fit(stats, flops_reduction=0.5 * bound)
    removing = [layer for layer, count in enumerate(recipe.counts(stats.usual_visual_tokens)) if count]
    assert removing
    assert set(removing) <= set(decoder.prunable)
    with torch.no_grad(), prune(model, recipe):
        assert torch.isfinite(model(**samples[1]).logits).all()
    alone = measure(model, [row.collate(samples)])
    assert torch.allclose(alone.self_attention, stats.self_attention, atol=1e-5)
    assert torch.allclose(alone.cross_attention, stats.cross_attention, atol=1e-5)


# Which tokens are one image: tokens of each image or frame of the first two samples, counted by hand.
SHARES = {
    "llava": [[16], [16, 16]],
    "qwen2_5_vl": [[16], [32, 32]],
    "qwen2_5_vl-video": [[16, 16], None],
    "qwen3_vl-video": [[16, 16], None],
    "glm4v-video": [[16, 16], None],
    "llava_onevision-video": [[4, 4, 4, 5], None],
    "llava_next_video": [[4, 4, 4, 4], None],
    "video_llava": [[17, 17, 17, 17], None],
    "internvl-video": [[9, 9, 9, 9], [9, 9, 9, 9, 9]],
    "idefics3": [[20], [12, 12]],
    "aya_vision": [[9], [27, 27]],
    "cohere2_vision": [[9], [27, 27]],
    "lfm2_vl": [[16], [44, 44]],
    "mistral3": [[16], [18, 18]],
}


@pytest.mark.parametrize("name", SHARES)
def test_each_image_and_each_frame_has_its_own_share(name):
    model, samples = built(name)
    adapted = adapt(model)
    recipe = recipe_for(model)
    for sample, expected in zip(samples, SHARES[name], strict=False):
        with torch.no_grad():
            seen = read_images(adapted, sample)
            columns = kept_positions(model, recipe, sample)[-1][0]
        image = seen.image[0]
        sizes = torch.bincount(image[image >= 0]).tolist()
        assert expected is None or sizes == expected
        left = torch.bincount(image[columns][image[columns] >= 0], minlength=len(sizes)).tolist()
        assert left == [recipe.kept(size)[-2] for size in sizes]


def test_an_image_of_one_or_two_tokens_keeps_one_as_the_cost_says():
    """Recipe 60 to 90%: the share of a picture of 8 x 8 pixels rounds to nothing."""
    model, _ = built("qwen2_vl")
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    pad, start, end = (getattr(model.config, name) for name in names)
    generator = torch.Generator().manual_seed(3)
    ids, grids = [40], [(2, 2), (2, 4), (4, 4)]  # patches, of which four make a token: 1, 2 and 4 tokens
    for height, width in grids:
        ids += [start, *[pad] * (height * width // 4), end]
    inputs = {
        "input_ids": torch.tensor([[*ids, 41, 42]]),
        "attention_mask": torch.ones(1, len(ids) + 2, dtype=torch.long),
        "pixel_values": torch.randn(sum(h * w for h, w in grids), 96, generator=generator),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        "mm_token_type_ids": torch.tensor([[*(int(i == pad) for i in ids), 0, 0]]),
    }
    fingerprint = adapt(model).fingerprint
    for left in (0.4, 0.1, 0.0):
        keep = (1.0, 0.5, *[left] * (fingerprint.decoder.layers - 2))
        recipe = PruningRecipe(keep, fingerprint, 64)
        entered = kept_positions(model, recipe, inputs)
        visual = (inputs["input_ids"] == pad)[0].nonzero()[:, 0]
        owner = torch.tensor([0, 1, 1, 2, 2, 2, 2])
        for number, tokens in enumerate((1, 2, 4)):
            own = visual[owner == number]
            counts = [int(torch.isin(own, columns[0]).sum()) for columns in entered]
            assert counts == [tokens, *recipe.kept(tokens)[:-1]]
            assert (min(counts) > 0) == (left > 0)
            assert recipe.cost(visual_tokens=tokens).mean_visual_tokens == sum(counts) / len(counts)


def test_frames_are_found_where_generate_has_encoded_the_video():
    """There the grid is gone, and rotary positions tell."""
    model, samples = built("qwen2_5_vl-video")
    adapted = adapt(model)
    for sample in samples[:3]:
        with torch.no_grad():
            seen = read_images(adapted, sample)
            given = {k: sample[k] for k in ("input_ids", "attention_mask")} | seen.changed
            positions, _ = model.model.get_rope_index(
                sample["input_ids"],
                sample["mm_token_type_ids"],
                sample.get("image_grid_thw"),
                sample.get("video_grid_thw"),
            )
            assert torch.equal(read_images(adapted, {**given, "position_ids": positions}).image, seen.image)
            with pytest.raises(ValueError, match="frames of a video are unknown: pass video_grid_thw"):
                read_images(adapted, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flex_attention's masks
def test_a_window_that_the_implementation_does_not_show():
    row = next(row for row in ROWS if row.name == "gemma3")
    model = row.make_model()
    model.set_attn_implementation({"text_config": "flex_attention"})
    with (
        torch.no_grad(),
        prune(model, recipe_for(model)),
        pytest.raises(ValueError, match="load the model with 'sdpa'"),
    ):
        model(**row.samples(model)[1])


def test_the_generic_adapter_says_that_it_was_used(caplog):
    model, _ = built("got_ocr2")
    say_generic.cache_clear()
    adapt(model)
    adapt(model)
    assert caplog.text.count("'got_ocr2' is not in the table of families") == 1
    caplog.clear()
    adapt(built("llava")[0])
    assert not caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tf.MllamaConfig(), "refused, because images enter by cross-attention"),
        (tf.Blip2Config(), "refused, because its decoder may be an encoder-decoder"),
        (tf.LlamaConfig(), "not supported, because it has no text_config"),
        (tf.Gemma3nConfig(), "refused, because its layers share keys"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_families_that_are_refused_say_why(config, message):
    with pytest.raises(ValueError, match=message):
        fingerprint_of(config)


def test_tokens_leave_only_where_the_family_lets_them():
    for name, layers in {"qwen3_vl": [0, 1], "qwen3_5": [0, 1, 3, 4], "lfm2_vl": None}.items():
        model, _ = built(name)
        fingerprint = adapt(model).fingerprint
        forbidden = [layer for layer in range(6) if layer not in fingerprint.decoder.prunable]
        assert layers in (None, forbidden)
        early = PruningRecipe((0.5,) * 6, fingerprint, 16)
        with pytest.raises(ValueError, match=r"recipe removes tokens at layers \[0\]"), prune(model, early):
            pass


def test_a_fingerprint_tells_models_of_one_shape_apart():
    """Another image token or architecture is refused; fine-tunes, other vocabularies and force pass."""
    model, samples = built("llava_next")
    fingerprint = adapt(model).fingerprint
    for changed, message in [
        ({"image_token_id": 9}, "image_token_id 9 there"),
        ({"config_hash": "other"}, "config_hash other there"),
        ({"model_type": "llava"}, "model_type llava there"),
    ]:
        recipe = PruningRecipe((0.5,) * 6, dataclasses.replace(fingerprint, **changed), 16)
        with pytest.raises(ValueError, match=message), prune(model, recipe):
            pass
        with torch.no_grad(), prune(model, recipe, force=True):
            model(**samples[0])
    config = copy.deepcopy(model.config)
    assert fingerprint_of(config).config_hash == fingerprint.config_hash
    config.text_config.vocab_size += 64
    config.text_config.attention_dropout = 0.5
    assert fingerprint_of(config).config_hash == fingerprint.config_hash
    config.text_config.head_dim = 32
    assert fingerprint_of(config).config_hash != fingerprint.config_hash
    assert (
        PruningRecipe.from_json(PruningRecipe.dense(fingerprint, 16).to_json()).model.config_hash
        == fingerprint.config_hash
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of some processors, with numpy 2
def test_batches_of_the_real_processor_go_the_whole_way(row):
    """From samples with one image each, as the command line reads them, to pruned answers."""
    if row.processor is None:
        pytest.skip("its processor's module needs torchvision")
    if row.name == "got_ocr2":
        pytest.skip("its processor makes pages to read, of 256 tokens, not prompts")
    model, _ = built(row.name)
    processor = row.processor()
    pictures = [picture(number, size) for number, size in enumerate([(32, 32), (60, 30), (31, 62)])]
    samples = [
        Sample(str(n), text, image)
        for n, (text, image) in enumerate(zip(["what?", "how many?", "a"], pictures, strict=True))
    ]
    batches = functools.partial(
        make_batches, samples, processor, batch_size=2, prompt_template=f"see {row.image} {{question}}"
    )
    stats = measure(model, batches())
    assert len(stats) == 3
    with torch.no_grad(), prune(model, recipe_for(model)):
        for batch in batches():
            ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
            assert ids.shape[1] == batch["input_ids"].shape[1] + 3


def test_right_padding_is_exact_or_refused(row):
    model, samples = built(row.name)
    recipe, rows = recipe_for(model), samples[:3]
    batch = row.collate(rows)
    width = batch["input_ids"].shape[1]
    for name in PADDING.keys() & batch.keys():
        padded = [torch.nn.functional.pad(s[name], (0, width - s[name].shape[1]), value=PADDING[name]) for s in rows]
        batch[name] = torch.cat(padded)
    with torch.no_grad(), prune(model, recipe):
        if adapt(model).needs_left_padding:
            with pytest.raises(ValueError, match=r"has padding between tokens, .* pad on the left"):
                greedy(model, batch)
            return
        assert_rows_as_alone(model, batch, rows)


def test_a_layer_looked_at_ahead_ranks_as_it_does_from_inside(row):
    """Tokens that leave before a layer are those that would have left inside it."""
    model, samples = built(row.name)
    fingerprint = adapt(model).fingerprint
    layer = fingerprint.decoder.prunable[0]
    inside = (1.0,) * layer + (0.5,) * (6 - layer)
    enter = PruningRecipe(inside, fingerprint, 16, enter=inside)
    batch = row.collate(samples[:3])
    with torch.no_grad():
        before = kept_positions(model, enter, batch)
        after = kept_positions(model, PruningRecipe(inside, fingerprint, 16), batch)
    assert torch.equal(before[layer], after[layer + 1])


# Written down, since no test can run in two versions of transformers: what one made, the other must.
CONFIG_HASHES = {
    "llava": "ae9cb4a36b9049e0",
    "llava-qwen3": "31cb0b92d831b1d4",
    "llava-mistral-window": "213c15db4d92b5b3",
    "llava-exaone4": "be8f077ea4a962da",
    "llava-olmo2": "bfb07db8158866ab",
    "llava-gpt_oss": "e2a58826dfd0e9f9",
    "llava-mixtral": "ee24aae9a817b243",
    "llava-starcoder2": "7bcfee6e556e3b43",
    "llava_hr": "4968b5490fab434d",
    "llava_next": "7b8ca7330087b06d",
    "llava_next-mistral": "ba6bc4cb48a2cd16",
    "llava_next_video": "3cf8e145707245a5",
    "llava_onevision": "3a2c37ba4cd3c909",
    "llava_onevision-video": "3a2c37ba4cd3c909",
    "vipllava": "2062b092cd639b3a",
    "video_llava": "0720820468ece503",
    "fast_vlm": "8dbc608d792e5270",
    "deepseek_vl": "74b4a9e9aafadd86",
    "qwen2_vl": "e9758ed73169cff9",
    "qwen2_vl-video": "e9758ed73169cff9",
    "qwen2_5_vl": "41b895a92c9d5c68",
    "qwen2_5_vl-video": "41b895a92c9d5c68",
    "qwen3_vl": "47d72bf5330421b3",
    "qwen3_vl-video": "47d72bf5330421b3",
    "qwen3_vl_moe": "fc5b71ddf41f0c07",
    "qwen3_5": "d8208a936e67b96f",
    "glm4v": "4b4c08b08b64bd06",
    "glm4v-video": "4b4c08b08b64bd06",
    "internvl": "027e6efcc4ffc3c6",
    "internvl-video": "027e6efcc4ffc3c6",
    "idefics3": "f063ebd5fc17778d",
    "smolvlm": "7b27190b441acf02",
    "gemma3": "520f91d24a1464b7",
    "paligemma": "82e6e033770d7ea8",
    "paligemma2": "20091a9c2cea0570",
    "aya_vision": "d03fbe025805faad",
    "cohere2_vision": "364a3a7fd6791857",
    "mistral3": "f1a29fe57e4472d7",
    "lfm2_vl": "1f2b7e8adf9062d8",
    "got_ocr2": "d640f9d54688e047",
}


def test_the_config_hash_is_that_of_other_versions_of_transformers(row):
    assert fingerprint_of(row.make_model().config).config_hash == CONFIG_HASHES.get(row.name)


@pytest.mark.parametrize(
    "name", ["gemma3", "paligemma2", "cohere2_vision", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "lfm2_vl"]
)
def test_ways_to_decode_agree_beyond_every_window(name):
    """Without a cache and by prompt look-up as greedily with a cache; beams of a batch as beams alone."""
    model, samples = built(name)
    samples = [{k: v for k, v in sample.items() if k != "labels"} for sample in samples]
    row = next(row for row in ROWS if row.name == name)
    adapted, new = adapt(model), 30
    options = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": [*adapted.token_ids.values()]}
    ways = [{"use_cache": False}]
    if name != "qwen3_5":  # transformers drafts for no model with a recurrent state
        ways.append({"prompt_lookup_num_tokens": 3})
    with torch.no_grad(), prune(model, recipe_for(model)):
        expected = model.generate(**samples[1], **options)
        for way in ways:
            assert torch.equal(model.generate(**samples[1], **options, **way), expected)
        together = model.generate(**row.collate(samples[:2]), **options, num_beams=3)
        for number, sample in enumerate(samples[:2]):
            assert torch.equal(model.generate(**sample, **options, num_beams=3)[0, -new:], together[number, -new:])


def test_decoding_without_a_cache_keeps_the_prompt_where_generate_encodes_nothing():
    """As models did in transformers 5.19: the pixels come with every step, and the answer so far is no question."""
    model, samples = built("qwen3_5")
    asked = []

    def scored(view):
        asked.append(int(view.question.sum()))
        return view.self_attention * view.cross_attention

    with torch.no_grad(), prune(model, recipe_for(model), scorer=scored):
        model.generate(**samples[1], use_cache=False, do_sample=False, max_new_tokens=4)
    assert len(asked) == 8
    assert len(set(asked)) == 1


@pytest.mark.parametrize("rule", [{"images": "tile"}, {"images": ""}, {"video": "frames"}, {"video": None}])
def test_a_rule_that_is_none_is_refused_when_a_family_is_made(rule):
    with pytest.raises(ValueError, match=r"family 'new': (images|video)=.*: must be one of \('"):
        Family("new", "New", **rule)


def test_a_method_that_reads_the_tower_is_left_out_where_it_cannot():
    model, samples = built("qwen2_5_vl")
    fitter, budget = Fitter(measure(model, samples)), checked_budget("flops_reduction", 0.3)
    entries = [Entry(name, make_method(name, fitter, budget), 0.3) for name in ("visionzip", "fitprune")]
    left, out = readable(adapt(model), entries)
    assert [entry.name for entry in left] == ["fitprune"]
    assert [(skipped["method"], skipped["budget"]) for skipped in out] == [("visionzip", 0.3)]
    assert "the vision tower of this qwen2_5_vl model has no [CLS] token" in out[0]["reason"]
    assert "scorer 'cls'" in out[0]["reason"]
    assert readable(adapt(built("llava")[0]), entries) == (entries, [])


def test_methods_are_refused_where_their_layers_may_not_lose_tokens():
    model, samples = built("qwen3_5")
    fitter, budget = Fitter(measure(model, samples)), checked_budget("flops_reduction", 0.2)
    for name in ("fastv", "divprune", "vtw"):
        with pytest.raises(OutOfReach, match=rf"{name} removes tokens at layers \[.*\], which they may not leave"):
            make_method(name, fitter, budget)
    for name in ("fitprune", "random", "uniform"):
        with torch.no_grad(), prune(model, make_method(name, fitter, budget)):
            model(**samples[0])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "paligemma", "gemma3"])
def test_every_fit_runs(name):
    """The authors' procedure, and the search by what the model says, on families that are particular."""
    model, samples = built(name)
    row = next(row for row in ROWS if row.name == name)
    stats = measure(model, samples)
    prunable = set(stats.model.decoder.prunable)
    halves = [row.collate(samples[:2])], [row.collate(samples[2:])]
    for recipe in (
        fit_sequential(model, samples, flops_reduction=0.15, stats=stats),
        search(model, halves[0], stats, validation=halves[1], flops_reduction=0.15, max_new_tokens=3, passes=2),
    ):
        cost = recipe.cost()
        assert 0 < cost.flops_reduction < 0.3  # the sequential one rounds each layer down
        assert {layer for layer, count in enumerate(recipe.counts(cost.visual_tokens)) if count} <= prunable


def test_tiles_are_told_apart_by_ids_alone():
    model, samples = built("idefics3")
    given = dict(samples[0])
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    with (
        torch.no_grad(),
        prune(model, recipe_for(model)),
        pytest.raises(ValueError, match=r"cut into tiles, .* input_ids"),
    ):
        model(**given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flex_attention's masks
def test_statistics_do_not_depend_on_how_a_mask_is_shown():
    """flex_attention shows blocks; windows are known without, attention to later tokens is refused."""
    row = next(row for row in ROWS if row.name == "cohere2_vision")
    model, samples = built(row.name)
    other = row.make_model()
    other.set_attn_implementation({"text_config": "flex_attention"})
    expected, found = measure(model, samples[:1]), measure(other, samples[:1])
    assert torch.allclose(found.self_attention, expected.self_attention, atol=1e-4)
    assert torch.allclose(found.cross_attention, expected.cross_attention, atol=1e-4)
    row = next(row for row in ROWS if row.name == "gemma3")
    model = row.make_model()
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(ValueError, match="attends to later tokens of an image"):
        measure(model, row.samples(model)[:1])


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "gemma3", "llava_onevision", "llava_next"])
def test_a_static_cache_is_named_in_every_family(name):
    model, samples = built(name)
    recipe = PruningRecipe.dense(adapt(model).fingerprint, 16)
    given = {key: value for key, value in samples[0].items() if key != "labels"}
    with prune(model, recipe), pytest.raises(ValueError, match=r"the KV cache is a StaticCache .* drop cache_implem"):
        model.generate(**given, cache_implementation="static", max_new_tokens=2)


def test_a_video_token_without_a_video_is_called_a_video():
    model, _ = built("llava_onevision-video")
    video = adapt(model).token_ids["video"]
    tokens = torch.tensor([[7, video, video, 8, 9]])
    with prune(model, PruningRecipe.dense(adapt(model).fingerprint, 16)):
        with pytest.raises(ValueError, match=r"no video is given: pass the processor's pixel_values_videos"):
            model(input_ids=tokens)
        image = built("llava_onevision")[1][0]
        ids = torch.cat([torch.tensor([[video]]), image["input_ids"]], 1)
        with pytest.raises(ValueError, match=r"1 visual tokens of videos that are not given: .*pixel_values_videos"):
            model(**{**image, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
