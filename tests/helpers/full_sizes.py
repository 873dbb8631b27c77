"""Models at full size: their published configs and figures, with sources. Nothing is downloaded; weights are on "meta".

Only what a shape depends on is written out; the rest is left at transformers' defaults. A source is where a figure was
read: a stored copy of the Hub's own page where there is one, else a public copy of the config or another program's
example. What no source was found for is marked "from memory".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from fitprune.costs.sizes import DecoderSizes
from fitprune.speed.random_models import RANDOM_MODELS, RandomModel
from helpers.models import CACHE

TEXT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class FullSize:
    """A published model.

    Attributes:
        name: as people say it.
        shape: its config, written out, and an image.
        config_source: where those values were read.
        decoder: decoder sizes, written out a second time: what must come out.
        parameters: the published total.
        exact: it is published to the last digit.
        parameters_source: where.
        made_of: how the image's visual tokens come about.
        reads_grid: whether its encoder reads the values of a grid, and so needs real tensors.
    """

    name: str
    shape: RandomModel
    config_source: str
    decoder: DecoderSizes
    parameters: int
    exact: bool
    parameters_source: str
    made_of: str
    reads_grid: bool = False

    @property
    def visual_tokens(self) -> int:
        """Of the image."""
        return self.shape.visual_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, text included."""
        return self.visual_tokens + TEXT_TOKENS


def build(entry: FullSize) -> Any:
    """Make the model in bf16 on the meta device: shapes, but no memory."""
    with torch.device("meta"):
        model = getattr(transformers, entry.shape.architecture)(entry.shape.config())
    return model.to(torch.bfloat16).eval()


def prefill(model: Any, tokens: int) -> tuple[int, int]:
    """Run decoder and head over `tokens` embeddings, the head on the last; give FLOPs counted and KV bytes held."""
    text = model.config.text_config
    embeds = torch.empty(1, tokens, text.hidden_size, dtype=torch.bfloat16, device="meta")
    cache = DynamicCache(config=text)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model.model.language_model(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True)[0]
        model.lm_head(hidden[:, -1:])
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in held)


def hand_flops(shape: DecoderSizes, tokens: int) -> int:
    """Count a dense prefill by hand: two per multiply-accumulate, attention over all pairs, head on one position."""
    n, d, q = tokens, shape.hidden, shape.heads * shape.head_dim
    kv, m = shape.kv_heads * shape.head_dim, shape.intermediate
    projections = 2 * n * d * (q + kv + kv + q)
    products = 2 * n * n * q + 2 * n * n * q
    gate_up_down = 3 * 2 * n * d * m
    return shape.layers * (projections + products + gate_up_down) + 2 * d * shape.vocab


_VICUNA_7B = DecoderSizes(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocab=32064)
_VICUNA_13B = DecoderSizes(layers=40, hidden=5120, intermediate=13824, heads=40, kv_heads=40, head_dim=128, vocab=32064)
_MISTRAL_7B = DecoderSizes(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=32064)
_QWEN2_7B = DecoderSizes(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064)

_NEXT_TOKENS = "24 x 24 of the whole image, and 48 rows of 48 and a newline"

FULL_SIZES = (
    FullSize(
        name="LLaVA-1.5-7B",
        shape=RANDOM_MODELS["llava-1.5-7b"],
        config_source="copy of config.json in github.com/tung2kg1/AI-Stock-Chart-Analysis (61f63b5), which leaves the "
        "decoder at LlamaConfig's defaults",
        decoder=_VICUNA_7B,
        parameters=7_063_427_072,
        exact=True,
        parameters_source="total_size 14,126,854,144 bytes of fp16 in the same copy's safetensors index",
        made_of="patches of 14, without the class token",
    ),
    FullSize(
        name="LLaVA-1.5-13B",
        shape=RANDOM_MODELS["llava-1.5-13b"],
        config_source="decoder: config.json of llava-v1.6-vicuna-13b-hf, the same Vicuna-13B-v1.5, in issue "
        "haotian-liu/LLaVA#1378; tower: as the 7B",
        decoder=_VICUNA_13B,
        parameters=13_345_000_000,
        exact=False,
        parameters_source="26.69 GB of fp16 files (4.96 + 4.97 + 4.88 + 4.93 + 4.93 + 2.02) on the Hub's page, rounded "
        "to 0.01 GB each",
        made_of="patches of 14, without the class token",
    ),
    FullSize(
        name="LLaVA-NeXT-7B Vicuna",
        shape=RANDOM_MODELS["llava-next-7b"],
        config_source="transformers' convert_llava_next_weights_to_hf.py (063b32f): lmsys/vicuna-7b-v1.5, vocabulary "
        "resized to 32,064; grid: issue haotian-liu/LLaVA#1378",
        decoder=_VICUNA_7B,
        parameters=7_060_000_000,
        exact=False,
        parameters_source='"7.06B params" on the Hub\'s page of a full fine-tune (gray311/vlm_unlearned_ft_llava_v1.6_'
        "vicuna_7b)",
        made_of=_NEXT_TOKENS,
    ),
    FullSize(
        name="LLaVA-NeXT-7B Mistral",
        shape=RANDOM_MODELS["llava-next-mistral-7b"],
        config_source="config.json of mistralai/Mistral-7B-Instruct-v0.2 as copied by huggingface.co/teilomillet/"
        "Merlin-7B-v0.1 (sliding_window null); vocabulary and grid: as the Vicuna model",
        decoder=_MISTRAL_7B,
        parameters=7_570_000_000,
        exact=False,
        parameters_source="15.14 GB of fp16 files (4.92 + 4.92 + 4.92 + 0.38) on the Hub's pages, the third in the "
        "copy TrgTuan10/llava-v1.6-mistral-7b-hf",
        made_of=_NEXT_TOKENS,
    ),
    FullSize(
        name="LLaVA-OneVision-7B",
        shape=RANDOM_MODELS["llava-onevision-7b"],
        config_source="transformers' convert_llava_onevision_weights_to_hf.py (01080c6): Qwen2-7B-Instruct, vocabulary "
        "152,064 + 2 padded to 152,128; its sizes: huggingface.co/REILX/llava-Qwen2-7B-Instruct-Chinese-CLIP",
        decoder=dataclasses.replace(_QWEN2_7B, vocab=152128),
        parameters=8_030_000_000,
        exact=False,
        parameters_source='"8.03B params" on the Hub\'s page of a full fine-tune (zixianma/'
        "llava_ov_7b_tune_vision_293k-seq_len_8192-lr_1e-5-ep_2)",
        made_of="27 x 27 of the whole image, and 54 rows of 54 and a newline",
    ),
    FullSize(
        name="Qwen2.5-VL-7B",
        shape=RANDOM_MODELS["qwen2.5-vl-7b"],
        config_source="print of the loaded model in github.com/acproject/duorou (docs/qwen2.5vl_graph.md); vocabulary: "
        "issue QwenLM/Qwen3-VL#1973; mrope_section from memory (no shape depends on it)",
        decoder=_QWEN2_7B,
        parameters=8_292_166_656,
        exact=True,
        parameters_source="total_size 16,584,333,312 bytes of bf16 in the safetensors index, and numParameters on "
        "the Hub's pages, both as quoted in public repositories",
        made_of="patches of 14, merged 2 x 2",
        reads_grid=True,
    ),
    FullSize(
        name="Qwen3-VL-8B",
        shape=RANDOM_MODELS["qwen3-vl-8b"],
        config_source="config.json of a fine-tune, huggingface.co/Steinate/Cortex; tower: that of the 32B in "
        "huggingface.co/quanliang/F1, but 4,096 wide at its end",
        decoder=DecoderSizes(
            layers=36,
            hidden=4096,
            intermediate=12288,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab=151936,
            first_prunable=3,
        ),
        parameters=8_767_123_696,
        exact=True,
        parameters_source="safetensors.total of the Hub's API, as quoted in public repositories",
        made_of="patches of 16, merged 2 x 2",
        reads_grid=True,
    ),
    FullSize(
        name="InternVL3-8B",
        shape=RANDOM_MODELS["internvl3-8b"],
        config_source="gitcode.com/Ascend/MindSpeed-MM 2.3.0 examples/internvl3/model_8B.json; tower: defaults of "
        "InternVLVisionConfig, bias from memory (under 0.01% of the parameters)",
        decoder=dataclasses.replace(_QWEN2_7B, vocab=151674),
        parameters=7_945_000_000,
        exact=False,
        parameters_source="15.89 GB of bf16 files (4.88 + 4.99 + 4.93 + 1.09) on the Hub's page",
        made_of="four tiles of 448 and the whole image, 32 x 32 patches each, merged 2 x 2",
    ),
    FullSize(
        name="Gemma3-4B",
        shape=RANDOM_MODELS["gemma3-4b"],
        config_source="transformers' convert_gemma3_weights.py (0d7e95d): variant gemma3_4b; vocabulary 262,144 + 64 "
        "for the image token, the default of Gemma3TextConfig",
        decoder=DecoderSizes(
            layers=34,
            hidden=2560,
            intermediate=10240,
            heads=8,
            kv_heads=4,
            head_dim=256,
            vocab=262208,
            bidirectional=True,
        ),
        parameters=4_300_079_472,
        exact=True,
        parameters_source="params of the preset kaggle://keras/medgemma/keras/medgemma_4b, the same architecture, and "
        "of google/gemma-3-4b-it as quoted in public repositories",
        made_of="64 x 64 patches of 14, averaged 4 x 4",
    ),
)
