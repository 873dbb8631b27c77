"""The pruner of the vLLM plug-in without an engine: a small decoder with a cache of blocks, and steps made by hand.

Whatever of a prompt's beginning is in the cache before its step, the same tokens leave and the same answer comes.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed: it has wheels for Linux alone")

from transformers import AutoConfig
from vllm.model_executor.layers.attention import Attention

from fitprune import PruningRecipe
from fitprune._support import assets
from fitprune.families.config import fingerprint_of
from fitprune.integrations.vllm import pruner
from fitprune.integrations.vllm.runners import PromptFacts
from fitprune.integrations.vllm.scheduler import MARK

LAYERS, BLOCK, HEADS, KV_HEADS, WIDTH = 8, 4, 4, 2, 8
SIZE = HEADS * WIDTH
IDS = 60


@dataclasses.dataclass
class Common:
    """The fields of vLLM's CommonAttentionMetadata that are used."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    num_actual_tokens: int
    max_query_len: int
    names: list
    positions: torch.Tensor | None = None
    _num_computed_tokens_cache: None = None
    _token_to_req_indices_cache: None = None

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class ByRows:
    """Keys in the front half of each row, as FlashAttention and Triton write them."""

    scale = WIDTH**-0.5

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        cache.transpose(1, 2)[slots // BLOCK, slots % BLOCK] = torch.cat((key, value), -1)


class PagedAttention(Attention):
    """Attention by a step's metadata, over the keys that the cache holds."""

    def __init__(self, number, blocks, context):
        nn.Module.__init__(self)
        self.impl, self.context, self.layer_name = ByRows(), context, f"layer {number}"
        self.num_kv_heads, self.head_size, self.dtype = KV_HEADS, WIDTH, torch.float64
        self.kv_sharing_target_layer_name = None
        self.kv_cache = torch.full((blocks, KV_HEADS, BLOCK, 2 * WIDTH), torch.nan, dtype=torch.float64)

    def forward(self, query, key, value):
        metadata = self.context.attn_metadata[self.layer_name]
        query = query.view(-1, HEADS, WIDTH)
        key, value = (part.view(-1, KV_HEADS, WIDTH) for part in (key, value))
        slots = self.context.slot_mapping[self.layer_name]
        assert len(query) == len(slots) == metadata.num_actual_tokens
        self.impl.do_kv_cache_update(self, key, value, self.kv_cache, slots)
        out, starts = torch.empty_like(query), metadata.query_start_loc.tolist()
        for row, held in enumerate(metadata.seq_lens.tolist()):
            place = torch.arange(held)
            past = self.kv_cache.transpose(1, 2)[metadata.block_table_tensor[row, place // BLOCK], place % BLOCK]
            keys, values = past.repeat_interleave(HEADS // KV_HEADS, 1).split(WIDTH, -1)
            own = query[starts[row] : starts[row + 1]]
            scores = torch.einsum("qhd,khd->hqk", own, keys) * self.impl.scale
            later = place > torch.arange(held - len(own), held)[:, None]
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            out[starts[row] : starts[row + 1]] = torch.einsum("hqk,khd->qhd", weights, values)
        return out.flatten(1)


class AddNorm(nn.Module):
    """A norm as vLLM's, that adds what stands beside the stream."""

    def forward(self, hidden, residual):
        total = hidden + residual
        return nn.functional.layer_norm(total, (SIZE,)), total


class DecoderLayer(nn.Module):
    def __init__(self, number, blocks, context):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = AddNorm(), AddNorm()
        self.query, self.out = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.key, self.value = nn.Linear(SIZE, KV_HEADS * WIDTH), nn.Linear(SIZE, KV_HEADS * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 2 * SIZE), nn.GELU(), nn.Linear(2 * SIZE, SIZE))
        self.attention = PagedAttention(number, blocks, context)

    def forward(self, positions, hidden_states, residual):
        hidden, residual = self.input_layernorm(hidden_states, residual)
        placed = hidden + torch.sin(positions[:, None] * torch.arange(1, SIZE + 1) / SIZE)
        hidden = self.out(self.attention(3 * self.query(placed), self.key(placed), self.value(hidden)))
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Runner:
    """What of vLLM's model runner is used, with a decoder whose weights are always the same.

    Args:
        recipe: to prune by; None for none.
        monkeypatch: pytest's.
    """

    def __init__(self, recipe, monkeypatch, blocks=100):
        self.context = SimpleNamespace(attn_metadata={}, slot_mapping={})
        monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: self.context)
        monkeypatch.setattr(pruner, "reader_of", lambda runner: self)
        alone = SimpleNamespace(whole=lambda own: own, agreed=lambda stays: stays)
        monkeypatch.setattr(pruner.TensorRanks, "of", lambda config: alone)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [DecoderLayer(number, blocks, self.context) for number in range(LAYERS)]
            self.decoder = SimpleNamespace(layers=nn.ModuleList(layers).double(), norm=nn.Identity())
            self.embedding = torch.randn(IDS, SIZE, dtype=torch.float64)
        self.group = SimpleNamespace(
            backend=SimpleNamespace(get_name=lambda: "CPU_ATTN"), build_metadata=lambda common: common
        )
        self.attn_groups = [[self.group]]
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(cache_dtype="auto"), model_config=SimpleNamespace(dtype=torch.float64)
        )
        self.model_config = SimpleNamespace(hf_config=None)
        self.device, self.block_size, self.requests = torch.device("cpu"), BLOCK, {}
        self.pruner = pruner.Pruner(self, recipe) if recipe else None

    def get_model(self):
        return SimpleNamespace(get_language_model=lambda: SimpleNamespace(model=self.decoder))

    def name(self, row, common):
        return common.names[row]

    def holds(self, name):
        return name in self.requests

    def prompt(self, row, common):
        one = self.requests[common.names[row]]
        return PromptFacts(one.length, one.features, lambda: torch.tensor(one.ids[: one.length]))

    @torch.no_grad()
    def step(self, *pieces):
        """Run (name, first token, number of tokens) of some requests; give the state of each one's last token."""
        ones = [self.requests[name] for name, _, _ in pieces]
        lengths = torch.tensor([count for _, _, count in pieces])
        ends = torch.tensor([first + count for _, first, count in pieces])
        starts = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
        table = torch.zeros(len(ones), max(len(one.blocks) for one in ones), dtype=torch.long)
        for row, one in enumerate(ones):
            table[row, : len(one.blocks)] = torch.tensor(one.blocks)
        places = [torch.arange(first, first + count) for _, first, count in pieces]
        slots = torch.cat([table[row, each // BLOCK] * BLOCK + each % BLOCK for row, each in enumerate(places)])
        ids = [one.ids[place] for one, each in zip(ones, places, strict=True) for place in each.tolist()]
        names = [name for name, _, _ in pieces]
        positions, biggest = torch.cat(places), int(lengths.max())
        common = Common(starts, starts, ends, ends, table, slots, len(ids), biggest, names, positions)
        metadata = self.group.build_metadata(common)
        for layer in self.decoder.layers:
            self.context.attn_metadata[layer.attention.layer_name] = metadata
            self.context.slot_mapping[layer.attention.layer_name] = slots
        hidden = self.embedding[ids]
        residual = torch.zeros_like(hidden)
        for layer in self.decoder.layers:
            hidden, residual = layer(positions, hidden, residual)
        assert len(hidden) == len(ids)
        return (hidden + residual)[starts[1:] - 1]


def request(ids, image, blocks, prompt=None):
    """A request with an image at a slice of its prompt; None for none."""
    features = []
    if image is not None:
        place = SimpleNamespace(offset=image.start, length=image.stop - image.start, is_embed=None)
        features = [SimpleNamespace(modality="image", mm_position=place, **{MARK: True})]
    return SimpleNamespace(ids=ids, features=features, blocks=blocks, length=prompt or len(ids))


@pytest.fixture(params=["fitprune", "self", "value", "random"])
def recipe(request):
    parameters = {"seed": 3} if request.param == "random" else None
    scorer = {"name": request.param, **({"parameters": parameters} if parameters else {})}
    keep = (1.0, 0.7, 0.7, 0.4, 0.4, 0.4, 0.25, 0.25)
    model = fingerprint_of(AutoConfig.from_pretrained(assets.folder("model")))
    return PruningRecipe(keep, model, 144, scorer=scorer)


TEXT, PICTURE = 10, 20  # tokens before the image, and of it; the question has 5, and the answer 6
DRAW = torch.Generator().manual_seed(1)
PROMPT = torch.randint(IDS, (TEXT + PICTURE + 5,), generator=DRAW).tolist()
ANSWER = torch.randint(IDS, (6,), generator=DRAW).tolist()
IMAGE = slice(TEXT, TEXT + PICTURE)
WHOLE = len(PROMPT)


def answers(runner, name):
    return torch.cat([runner.step((name, WHOLE + n, 1)) for n in range(len(ANSWER))])


@pytest.fixture
def expected(recipe, monkeypatch):
    """States of the prompt's last token and of the answer's, all of the prompt in one step; and the tokens lost."""
    runner = Runner(recipe, monkeypatch)
    runner.requests["one"] = request(PROMPT + ANSWER, IMAGE, list(range(1, 12)), WHOLE)
    states = torch.cat((runner.step(("one", 0, WHOLE)), answers(runner, "one")))
    assert runner.pruner._lost["one"][1][-1] == 15
    dense = Runner(None, monkeypatch)
    dense.requests = runner.requests
    assert not torch.allclose(dense.step(("one", 0, WHOLE)), states[:1])
    return states, runner.pruner._lost["one"][1]


@pytest.mark.parametrize("cached", [1, 4, 7, 10])
def test_a_prompt_whose_beginning_came_before_is_pruned_alike(recipe, expected, monkeypatch, cached):
    runner = Runner(recipe, monkeypatch)
    runner.requests["one"] = request(PROMPT + ANSWER, IMAGE, list(range(20, 9, -1)), WHOLE)
    for place in range(cached):  # in steps of one token
        runner.step(("one", place, 1))
    states = torch.cat((runner.step(("one", cached, WHOLE - cached)), answers(runner, "one")))
    assert torch.allclose(states, expected[0], atol=1e-9)
    assert runner.pruner._lost["one"][1] == expected[1]


def test_blocks_before_the_image_are_another_requests(recipe, expected, monkeypatch):
    """Of text, or pruned too, in the same step or before; which end, lose tokens and decode beside it."""
    runner = Runner(recipe, monkeypatch)
    shared = TEXT // BLOCK * BLOCK
    runner.requests["text"] = request(PROMPT[:shared] + ANSWER, None, [5, 6, 7, 8])
    runner.step(("text", 0, shared))
    other = PROMPT[:TEXT] + PROMPT[TEXT + 3 : TEXT + PICTURE] + PROMPT[-5:] + ANSWER
    runner.requests["other"] = request(other, slice(TEXT, TEXT + PICTURE - 3), [5, 6, *range(20, 30)], WHOLE - 3)
    runner.requests["one"] = request(PROMPT + ANSWER, IMAGE, [5, 6, *range(30, 40)], WHOLE)
    states = [
        runner.step(("text", shared, 1), ("other", shared, WHOLE - 3 - shared), ("one", shared, WHOLE - shared))[2]
    ]
    runner.step(("text", shared + 1, 1))
    for n in range(len(ANSWER)):
        states.append(runner.step(("one", WHOLE + n, 1), ("other", WHOLE - 3 + n, 1))[0])
    assert torch.allclose(torch.stack(states), expected[0], atol=1e-9)


def test_a_preempted_request_begins_again(recipe, expected, monkeypatch):
    """With text before its image in a step of its own, where it has lost nothing yet."""
    runner = Runner(recipe, monkeypatch)
    runner.requests["one"] = request(PROMPT + ANSWER, IMAGE, list(range(1, 12)), WHOLE)
    runner.step(("one", 0, WHOLE))
    runner.step(("one", WHOLE, 1))
    runner.requests["one"].blocks = list(range(40, 51))
    runner.step(("one", 0, 1))
    runner.step(("one", 1, TEXT - 1))
    states = runner.step(("one", TEXT, WHOLE + 2 - TEXT))
    states = torch.cat((states, *(runner.step(("one", WHOLE + n, 1)) for n in range(2, len(ANSWER)))))
    assert torch.allclose(states, expected[0][2:], atol=1e-9)


def test_what_has_ended_is_forgotten(recipe, monkeypatch):
    runner = Runner(recipe, monkeypatch)
    for number in range(5):
        runner.requests = {f"{number}": request(PROMPT, IMAGE, list(range(1, 12)))}
        runner.step((f"{number}", 0, WHOLE))
    assert list(runner.pruner._lost) == ["4"]
