"""Random conversations on one cache: turns, decoding, cropping, moving rows. Seeded: a failure comes back on every run.

After each call every row is compared with its sample alone, and the batch with the masked dense oracle.
"""

import copy
import random

import pytest
import torch

from fitprune import prune
from helpers.calls import KEEP, recipe_of
from helpers.models import CACHE, IMAGE, Oracle, batch_of, cache_in, prompts, tiny_model

RECIPES = (KEEP, (0.9, 0.5, 0.5, 0.5, 0.2), (1.0, 1.0, 1.0, 0.4, 0.4))


class Talk:
    """A cache that goes on, pruned or, with an oracle, masked and dense."""

    def __init__(self, model, oracle=None):
        self.model, self.oracle, self.cache = model, oracle, None
        self.mask = torch.ones(1, 0, dtype=torch.long)

    def say(self, keep, ids, valid, *, without_mask=False, **images):
        self.mask = torch.cat([self.mask.expand(len(valid), -1), valid], 1)
        call = {"input_ids": ids, CACHE: self.cache, "use_cache": True, **images}
        call["position_ids"] = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if not (without_mask and bool(self.mask.all())):
            call["attention_mask"] = self.mask
        if self.oracle is None:
            inside = prune(self.model, recipe_of(self.model, keep))
        else:
            self.oracle.keep = keep
            inside = self.oracle.prefill(ids, self.mask) if images else self.oracle.step(self.mask)
        with torch.no_grad(), inside:
            output = self.model(**call)
        self.cache = cache_in(output)
        return output.logits

    def crop(self, columns):
        self.cache.crop(-columns)
        self.mask = self.mask[:, : self.mask.shape[1] - columns]
        if self.oracle:
            self.oracle.gone = [gone[:, : self.mask.shape[1]] for gone in self.oracle.gone]

    def move(self, rows):
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        if self.oracle:
            self.oracle.gone = [gone.expand(len(rows), -1)[rows] for gone in self.oracle.gone]


def images_of_call(inputs):
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("seed", range(80))
def test_a_random_conversation(seed):
    draw = random.Random(seed)
    family, attention = draw.choice(["llava", "llava_next"]), draw.choice(["sdpa", "eager"])
    model, reference = tiny_model(family, attention=attention), tiny_model(family, attention="eager")
    together, oracle = Talk(model), Talk(reference, Oracle(reference, KEEP))
    alone = [Talk(model) for _ in range(draw.choice([1, 2, 3, 4]))]

    def agree(found, expected):
        assert torch.allclose(found, expected, atol=2e-4)

    def turn(with_images):
        counts = [draw.choice([0, 1, 1, 2]) if with_images else 0 for _ in alone]
        counts[0] += with_images and not any(counts)
        samples = prompts(
            model, [[draw.randint(1, 5) for _ in range(n + 1)] for n in counts], seed=draw.randint(0, 999)
        )
        batch, keep = batch_of(samples, draw.choice(["left", "right"])), draw.choice(RECIPES)
        ids, valid = batch["input_ids"], batch["attention_mask"]
        found = together.say(keep, ids, valid, without_mask=draw.random() < 0.4, **images_of_call(batch))
        expected = oracle.say(keep, ids, valid, **images_of_call(batch))
        for row, sample in enumerate(samples):
            text, own = (ids[row] != IMAGE) & valid[row].bool(), sample["input_ids"][0] != IMAGE
            single = alone[row].say(keep, sample["input_ids"], sample["attention_mask"], **images_of_call(sample))
            agree(found[row][text], single[0][own])
            agree(found[row][text], expected[row][text])

    def decode():
        for _ in range(draw.randint(1, 3)):
            ids = torch.tensor([[draw.randint(10, 96)] for _ in alone])
            valid = torch.ones_like(ids)
            found = together.say(KEEP, ids, valid, without_mask=draw.random() < 0.4)
            agree(found, oracle.say(KEEP, ids, valid))
            for row, talk in enumerate(alone):
                agree(found[row], talk.say(KEEP, ids[row : row + 1], valid[:1])[0])

    def crop():
        length = together.mask.shape[1]
        columns = draw.randint(1, min(length - 1, draw.choice([3, 12, 30])))
        if bool((together.mask[:, : length - columns].sum(1) == 0).any()):
            return
        for talk, tokens in zip(alone, together.mask[:, length - columns :].sum(1).tolist(), strict=True):
            if tokens:
                talk.crop(tokens)
        together.crop(columns)
        oracle.crop(columns)

    def move():
        rows = torch.tensor([draw.randrange(len(alone)) for _ in alone])
        together.move(rows)
        oracle.move(rows)
        alone[:] = [copy.deepcopy(alone[row], {id(model): model}) for row in rows]

    turn(draw.random() < 0.7)
    for _ in range(draw.randint(3, 8)):
        draw.choice([decode, decode, lambda: turn(True), lambda: turn(False), crop, move])()
        if draw.random() < 0.2:
            together.cache = copy.deepcopy(together.cache)
    decode()
