"""The scheduler of the vLLM plug-in, alone: a pruned prompt comes whole from its image on, and none waits forever."""

import collections
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
from vllm.v1.request import Request
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
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    sampling.update_from_generation_config({}, eos_token_id=1)
    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256"))
    return Request(name, ids, sampling, None, mm_features=features, block_hasher=hasher, **options)


class Memory:
    """What the cache would hold: in each slot a token, all before it, and for a pruned request's own part whose it is.

    Args:
        scheduler: whose steps are watched.
    """

    def __init__(self, scheduler):
        self._scheduler, self._slots, self._tokens = scheduler, {}, {}

    def step(self, begins, counts):
        """Write the tokens of a step, and check that those before them are there."""
        tables, owners = {}, collections.Counter()
        for name in self._scheduler.requests:
            tables[name] = self._scheduler.kv_cache_manager.get_block_ids(name)[0]
            owners.update(tables[name])
        for name, count in counts.items():
            for place in range(begins[name], begins[name] + count):
                self._slots[tables[name][place // BLOCK], place % BLOCK] = self._token(name, place)
        for name in counts:
            if counts[name] > 1:
                for place in range(begins[name]):
                    slot = tables[name][place // BLOCK], place % BLOCK
                    assert self._slots[slot] == self._token(name, place), (name, place, begins[name])
            one = self._scheduler.requests[name]
            if is_pruned(one):
                assert all(owners[block] == 1 for block in tables[name][first_image(one) // BLOCK :]), name

    def _token(self, name, place):
        one = self._scheduler.requests[name]
        tokens = self._tokens.setdefault((name, one.num_preemptions), [0])
        for n in range(len(tokens) - 1, place + 1):
            token = one.all_token_ids[n] if n < one.num_tokens else 9  # not sampled yet
            images = [
                image.identifier
                for image in one.mm_features
                if 0 <= n - image.mm_position.offset < image.mm_position.length
            ]
            owner = (name, one.num_preemptions) if is_pruned(one) and n >= first_image(one) else None
            tokens.append(hash((tokens[-1], token, *images, owner)))
        return tokens[place + 1]


def is_pruned(one):
    return bool(one.mm_features) and getattr(one.mm_features[0], MARK)


def first_image(one):
    return one.mm_features[0].mm_position.offset


def run(scheduler, requests, lag=1, steps=3000):
    """Serve requests until all have ended; `lag` steps are scheduled ahead of their results.

    Returns:
        For each request, (first token, number of tokens) of each of its steps.
    """
    waiting, pieces, ahead = list(requests), collections.defaultdict(list), collections.deque()
    memory = vars(scheduler).setdefault("memory", Memory(scheduler))  # of all runs
    for _ in range(steps):
        for _ in range(2):
            if waiting:
                scheduler.add_request(waiting.pop(0))
        out = scheduler.schedule()
        states = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        cached = out.scheduled_cached_reqs
        states |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, count in out.num_scheduled_tokens.items():
            pieces[name].append((states[name], count))
        memory.step(states, out.num_scheduled_tokens)
        chunks = {name for name in out.num_scheduled_tokens if scheduler.requests[name].is_prefill_chunk}
        ahead.append((out, chunks))
        if len(ahead) >= lag:
            finish(scheduler, *ahead.popleft())
        if not waiting and not scheduler.requests:
            return pieces
    unfinished = {name: (one.status, one.num_computed_tokens) for name, one in scheduler.requests.items()}
    raise AssertionError(f"after {steps} steps these are unfinished: {unfinished}")


def finish(scheduler, out, chunks):
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
    pieces = run(scheduler, requests, lag=2 if base is AsyncScheduler else 1)
    pruned = [one.request_id for one in requests if one.mm_features and getattr(one.mm_features[0], MARK)]
    dense = [one.request_id for one in requests if one.mm_features and not getattr(one.mm_features[0], MARK)]
    assert pruned
    assert len(pruned) == scheduler.fitprune_counts.new["prompts_pruned"]
    assert len(dense) == sum(n for name, n in scheduler.fitprune_counts.new.items() if "dense" in name)
    for one in (one for one in requests if one.request_id in pruned):
        # Before its image in any steps, then in one, then its answer; from the start again after a preemption.
        first, whole, held = first_image(one), one.num_prompt_tokens, 0
        for begin, count in pieces[one.request_id]:
            assert begin == held or begin <= first, pieces[one.request_id]
            held = begin + count
            assert held <= first if begin <= first and held < whole else begin <= first or begin >= whole
        assert held >= whole
    limit = options["max_num_batched_tokens"]
    chunks = options.get("enable_chunked_prefill", True)
    assert all(one.num_prompt_tokens - chunks * first_image(one) <= limit for one in requests if is_pruned(one))
    hits = [begin for one in requests if is_pruned(one) for begin, _ in pieces[one.request_id][:1] if begin]
    assert bool(hits) == options.get("enable_prefix_caching", True)
    assert blocks > 70 or any(one.num_preemptions for one in requests if one.request_id in pruned)
    assert scheduler.fitprune_counts.new["prompts_held"] or not chunks or blocks == 70


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_text_is_shared_up_to_the_first_image(kept):
    """Where the keys before it can be read."""
    scheduler = scheduler_of(kv_cache_dtype=kept)
    for turn in range(2):
        pieces = run(scheduler, [request(f"text{turn}", [100]), request(f"image{turn}", [40, ("image", 144), 20])])
        assert pieces[f"text{turn}"][0][0] == (96 if turn else 0)
        assert pieces[f"image{turn}"][0] == ((32, 172) if kept == "auto" else (0, 204))


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
