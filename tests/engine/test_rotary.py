"""Multimodal rotary positions: conversations that are alive at once go on as each does alone."""

import copy
import dataclasses

import pytest
import torch

from fitprune import prune
from fitprune.families.adapter import adapt
from fitprune.recipes.recipe import PruningRecipe
from helpers.families import ROWS, SIZES, picture
from helpers.models import CACHE, cache_in

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of GLM-4V's processor, with numpy 2

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclasses.dataclass
class Case:
    """A model, a recipe of half its visual tokens, and prompts for it."""

    model: object
    processor: object
    recipe: PruningRecipe
    image: str

    def inputs(self, images, text="\n"):
        """A batch of prompts, an image of another size in each."""
        made = self.processor(
            images=[[picture(i, SIZES[i])] for i in images],
            text=[f"look {self.image}{text}"] * len(images),
            padding=len(images) > 1,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(made)

    def start(self, images):
        """Fill a cache by a call of the model itself."""
        with torch.no_grad():
            return cache_in(self.model(**self.inputs(images), use_cache=True))

    def go_on(self, cache, images, how):
        """Logits of a question on a copy of a cache."""
        whole = self.inputs(images, "\n what is it?")
        past = self.inputs(images)["input_ids"].shape[1]
        kept = {CACHE: copy.deepcopy(cache)}
        with torch.no_grad():
            if how == "generate":
                call = {name: whole[name] for name in TEXT if name in whole}
                return torch.stack(self.model.generate(**call, **kept, **GREEDY).logits, 1)
            ids = whole["input_ids"][:, past:]
            mask = {} if how == "no mask" else {"attention_mask": whole["attention_mask"]}
            first = self.model(input_ids=ids, **mask, **kept, use_cache=True)
            return first.logits


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    row = next(r for r in ROWS if r.name == request.param)
    model = row.make_model()
    decoder = adapt(model).fingerprint.decoder
    keep = [1.0] * decoder.layers
    for layer in decoder.prunable:
        keep[layer:] = [0.5] * (decoder.layers - layer)
    return Case(model, row.processor(), PruningRecipe(tuple(keep), adapt(model).fingerprint, 16), row.image)


@pytest.mark.parametrize("how", ["generate", "call", "no mask"])
def test_two_conversations_alive_at_once_go_on_as_each_alone(case, how):
    with prune(case.model, case.recipe, scorer="self"):
        first = case.start([0])
        alone = case.go_on(first, [0], how)
        case.start([5])  # another image, and then
        case.start([3, 5])  # another batch size
        assert torch.equal(case.go_on(first, [0], how), alone)
        words = [i for i in range(20, 60) if i not in adapt(case.model).token_ids.values()][:4]
        with torch.no_grad():  # text alone
            text = cache_in(case.model(input_ids=torch.tensor([words[:3]]), use_cache=True))
        assert torch.equal(case.go_on(first, [0], how), alone)
        # And the conversation of text goes on as if there had been no image.
        step = {"input_ids": torch.tensor([words[3:]]), "use_cache": True}
        with torch.no_grad():
            found = case.model(**step, **{CACHE: copy.deepcopy(text)}).logits
            whole = case.model(input_ids=torch.tensor([words])).logits[:, -1:]
        assert torch.allclose(found, whole, atol=1e-4)


def test_rows_of_a_batch_keep_their_offsets_when_they_are_moved(case):
    with prune(case.model, case.recipe, scorer="self"):
        both = case.start([0, 5])
        alone = case.go_on(both, [0, 5], "call")
        moved = copy.deepcopy(both)
        moved.reorder_cache(torch.tensor([1, 0]))
        case.start([3])
        assert torch.allclose(case.go_on(both, [0, 5], "call"), alone, atol=1e-5)
        assert torch.allclose(case.go_on(moved, [5, 0], "call").flip(0), alone, atol=1e-4)
        if not adapt(case.model).fingerprint.decoder.linear_layers:  # transformers cannot select rows of those
            both.batch_select_indices(torch.tensor([1]))
            assert torch.allclose(
                case.go_on(both, [5], "no mask"), case.go_on(case.start([5]), [5], "no mask"), atol=1e-4
            )


def test_the_model_is_left_with_its_own_way_to_positions(case):
    before = case.model._prepare_position_ids_for_generation
    with prune(case.model, case.recipe, scorer="self"):
        assert case.model._prepare_position_ids_for_generation != before
    assert case.model._prepare_position_ids_for_generation == before
    assert "_prepare_position_ids_for_generation" not in vars(case.model)


def turns(case, numbers):
    """Prompts of one sample, an image in each, and the whole that they make."""
    parts = [case.inputs([number], "\n and") for number in numbers]
    whole = {name: torch.cat([part[name] for part in parts], -1 if name in TEXT else 0) for name in parts[0]}
    return parts, whole


@pytest.mark.parametrize("mask", [True, False])
def test_an_image_in_a_later_turn_has_the_positions_of_the_whole_prompt(case, mask):
    """Keeping all, so that the turns equal the whole, which the model finds positions for by itself."""
    dense = PruningRecipe.dense(case.recipe.model, 16)
    (first, second, third), whole = turns(case, [0, 5, 3])
    with torch.no_grad():
        expected = case.model(**whole).logits
    with prune(case.model, dense, scorer="self"), torch.no_grad():
        cache = cache_in(case.model(**first, use_cache=True))
        for turn in (second, third):
            past = cache.get_seq_length()
            call = {name: value for name, value in turn.items() if name != "attention_mask"}
            if mask:
                call["attention_mask"] = whole["attention_mask"][:, : past + turn["input_ids"].shape[1]]
            case.start([5])  # another conversation
            output = case.model(**call, **{CACHE: cache}, use_cache=True)
            cache = cache_in(output)
        assert torch.allclose(output.logits, expected[:, -output.logits.shape[1] :], atol=1e-3)


def test_an_image_after_a_cached_prefix_of_text_is_generated_from_as_without_a_cache(case):
    whole = case.inputs([0], "\n what?")
    prefix = whole["input_ids"][:, :1]
    with torch.no_grad():
        expected = torch.stack(case.model.generate(**whole, **GREEDY).logits, 1)
    with prune(case.model, PruningRecipe.dense(case.recipe.model, 16)), torch.no_grad():
        case.start([5])
        cache = cache_in(case.model(input_ids=prefix, use_cache=True))
        found = torch.stack(case.model.generate(**whole, **{CACHE: cache}, **GREEDY).logits, 1)
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("how", ["generate", "no mask"])
def test_a_cache_cropped_to_before_an_image_goes_on_without_its_offset(case, how):
    if adapt(case.model).fingerprint.decoder.linear_layers:
        pytest.skip("transformers keeps no past of layers without attention that could be cropped")
    whole = case.inputs([0], "\n what?")
    with prune(case.model, case.recipe, scorer="self"), torch.no_grad():
        cache = case.start([0])
        cache.crop(1 - cache.get_seq_length())
        short = cache_in(case.model(input_ids=whole["input_ids"][:, :1], use_cache=True))
        step = {"input_ids": whole["input_ids"][:, [0, -1, -2]]}
        found = []
        for held in (cache, short):
            if how == "generate":
                found.append(torch.stack(case.model.generate(**step, **{CACHE: held}, **GREEDY).logits, 1))
            else:
                found.append(case.model(input_ids=step["input_ids"][:, 1:], **{CACHE: held}).logits)
    assert torch.allclose(*found, atol=1e-4)


def test_beams_go_on_from_a_cache_that_was_repeated_for_them(case):
    if adapt(case.model).fingerprint.decoder.linear_layers:
        pytest.skip("transformers cannot repeat rows of layers without attention")
    both = case.inputs([0, 5], "\n what is it?")
    call = {name: both[name] for name in TEXT if name in both}
    beams = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with prune(case.model, case.recipe, scorer="self"), torch.no_grad():
        cache = case.start([0, 5])
        case.start([3])
        cache.batch_repeat_interleave(3)
        found = case.model.generate(**call, **{CACHE: cache}, **beams)
        expected = case.model.generate(**both, **beams)
    assert torch.equal(found[:, -4:], expected[:, -4:])


def test_a_dense_conversation_beside_a_pruned_one_is_not_disturbed(case):
    question = torch.tensor([[i for i in range(20, 60) if i not in adapt(case.model).token_ids.values()][:3]])
    with prune(case.model, case.recipe, scorer="self") as pruner, torch.no_grad():
        old = case.start([5])
        with pruner.paused():
            dense = case.start([0])
            alone = case.model(input_ids=question, **{CACHE: copy.deepcopy(dense)}).logits
        case.go_on(old, [5], "generate")
        case.go_on(old, [5], "no mask")
        with pruner.paused():
            assert torch.equal(case.model(input_ids=question, **{CACHE: dense}).logits, alone)


def test_embeddings_without_ids_are_refused_where_positions_are_found_by_ids(case):
    inputs = case.inputs([0])
    embeds = case.model.get_input_embeddings()(inputs.pop("input_ids"))
    with (
        prune(case.model, case.recipe, scorer="self"),
        pytest.raises(ValueError, match="rotary positions of this model's images are found by ids"),
    ):
        case.model(**inputs, inputs_embeds=embeds)
