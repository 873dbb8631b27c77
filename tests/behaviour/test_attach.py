"""`attach`, `detach`, `paused`, `last`: pruning that is switched on and off, by one thread or by many."""

import asyncio
import concurrent.futures
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

import fitprune
from fitprune.families.adapter import adapt
from fitprune.recipes.recipe import PruningRecipe
from helpers.models import CACHE, batch_of, cache_in, prompts, tiny_inputs, tiny_model

GREEDY = {"max_new_tokens": 3, "do_sample": False}


def recipe_for(model, last=0.25):
    return PruningRecipe((1.0, 0.75, 0.5, 0.5, last), adapt(model).fingerprint, 16)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs(model):
    return tiny_inputs(model)


def lengths(model, inputs):
    """Tokens that each layer's cache holds."""
    with torch.no_grad():
        return [layer.keys.shape[2] for layer in cache_in(model(**inputs, use_cache=True)).layers]


def hooks_on(model):
    """How many hooks of ours are on a model; transformers has some too."""
    hooks = [h for m in model.modules() for of in (m._forward_hooks, m._forward_pre_hooks) for h in of.values()]
    return sum(getattr(hook, "__module__", "").startswith("fitprune") for hook in hooks)


def test_what_is_attached_stays_until_detach_whatever_is_collected(model, inputs):
    dense, before = lengths(model, inputs), hooks_on(model)
    pruners = [fitprune.attach(model, recipe_for(model)), fitprune.prune(model, recipe_for(model)).__enter__()]
    gc.collect()
    pruned = lengths(model, inputs)
    assert pruned != dense
    pruners[0].detach()
    pruners[0].detach()  # once more does nothing
    assert not pruners[0].attached
    assert lengths(model, inputs) == pruned  # the other is still there
    pruners[1].detach()
    assert lengths(model, inputs) == dense
    assert hooks_on(model) == before


def test_a_pruner_that_is_lost_goes_on_and_leaves_with_its_model():
    gone, model = threading.Event(), tiny_model()
    inputs = tiny_inputs(model)
    dense = lengths(model, inputs)
    fitprune.attach(model, recipe_for(model))
    gc.collect()
    assert lengths(model, inputs) != dense
    weakref.finalize(model, gone.set)
    del model
    gc.collect()
    assert gone.is_set()


def test_last_tells_what_each_layer_kept_of_each_image(model):
    batch = batch_of(prompts(model, [[3, 5], [2, 4, 6]]))
    recipe = recipe_for(model)
    with fitprune.prune(model, recipe) as pruner, torch.no_grad():
        assert pruner.last is None
        model(**batch)
        last = pruner.last
        model(input_ids=torch.tensor([[7, 8]]))  # text alone changes nothing
        assert pruner.last is last
    assert last.visual_tokens == [[16], [16, 16]]
    assert last.kept == [[[n], [n, n]] for n in recipe.kept(16)]
    assert [columns.shape for columns in last.positions[1:]] == [columns.shape for columns in last.after[:-1]]
    assert pruner.last is last  # also once it is detached
    assert "keeps [[4], [4, 4]]" in repr(last)
    with fitprune.prune(model, recipe) as pruner:
        assert pruner.last is None  # another pruner's is not its own


def drop(model, recipe, name=""):
    """Make a pruner and lose it; or ask it first for what only a model has."""
    pruner = fitprune.prune(model, recipe)
    if name:
        getattr(pruner, name)
    del pruner
    gc.collect()


def test_a_pruner_that_nobody_entered_warns_and_one_that_was_does_not(model):
    with pytest.warns(RuntimeWarning, match=r"never entered, so the model runs dense: write `with prune"):
        drop(model, recipe_for(model))
    with (
        pytest.warns(RuntimeWarning, match="never entered"),
        pytest.raises(AttributeError, match=r"call model.generate inside `with prune\(model, recipe\):`"),
    ):
        drop(model, recipe_for(model), "generate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fitprune.prune(model, recipe_for(model)):
            pass
        with pytest.raises(ValueError, match="unknown"):
            fitprune.prune(model, recipe_for(model), scorer={"name": "self", "parameters": {"unknown": 1}})
        gc.collect()


def test_a_function_may_be_decorated(model, inputs):
    @fitprune.prune(model, recipe_for(model))
    def answer():
        return lengths(model, inputs)

    assert answer() == answer() != lengths(model, inputs)


@pytest.mark.parametrize("how", ["attached once", "entered by each request"])
def test_eight_threads_with_fifty_requests_each_answer_as_alone(model, how):
    recipe, asked = recipe_for(model), [tiny_inputs(model, seed=seed) for seed in range(8)]
    with fitprune.prune(model, recipe), torch.no_grad():
        alone = [model.generate(**inputs, **GREEDY) for inputs in asked]

    def serve(number):
        for turn in range(50):
            inputs = asked[(number + turn) % 8]
            with torch.no_grad():
                if how == "attached once":
                    found = model.generate(**inputs, **GREEDY)
                else:
                    with fitprune.prune(model, recipe) as pruner:
                        found = model.generate(**inputs, **GREEDY)
                        assert pruner.last.kept[-1] == [[recipe.kept(16)[-1]]]
            assert torch.equal(found, alone[(number + turn) % 8])
        return 50

    pruner = fitprune.attach(model, recipe) if how == "attached once" else None
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(serve, range(8))) == 400
    if pruner is not None:
        pruner.detach()
    assert not hooks_on(model)


def test_another_recipe_at_the_same_time_is_refused_with_the_way_out(model):
    with fitprune.prune(model, recipe_for(model)):
        for other in (
            fitprune.prune(model, recipe_for(model, 0.5)),
            fitprune.prune(model, recipe_for(model), scorer="self"),
            fitprune.prune(model, recipe_for(model), pool_images=True),
        ):
            with pytest.raises(ValueError, match=r"another recipe or scorer: leave that block or detach\(\)"), other:
                pass
        with fitprune.prune(model, recipe_for(model)):  # the same is counted
            pass
    assert not hooks_on(model)


def test_a_paused_thread_is_dense_while_others_are_pruned(model, inputs):
    with torch.no_grad():
        dense = model(**inputs).logits
    recipe = recipe_for(model)
    with fitprune.prune(model, recipe) as pruner, torch.no_grad():
        pruned = model(**inputs, use_cache=True)
        with pruner.paused():
            assert torch.equal(model(**inputs).logits, dense)
            with pruner.paused():
                pass
            assert torch.equal(model(**inputs).logits, dense)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(lambda: model(**inputs).logits).result(), pruned.logits)
            with pytest.raises(ValueError, match="the KV cache was pruned"):
                model(input_ids=torch.tensor([[7]]), **{CACHE: cache_in(pruned)})
        assert torch.equal(model(**inputs).logits, pruned.logits)


def test_pauses_that_overlap_are_counted_and_tasks_have_their_own(model, inputs):
    recipe = recipe_for(model)
    with fitprune.prune(model, recipe) as pruner:
        pruned = lengths(model, inputs)
        one, two = pruner.paused(), pruner.paused()
        one.__enter__(), two.__enter__()
        one.__exit__(None, None, None)
        assert lengths(model, inputs) != pruned
        two.__exit__(None, None, None)
        assert lengths(model, inputs) == pruned

        async def job(before, inside):
            await asyncio.sleep(before)
            with pruner.paused():
                await asyncio.sleep(inside)
                return lengths(model, inputs) != pruned

        async def jobs():
            return await asyncio.gather(job(0, 0.01), job(0.005, 0.02), look())

        async def look():
            await asyncio.sleep(0.007)
            return lengths(model, inputs) == pruned

        assert asyncio.run(jobs()) == [True] * 3
        assert lengths(model, inputs) == pruned


def test_a_pruner_that_is_not_attached_pauses_what_another_does(model, inputs):
    dense = lengths(model, inputs)
    other = fitprune.attach(model, recipe_for(model))
    other.detach()
    with fitprune.prune(model, recipe_for(model)), other.paused():
        assert lengths(model, inputs) == dense


def test_what_runs_after_its_call_is_not_decorated(model):
    async def answer(): ...

    def steps():
        yield

    with fitprune.prune(model, recipe_for(model)) as pruner:
        for function in (answer, steps):
            with pytest.raises(ValueError, match=r"runs after its call has returned.*with prune\(model, recipe\)"):
                pruner(function)
        with pytest.raises(ValueError, match="decorates functions, and was given a dict"):
            pruner({})


def _distributed(model):
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


class _Pipeline:
    def __init__(self, model):
        self.model = model


class _Peft(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = [model]

    def get_base_model(self):
        return self.inner[0]


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": _distributed,
    "a pipeline": _Pipeline,
    "PEFT": _Peft,
    "PEFT in a pipeline": lambda model: _Pipeline(_Peft(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_pruned_and_measured_as_the_model_itself(model, inputs, wrap):
    recipe = recipe_for(model)
    with fitprune.prune(model, recipe):
        expected = lengths(model, inputs)
    alone = fitprune.measure(model, [inputs])
    wrapped = wrap(model)
    try:
        with fitprune.prune(wrapped, recipe) as pruner:
            assert pruner.model is model
            assert lengths(model, inputs) == expected
        assert fitprune.measure(wrapped, [inputs]).provenance == alone.provenance
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_model_inside_of_peft_generates_pruned():
    peft = pytest.importorskip("peft", reason="peft is of make test's environment alone")
    model = tiny_model()
    inputs = tiny_inputs(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with fitprune.prune(wrapped, recipe_for(model)) as pruner, torch.no_grad():
        found = wrapped.generate(**inputs, **GREEDY)
        assert pruner.last.kept[-1] == [[4]]
        assert torch.equal(found, model.generate(**inputs, **GREEDY))
