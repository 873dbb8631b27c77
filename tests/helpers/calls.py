"""Prompts, a recipe and a way to generate that tests of calls share."""

from fitprune import PruningRecipe
from fitprune.families.adapter import adapt

KEEP = (0.8, 0.8, 0.55, 0.3, 0.3)
ONE = [[3, 6], [9, 4], [2, 11], [5, 3], [1, 8], [7, 7], [4, 2], [6, 5]]
SEVERAL = [[3, 4, 5], [6], [2, 3, 4, 5], [5, 3], [1, 2, 9], [12], [4, 1, 1, 2], [8, 3]]
NEW = 6

PLAIN = {"do_sample": False}


def recipe_of(model, keep=KEEP):
    return PruningRecipe(keep, adapt(model).fingerprint, 16)


def generate(model, inputs, **options):
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
