"""The scheduler of the vLLM plug-in, alone: a pruned prompt comes whole from its image on, and none waits forever."""

import collections
import dataclasses
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from vllm import EngineArgs, SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from fitprune import PruningRecipe
from fitprune._support import assets
from fitprune.families.config import fingerprint_of
from fitprune.integrations.vllm.scheduler import MARK, REASONS, pruning

sys.path.insert(0, str(Path(__file__).parents[1]))

BLOCK = 16


@pytest.fixture(scope="module", autouse=True)
def recipe(tmp_path_factory):
    """A recipe in the environment, for the bundled model."""
    from transformers import AutoConfig

    model = fingerprint_of(AutoConfig.from_pretrained(assets.folder("model")))
    path = tmp_path_factory.mktemp("scheduler") / "recipe.json"
    PruningRecipe((1.0, *(0.5,) * (model.decoder.layers - 1)), model, 144).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITPRUNE_RECIPE", str(path))
        yield path


def scheduler_of(base=Scheduler, blocks=200, embeds=None, **options):
    """A scheduler by itself: `blocks` of cache, and `embeds` that the vision tower may encode in a step."""
    config = EngineArgs(
        str(assets.folder("model")),
        **{"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 400, **options},
        limit_mm_per_prompt={"image": 4},
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.cache_config.block_size = BLOCK
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    made = pruning(base)(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )
    if embeds is not None:
        made._step_embeds = made.max_num_encoder_input_tokens = embeds
        made.encoder_cache_manager.cache_size = made.encoder_cache_manager.num_free_slots = embeds
        made.encoder_cache_manager.num_freeable_slots = embeds
    init_none_hash(get_hash_fn_by_name("sha256"))
    return made


def request(name, parts, tokens=4, **options):
    """A request of parts: a number of tokens of text, or ("image" or another kind, tokens)."""
    ids, features = [], []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids += [7 + n % 50 for n in range(part)]
            continue
        kind, size = part
        place = PlaceholderRange(offset=len(ids), length=size)
        picture = f"{number}-{size}-{len(ids) % 4}"  # others have it too
        features.append(MultiModalFeatureSpec(data=None, modality=kind, identifier=picture, mm_position=place))
        ids += [3] * size
    return made_of(name, ids, features, tokens, **options)


def again(one, name, tokens=4, **options):
    """An equal prompt."""
    features = [dataclasses.replace(feature) for feature in one.mm_features]  # without the mark
    return made_of(name, list(one.prompt_token_ids), features, tokens, **options)


def made_of(name, ids, features, tokens, **options):
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    sampling.update_from_generation_config({}, eos_token_id=1)
    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256"))
    return Request(name, ids, sampling, None, mm_features=features, block_hasher=hasher, **options)


class Memory:
    """What the cache would hold in a first layer, and in a last one, which every other visual token left before.

    In each slot: a token, all before it, and for a pruned request's own part who prefilled it.

    Args:
        scheduler: whose steps are watched.
    """

    def __init__(self, scheduler):
        self._scheduler, self._slots, self._owners, self._tokens = scheduler, {}, {}, {}

    def step(self, begins, counts):
        """Write the tokens of a step, and check that those before them are there."""
        tables, owners = {}, collections.Counter()
        for name in self._scheduler.requests:
            tables[name] = self._scheduler.kv_cache_manager.get_block_ids(name)[0]
            owners.update(tables[name])
        for name, count in counts.items():
            one = self._scheduler.requests[name]
            if is_pruned(one) and first_image(one) < begins[name] < one.num_prompt_tokens:
                assert count >= one.num_prompt_tokens - begins[name] > 1
                slot = self._slot(tables[name], first_image(one))
                self._owners[name, one.num_preemptions] = self._slots[(False, *slot)][1]
            for place in range(begins[name], begins[name] + count):
                for last, slot in self._places(one, tables[name], place):
                    self._slots[(last, *slot)] = self._token(one, place)
        for name in counts:
            one = self._scheduler.requests[name]
            if counts[name] > 1:
                for place in range(begins[name]):
                    for last, slot in self._places(one, tables[name], place):
                        assert self._slots[(last, *slot)] == self._token(one, place), (name, place, begins[name], last)
            if is_pruned(one):
                assert all(owners[block] == 1 for block in tables[name][first_image(one) // BLOCK :]), name

    def _slot(self, table, place):
        return table[place // BLOCK], place % BLOCK

    def _places(self, one, table, place):
        """In the first layer and, unless it has left, in the last."""
        yield False, self._slot(table, place)
        left = [n for image in one.mm_features if is_pruned(one) for n in range(*ends(image))[::2]]
        if place not in left:
            yield True, self._slot(table, place - sum(n < place for n in left))

    def _token(self, one, place):
        part = one.request_id, one.num_preemptions
        tokens = self._tokens.setdefault(part, [(0, None)])
        for n in range(len(tokens) - 1, place + 1):
            token = one.all_token_ids[n] if n < one.num_tokens else 9  # not sampled yet
            images = [image.identifier for image in one.mm_features if n in range(*ends(image))]
            owner = self._owners.get(part, part) if is_pruned(one) and n >= first_image(one) else None
            tokens.append((hash((tokens[-1], token, *images, owner)), owner))
        return tokens[place + 1]


def ends(image):
    return image.mm_position.offset, image.mm_position.offset + image.mm_position.length


def is_pruned(one):
    return bool(one.mm_features) and getattr(one.mm_features[0], MARK)


def first_image(one):
    return one.mm_features[0].mm_position.offset


def last_image(one):
    return max(ends(image)[1] for image in one.mm_features)


def run(scheduler, requests, lag=1, steps=3000):
    """Serve requests until all have ended; `lag` steps are scheduled ahead of their results.

    Returns:
        For each request, (first token, number of tokens) of each of its steps.
    """
    waiting, pieces, ahead = list(requests), collections.defaultdict(list), collections.deque()
    for _ in range(steps):
        for _ in range(2):
            if waiting:
                scheduler.add_request(waiting.pop(0))
        out, begins, chunks = step(scheduler)
        for name, count in out.num_scheduled_tokens.items():
            pieces[name].append((begins[name], count))
        ahead.append((out, chunks))
        if len(ahead) >= lag:
            finish(scheduler, *ahead.popleft())
        if not waiting and not scheduler.requests:
            return pieces
    unfinished = {name: (one.status, one.num_computed_tokens) for name, one in scheduler.requests.items()}
    raise AssertionError(f"after {steps} steps these are unfinished: {unfinished}")


def step(scheduler):
    """Schedule a step: it, where its requests' tokens begin, and which prompts are not through after it."""
    out = scheduler.schedule()
    begins = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
    cached = out.scheduled_cached_reqs
    begins |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    vars(scheduler).setdefault("memory", Memory(scheduler)).step(begins, out.num_scheduled_tokens)
    return out, begins, {name for name in out.num_scheduled_tokens if scheduler.requests[name].is_prefill_chunk}


def begin(scheduler, one):
    """Serve a request's first step."""
    scheduler.add_request(one)
    out, _, chunks = step(scheduler)
    finish(scheduler, out, chunks)


def finish(scheduler, out, chunks=()):
    """Give the scheduler a step's result: a token for each request whose prompt is through."""
    names = list(out.num_scheduled_tokens)
    sampled = [[] if name in chunks else [9] for name in names]
    scheduler.update_from_output(out, ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, sampled))


def random_requests(seed, count=60):
    draw = random.Random(seed)
    for number in range(count):
        parts = [draw.randint(1, 60)]
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
            parts += [("image", 144), draw.randint(1, 40)]
        if draw.random() < 0.2:
            parts[0] += draw.randint(300, 420)
        yield request(f"{number}", parts, tokens=draw.randint(1, 30))


@pytest.mark.parametrize("base", [Scheduler, AsyncScheduler])
@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        (400, {}),
        (70, {}),  # of which one request takes up to 65: they preempt each other
        (100, {"max_num_batched_tokens": 200}),
        (100, {"long_prefill_token_threshold": 250}),
        (100, {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024}),
        (100, {"enable_prefix_caching": False}),
        (100, {"disable_chunked_mm_input": True}),
        (100, {"embeds": 144}),
        (100, {"embeds": 300}),
        (100, {"scheduling_policy": "priority"}),
    ],
    ids=str,
)
def test_pruned_prompts_come_whole_and_all_requests_end(base, blocks, options):
    options = {"max_num_batched_tokens": 400, **options}
    scheduler = scheduler_of(base, blocks, **options)
    requests = list(random_requests(blocks))
    lag = 2 if base is AsyncScheduler else 1
    pieces = run(scheduler, requests, lag)
    repeated = [again(one, f"{one.request_id}-{n}", tokens=9 - n) for one in requests[:-20:-1] for n in range(3)]
    for n in range(0, len(repeated), 2):
        pieces |= run(scheduler, repeated[n : n + 2], lag)
    requests += repeated
    pruned = [one.request_id for one in requests if one.mm_features and getattr(one.mm_features[0], MARK)]
    dense = [one.request_id for one in requests if one.mm_features and not getattr(one.mm_features[0], MARK)]
    assert pruned
    assert len(pruned) == scheduler.fitprune_counts.new["prompts_pruned"]
    assert len(dense) == sum(n for name, n in scheduler.fitprune_counts.new.items() if "dense" in name)
    for one in (one for one in requests if one.request_id in pruned):
        # Before its image in any steps, then in one, then its answer; from the start again after a preemption.
        first, whole, held = first_image(one), one.num_prompt_tokens, 0
        for begin, count in pieces[one.request_id]:
            # Or with all of its images in the blocks of an ended request.
            assert begin == held or begin <= first or last_image(one) <= begin < whole, pieces[one.request_id]
            held = begin + count
            assert held <= first if begin <= first and held < whole else held >= whole
        assert held >= whole
    limit = options["max_num_batched_tokens"]
    chunks = options.get("enable_chunked_prefill", True)
    assert all(one.num_prompt_tokens - chunks * first_image(one) <= limit for one in requests if is_pruned(one))
    begins = [(pieces[one.request_id][0][0], first_image(one)) for one in requests if is_pruned(one)]
    assert any(0 < begin <= first for begin, first in begins) == options.get("enable_prefix_caching", True)
    assert any(begin > first for begin, first in begins) == options.get("enable_prefix_caching", True)
    assert blocks > 70 or any(one.num_preemptions for one in requests if one.request_id in pruned)
    assert scheduler.fitprune_counts.new["prompts_held"] or not chunks or blocks == 70


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_text_is_shared_up_to_the_first_image(kept):
    """Where the keys before it can be read."""
    scheduler = scheduler_of(kv_cache_dtype=kept)
    for turn in range(2):
        question = 20 + turn
        pieces = run(
            scheduler, [request(f"text{turn}", [100]), request(f"image{turn}", [40, ("image", 144), question])]
        )
        assert pieces[f"text{turn}"][0][0] == (96 if turn else 0)
        assert pieces[f"image{turn}"][0] == ((32, 152 + question) if kept == "auto" else (0, 184 + question))


PROMPT = [40, ("image", 144), 20]
ALONE, TAKEN = (32, 172), (192, 12)  # first token and number of those that PROMPT's step has


def first_steps(scheduler, *requests):
    """Serve requests together; of each, its first step."""
    pieces = run(scheduler, requests)
    return [pieces[one.request_id][0] for one in requests]


@pytest.mark.parametrize(
    ("parts", "kept", "expected"),
    [
        (PROMPT, "auto", TAKEN),
        (PROMPT, "fp8", TAKEN),
        ([("image", 144), 20], "auto", (160, 4)),
        ([40, ("image", 144), 5, ("image", 144), 20], "auto", (336, 17)),
        ([40, ("image", 144), 10], "auto", (192, 2)),
        ([40, ("image", 144), 9], "auto", (32, 161)),  # 192 would leave one row, and 176 is inside the image
        ([40, ("image", 144), 7], "auto", (32, 159)),
    ],
)
def test_an_equal_prompt_takes_over_the_blocks_of_an_ended_one(parts, kept, expected):
    scheduler = scheduler_of(kv_cache_dtype=kept)
    one = request("one", parts, tokens=40)
    assert first_steps(scheduler, one)[0][0] == 0
    for tokens in (1, 30, 2):
        assert first_steps(scheduler, again(one, f"{tokens}", tokens=tokens)) == [expected]
    shared = 32 if kept == "auto" and first_image(one) else 0
    alone = shared, one.num_prompt_tokens - shared
    assert first_steps(scheduler, *(again(one, name) for name in "abc")) == [expected, alone, alone]


def test_another_prompt_takes_nothing_over():
    scheduler = scheduler_of()
    one = request("one", PROMPT)
    run(scheduler, [one])
    ends_otherwise, salted, scored = (again(one, name) for name in ("ends", "salted", "scored"))
    ends_otherwise.prompt_token_ids[-1] += 1
    salted = again(one, "salted", cache_salt="salt")
    scored.skip_reading_prefix_cache = True
    assert first_steps(scheduler, ends_otherwise) == [ALONE]
    assert first_steps(scheduler, salted) == [(0, 204)]
    assert first_steps(scheduler, scored) == [(0, 204)]
    assert first_steps(scheduler, again(one, "two")) == [TAKEN]


@pytest.mark.parametrize("base", [Scheduler, AsyncScheduler])
def test_a_living_requests_blocks_are_not_taken_over(base):
    scheduler = scheduler_of(base)
    one = request("one", PROMPT, tokens=30)
    begin(scheduler, one)
    assert first_steps(scheduler, again(one, "two"), again(one, "three")) == [ALONE, ALONE]
    assert first_steps(scheduler, again(one, "four"), again(one, "five")) == [TAKEN, ALONE]


@pytest.mark.parametrize("base", [Scheduler, AsyncScheduler])
def test_blocks_whose_step_has_not_run_are_not_taken_over(base):
    scheduler = scheduler_of(base)
    one = request("one", PROMPT)
    scheduler.add_request(one)
    out, *_ = step(scheduler)
    scheduler.finish_requests("one", RequestStatus.FINISHED_ABORTED)
    scheduler.add_request(again(one, "two"))
    assert step(scheduler)[0].num_scheduled_tokens == {"two": ALONE[1]}
    finish(scheduler, out)


def test_an_aborted_requests_blocks_are_taken_over_if_it_has_answered():
    scheduler = scheduler_of()
    one = request("one", PROMPT)
    begin(scheduler, one)
    scheduler.finish_requests("one", RequestStatus.FINISHED_ABORTED)
    scheduler.add_request(again(one, "two"))
    assert step(scheduler)[0].num_scheduled_tokens == {"two": TAKEN[1]}


def test_a_preempted_requests_blocks_are_not_taken_over():
    scheduler = scheduler_of()
    one = request("one", PROMPT)
    begin(scheduler, one)
    scheduler.running.remove(one)
    scheduler._preempt_request(one, 0.0)
    scheduler.add_request(again(one, "two"))
    assert step(scheduler)[0].num_scheduled_tokens == {"one": ALONE[1] + 1, "two": ALONE[1]}


def test_blocks_of_a_step_that_was_taken_back_are_not_taken_over():
    """By priority vLLM preempts also what already has its place in the step; its new blocks have their hashes then."""
    scheduler = scheduler_of(blocks=70, scheduling_policy="priority", long_prefill_token_threshold=250)
    one = request("one", [300, ("image", 144), 20], tokens=30, priority=1)
    begin(scheduler, one)
    finish(scheduler, step(scheduler)[0])
    scheduler.running.remove(one)
    scheduler._preempt_request(one, 0.0)
    scheduler.add_request(request("long", [600], cache_salt="salt"))
    out, _, chunks = step(scheduler)
    assert out.num_scheduled_tokens == {"long": 250, "one": 12}  # its image has no room beside the long one
    scheduler.add_request(request("urgent", [32], cache_salt="salt"))
    for _ in range(2):
        finish(scheduler, out, chunks)
        out, _, chunks = step(scheduler)
    finish(scheduler, out, chunks)
    assert one.num_preemptions == 2
    scheduler.finish_requests("one", RequestStatus.FINISHED_ABORTED)
    assert first_steps(scheduler, again(one, "two")) == [(288, 176)]


@pytest.mark.parametrize("place", [0, 5, 11])
def test_blocks_are_taken_over_if_all_are_there(place):
    """The first is of text that others share, the others are the image's and the question's."""
    scheduler = scheduler_of()
    one = request("one", PROMPT)
    begin(scheduler, one)
    lost = scheduler.kv_cache_manager.get_block_ids("one")[0][place]
    run(scheduler, [])
    scheduler.kv_cache_manager.evict_blocks({lost})
    assert first_steps(scheduler, again(one, "two")) == [ALONE if place else (0, 204)]
    assert first_steps(scheduler, again(one, "three")) == [TAKEN]
    assert scheduler.reset_prefix_cache()
    assert first_steps(scheduler, again(one, "four")) == [(0, 204)]


def test_what_is_left_of_a_prompt_comes_in_one_step():
    scheduler = scheduler_of()
    one = request("one", PROMPT)
    run(scheduler, [one])
    pieces = run(scheduler, [request("text", [390]), again(one, "two")])
    assert pieces["text"][0] == (32, 358)
    assert pieces["two"][0] == TAKEN
    pieces = run(scheduler, [request("long", [431]), again(one, "three")])
    assert pieces["three"][0] == TAKEN


def test_as_many_prompts_are_known_as_is_said(monkeypatch):
    monkeypatch.setattr("fitprune.integrations.vllm.scheduler.ENDED", 2)
    scheduler = scheduler_of()
    prompts = [request(f"{n}", [40 + n, ("image", 144), 20 - n]) for n in range(3)]
    for one in prompts:
        run(scheduler, [one])
    assert first_steps(scheduler, again(prompts[1], "a"), again(prompts[0], "b")) == [TAKEN, ALONE]
    assert len(scheduler._ended) == 2


def test_text_before_an_image_comes_in_steps_of_its_own():
    scheduler = scheduler_of()
    pieces = run(scheduler, [request("one", [300, ("image", 144), 20]), request("two", [1010], tokens=1)])
    assert pieces["one"][:2] == [(0, 300), (300, 164)]
    assert pieces["two"][0] == (288, 100)  # of which the first is to hold it
    assert scheduler.fitprune_counts.new["prompts_pruned"] == 1


@pytest.mark.parametrize(
    ("parts", "options", "reason"),
    [
        ([5, ("image", 144)], {}, "no_text_after_image"),
        ([("image", 144), ("image", 144)], {}, "no_text_after_image"),
        ([5, ("video", 144), 5], {}, "other_media"),
        ([5, ("image", 144), 5, ("audio", 20), 5], {}, "other_media"),
        ([300, ("image", 144), 300], {}, "longer_than_step"),
        ([5, ("image", 144), 5, ("image", 144), 5], {"embeds": 200}, "encoder_budget"),
        ([5, ("image", 144), 100], {"long_prefill_token_threshold": 200}, "longer_than_step"),
        ([5, ("image", 144), 5], {"resumable": True}, "streaming_input"),
    ],
)
def test_what_cannot_be_pruned_is_counted_by_reason(parts, options, reason):
    assert reason in REASONS
    streams = {"resumable": options.pop("resumable", False)}
    scheduler = scheduler_of(**options)
    one = request("one", parts, **streams)
    scheduler.add_request(one)
    assert scheduler.fitprune_counts.new == {f"prompts_dense/{reason}": 1}
    assert not any(getattr(feature, MARK) for feature in one.mm_features)
    assert one.cache_salt is None


def test_an_image_whose_place_ends_in_text_may_end_a_prompt():
    """As of families whose image has a closing token, or row breaks, among its placeholders."""
    scheduler = scheduler_of()
    one = request("one", [5, ("image", 10)])
    place = one.mm_features[0].mm_position
    embeds = torch.tensor([True] * 9 + [False])
    one.mm_features[0].mm_position = PlaceholderRange(place.offset, place.length, is_embed=embeds)
    scheduler.add_request(one)
    assert scheduler.fitprune_counts.new["prompts_pruned"] == 1


def test_a_scheduler_of_another_kind_stays_as_it_is():
    """Without a recipe it serves as ever; with one it is refused, which test_vllm_rules.py has."""
    other = type("Other", (), {})
    assert pruning(other) is other


def test_without_a_recipe_nothing_changes(monkeypatch):
    monkeypatch.delenv("FITPRUNE_RECIPE")
    scheduler = scheduler_of(Scheduler)
    one = request("one", [5, ("image", 144), 5])
    before = list(one.block_hashes)
    scheduler.add_request(one)
    assert not hasattr(one.mm_features[0], MARK)
    assert (one.block_hashes, one.cache_salt, one.skip_reading_prefix_cache) == (before, None, False)
