"""The ways people call a model, under `prune`: each row as its sample alone, and as the masked dense oracle."""

import pytest
import torch

from conftest import Oracle, batch_of, prompts, replay, tiny_model
from fitprune import PruningRecipe, prune
from fitprune.adapters import adapt

# Not multiples of anything: images of different size lose different numbers, and rows of a batch become ragged.
KEEP = (0.8, 0.8, 0.55, 0.3, 0.3)
ONE = [[3, 6], [9, 4], [2, 11], [5, 3], [1, 8], [7, 7], [4, 2], [6, 5]]
SEVERAL = [[3, 4, 5], [6], [2, 3, 4, 5], [5, 3], [1, 2, 9], [12], [4, 1, 1, 2], [8, 3]]
NEW = 6

HOW = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 4},
}


def recipe_of(model, keep=KEEP):
    return PruningRecipe(keep, adapt(model).shape, 16)


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=NEW, eos_token_id=None, return_dict_in_generate=True, output_logits=True, **options
    )


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
