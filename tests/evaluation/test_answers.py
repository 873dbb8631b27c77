"""What a batch of questions is made of."""

from fitprune.evaluation.answers import prompt_sizes
from fitprune.families.adapter import adapt
from fitprune.families.clip_tower import crops_of
from helpers.models import batch_of, prompts, tiny_model


def test_llava_next_counts_each_images_own_crops():
    model = tiny_model("llava_next")
    batch = batch_of(prompts(model, [[3, 6], [3, 5], [2, 9], [2, 4]]))
    crops = crops_of(adapt(model), batch["image_sizes"], 4)
    assert [size[3] for size in prompt_sizes(adapt(model), batch)] == crops
    assert len(set(crops)) > 1
