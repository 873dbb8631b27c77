"""Tiny random models from real config classes, their inputs, and the masked dense oracle."""

from __future__ import annotations

import contextlib
import inspect

import torch
from torch.utils.flop_counter import sdpa_flop_count
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask

IMAGE = 5  # image token id
# The argument that takes the KV cache, which transformers 5.24 renamed.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def cache_in(output):
    """The KV cache that a model returned."""
    return output[CACHE]


def count_cpu_attention(query, key, value, *_, out_shape=None, **__):
    """FLOPs of PyTorch's CPU attention kernel, which FlopCounterMode does not know by itself."""
    return sdpa_flop_count(query, key, value)


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_cpu_attention}


def tiny_model(family="llava", *, layers=5, kv_heads=2, attention="sdpa", seed=0):
    """A random model with 4 query heads, 16 (LLaVA) or a variable number (LLaVA-NeXT) of visual tokens."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        initializer_range=0.2,
    )  # fmt: skip
    common = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    if family == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**common, image_seq_length=16))
    else:
        config = LlavaNextConfig(**common, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
        model = LlavaNextForConditionalGeneration(config)
    model = model.eval()
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(attention)
    return model


def tiny_inputs(model, *, batch=1, before=3, after=6, pad=(), images=1, seed=1):
    """Inputs of `batch` samples; `pad[b]` pads sample b on the left with so many tokens, at the cost of its text."""
    generator = torch.Generator().manual_seed(seed)
    extra = {}
    if model.config.model_type == "llava":
        per_image = 16
        pixels = torch.randn(batch * images, 3, 32, 32, generator=generator)
    else:
        sizes = torch.tensor([[60, 30]] * (batch * images))  # best resolution 64 x 32: base crop and two more
        pixels = torch.randn(batch * images, 3, 3, 32, 32, generator=generator)
        extra["image_sizes"] = sizes
        with torch.no_grad():
            features = model.model.get_image_features(pixels, sizes).pooler_output
        per_image = features[0].shape[0]
    text = lambda n: torch.randint(10, 97, (batch, n), generator=generator)  # noqa: E731
    parts = [text(before)]
    for _ in range(images):
        parts += [torch.full((batch, per_image), IMAGE), text(after)]
    ids = torch.cat(parts, 1)
    mask = torch.ones_like(ids)
    for row, width in enumerate(pad):
        # Padding replaces leading text, so that all visual tokens stay in the same columns or not, as the pad says.
        ids[row] = torch.cat([torch.zeros(width, dtype=ids.dtype), ids[row, : ids.shape[1] - width]])
        mask[row, :width] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, **extra}


def prompts(model, layouts, *, seed=1):
    """Inputs of single samples; a layout is a list of text lengths, with one image between each two.

    LLaVA-NeXT images differ in size, and so in visual tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, layout in enumerate(layouts):
        count = len(layout) - 1
        if model.config.model_type == "llava":
            images = {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}
            lengths = [16] * count
        else:
            sizes = torch.tensor([[(60, 30), (30, 30), (31, 62), (60, 60)][(number + i) % 4] for i in range(count)])
            images = {"pixel_values": torch.randn(count, 5, 3, 32, 32, generator=generator), "image_sizes": sizes}
            if count:
                with torch.no_grad():
                    lengths = [len(f) for f in model.model.get_image_features(**images).pooler_output]
        ids = [torch.randint(10, 97, (1, layout[0]), generator=generator)]
        for image, text in enumerate(layout[1:]):
            ids += [torch.full((1, lengths[image]), IMAGE), torch.randint(10, 97, (1, text), generator=generator)]
        ids = torch.cat(ids, 1)
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **(images if count else {})})
    return samples


def batch_of(samples, side="left"):
    """Pad samples to one batch."""
    length = max(sample["input_ids"].shape[1] for sample in samples)

    def padded(name):
        rows = []
        for sample in samples:
            missing = length - sample[name].shape[1]
            rows.append(torch.nn.functional.pad(sample[name], (missing, 0) if side == "left" else (0, missing)))
        return torch.cat(rows)

    images = [name for name in ("pixel_values", "image_sizes") if any(name in sample for sample in samples)]
    return {
        "input_ids": padded("input_ids"),
        "attention_mask": padded("attention_mask"),
        **{name: torch.cat([sample[name] for sample in samples if name in sample]) for name in images},
    }


def replay(model, inputs, answer, *, oracle=None):
    """Logits of each token of `answer` [B, T], given the prompt and the tokens before it: [B, T, vocab].

    The prompt may be padded on either side.
    """
    return converse(model, [(inputs, answer)], oracle=oracle)


def converse(model, turns, *, oracle=None):
    """The same for the turns (prompt, answer) of a conversation on one cache: logits of all answers, in order."""
    mask = torch.ones(len(turns[0][1]), 0, dtype=torch.long)
    cache, found = None, []

    def call(tokens, valid, **images):
        nonlocal mask, cache
        mask = torch.cat([mask, valid], 1)
        where = _positions(mask)[:, -tokens.shape[1] :]
        watched = contextlib.nullcontext()
        if oracle:
            watched = oracle.prefill(tokens, mask) if images else oracle.step(mask)
        with torch.no_grad(), watched:
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=where,
                **{CACHE: cache},
                use_cache=True,
                **images,
            )
        cache = cache_in(output)
        return output.logits

    for inputs, answer in turns:
        ids, valid, images = inputs["input_ids"], inputs["attention_mask"], dict(inputs)
        del images["input_ids"], images["attention_mask"]
        last = torch.where(valid.bool(), torch.arange(ids.shape[1]), 0).amax(1)
        logits = call(ids, valid, **images)
        found.append(logits[torch.arange(len(last)), last])
        for token in answer.T[:, :, None]:
            found.append(call(token, torch.ones_like(token))[:, -1])
        found.pop()  # the answer's last token is in the cache; what would follow it is not asked
    return torch.stack(found, 1)


class Oracle:
    """The dense eager model with removed tokens masked per layer; nothing is removed. Shares no code with fitprune.

    From full attention maps it takes, at each layer and for each image (a run of visual tokens), the lowest product of
    received self and cross attention, and hides those keys from every later layer.
    """

    def __init__(self, model, keep):
        self.model, self.keep = model, keep
        self.gone = [torch.zeros(1, 0, dtype=torch.bool)] * len(keep)  # per layer [B, N]: hidden from that layer
        self.lowest = torch.finfo(torch.float32).min

    @contextlib.contextmanager
    def prefill(self, input_ids, attention_mask):
        """Run a turn with images: `input_ids` [B, Q] of this turn, `attention_mask` [B, P + Q] with those before it."""
        token = self.model.config.image_token_index
        batch, length = input_ids.shape
        past = attention_mask.shape[1] - length
        runs = []  # (row, first, end) of each image
        for row in range(batch):
            ids = [-1, *input_ids[row].tolist(), -1]
            starts = [i for i in range(length) if ids[i + 1] == token != ids[i]]
            ends = [i + 1 for i in range(length) if ids[i + 1] == token != ids[i + 2]]
            runs += [(row, first, end) for first, end in zip(starts, ends, strict=True)]
        text_after = attention_mask[:, past:].bool().clone()
        for row, _, end in runs:
            text_after[row, :end] = False
        now = torch.zeros(batch, length, dtype=torch.bool)  # hidden of this turn from the layer at hand

        def before(number):
            def hook(_, args, kwargs):
                earlier = self.gone[number].expand(batch, -1)
                earlier = torch.nn.functional.pad(earlier, (0, past - earlier.shape[1]))
                self.gone[number] = torch.cat([earlier, now], 1)
                hidden = torch.triu(torch.ones(length, past + length, dtype=torch.bool), past + 1)[None]
                hidden = hidden | (~attention_mask.bool() | self.gone[number])[:, None]
                kwargs["attention_mask"] = torch.where(hidden, self.lowest, 0.0)[:, None]
                return args, kwargs

            return hook

        def after(number):
            def hook(_, args, kwargs, output):
                weights = output[1].amax(1)[..., past:]
                for row, first, end in runs:
                    alive = first + (~now[row, first:end]).nonzero()[:, 0]
                    left = int(self.keep[number] * (end - first) + 0.5)
                    own = weights[row, alive][:, alive].mean(0)
                    cross = weights[row, text_after[row]][:, alive].mean(0)
                    now[row, alive[(own * cross).argsort()[: len(alive) - left]]] = True

            return hook

        with self._hooked(before, after):
            yield

    @contextlib.contextmanager
    def step(self, attention_mask):
        """Go on with text; `attention_mask` [B, all tokens]."""

        def before(number):
            def hook(_, args, kwargs):
                length, keys = args[0].shape[1], attention_mask.shape[1]
                hidden = torch.triu(torch.ones(length, keys, dtype=torch.bool), keys - length + 1)[None]
                padding = ~attention_mask.bool()
                padding[:, : self.gone[number].shape[1]] |= self.gone[number]
                hidden = hidden | padding[:, None]
                kwargs["attention_mask"] = torch.where(hidden, self.lowest, 0.0)[:, None]
                return args, kwargs

            return hook

        with self._hooked(before, None):
            yield

    @contextlib.contextmanager
    def _hooked(self, before, after):
        handles = []
        for number, layer in enumerate(self.model.model.language_model.layers):
            handles.append(layer.register_forward_pre_hook(before(number), with_kwargs=True))
            if after:
                handles.append(layer.self_attn.register_forward_hook(after(number), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def greedy_logits(model, inputs, steps, *, oracle=None):
    """Prefill and `steps` greedy steps: logits of the last prompt token and of every step, [B, steps + 1, vocab]."""
    mask = inputs["attention_mask"]
    found = []
    with torch.no_grad():
        with oracle.prefill(inputs["input_ids"], mask) if oracle else contextlib.nullcontext():
            output = model(**inputs, position_ids=_positions(mask), use_cache=True)
        for _ in range(steps):
            found.append(output.logits[:, -1])
            token = found[-1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            with oracle.step(mask) if oracle else contextlib.nullcontext():
                output = model(
                    input_ids=token,
                    attention_mask=mask,
                    position_ids=_positions(mask)[:, -1:],
                    **{CACHE: cache_in(output)},
                    use_cache=True,
                )
        found.append(output.logits[:, -1])
    return torch.stack(found, 1), cache_in(output)


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)
