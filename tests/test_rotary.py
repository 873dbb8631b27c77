"""Multimodal rotary positions: conversations that are alive at once go on as each does alone."""

import copy
import dataclasses

import pytest
import torch

from conftest import CACHE, cache_in
from families import ROWS, SIZES, picture
from fitprune import prune
from fitprune.adapters import adapt
from fitprune.recipe import PruningRecipe

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
    decoder = adapt(model).shape.decoder
    keep = [1.0] * decoder.layers
    for layer in decoder.prunable:
        keep[layer:] = [0.5] * (decoder.layers - layer)
    return Case(model, row.processor(), PruningRecipe(tuple(keep), adapt(model).shape, 16), row.image)


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
        if not adapt(case.model).shape.decoder.linear_layers:  # transformers cannot select rows of those
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
