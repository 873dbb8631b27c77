"""Train the embedded model: a small but genuine LLaVA that answers questions about digit scenes.

    python training/train.py --out DIR            # about 80 minutes on two cores

First the vision tower learns to name each patch (digit, colour, left neighbour, cell), then it is frozen and the
projector and the decoder learn to answer; at last the whole model learns small digits beside large ones. Seeded; the
tower is kept in DIR, and the decoder's state every few hundred steps, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import scenes
from fitprune import evaluate, load_samples
from fitprune._support import assets

PATCH = 8
SLOT = 15  # tokens of one packed question with its answer
TEMPLATE = "USER: <image>\n{question} ASSISTANT: {answer}</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def visual_tokens(args: argparse.Namespace) -> int:
    """Visual tokens of an image, which are its patches."""
    return int(args.image_size // PATCH) ** 2


def make_processor(size: int = scenes.SIZE) -> LlavaProcessor:
    """Build the processor: a byte-level BPE learnt from the questions, and CLIP's image steps at `size` pixels."""
    rng = np.random.default_rng(0)
    bank = scenes.GlyphBank({d: s[:1] for d, s in scenes.split_scans()["train"].items()}, variants=1, rng=rng)
    texts = []
    for _ in range(600):
        scene = scenes.compose(bank, rng)
        for kind in scenes.KINDS:
            question, answer = scenes.ask(scene, kind, rng)
            texts.append(TEMPLATE.format(question=question, answer=answer).replace("<image>", "").replace("</s>", ""))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.2, 0.2, 0.2],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: LlavaProcessor, args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """Build the model, weights drawn from the seed."""
    torch.manual_seed(args.seed)
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=args.image_size,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=2048,
            initializer_range=0.06,  # near 1 / sqrt(width): at the usual 0.02 a narrow decoder hardly sees its image
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=visual_tokens(args),
    )
    return LlavaForConditionalGeneration(config)


class Batches:
    """Endless batches of fresh scenes from the training scans; `step` seeds each, so that a run can be continued."""

    def __init__(self, processor: LlavaProcessor, args: argparse.Namespace) -> None:
        self.args = args
        self.bank = scenes.GlyphBank(
            scenes.split_scans()["train"], variants=args.variants, rng=np.random.default_rng(args.seed)
        )
        self.small_bank = scenes.GlyphBank(
            scenes.split_scans()["train"], variants=args.variants, rng=np.random.default_rng(args.seed), small=True
        )
        self.processor = processor
        self.image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        self._slots: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def scenes(
        self, step: int, count: int, *, fewest: int = 3, most: int = 6
    ) -> tuple[list[scenes.Scene], np.random.Generator]:
        rng = np.random.default_rng([self.args.seed, step])
        return [scenes.compose(self.bank, rng, fewest=fewest, most=most) for _ in range(count)], rng

    def mixed(self, step: int, count: int) -> tuple[list[scenes.Scene], np.random.Generator]:
        """Scenes of large digits and of small ones, in turn."""
        rng = np.random.default_rng([self.args.seed, step])
        small = [scenes.compose_details(self.small_bank, rng) for _ in range(count // 2)]
        large = [scenes.compose(self.bank, rng) for _ in range(count - count // 2)]
        return small + large, rng

    def pixels(self, batch: list[scenes.Scene]) -> torch.Tensor:
        """The image processor's arithmetic, but for rounding after scaling: [batch, 3, size, size]."""
        pixels = torch.from_numpy(np.stack([s.pixels for s in batch])).permute(0, 3, 1, 2).float() / 255
        if (size := self.args.image_size) != scenes.SIZE:
            # antialias gives the bicubic kernel that Pillow has.
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - 0.2) / 0.25

    def slot(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids and labels, [SLOT] each, of what follows the image: labels are -100 outside the answer."""
        if (question, answer) not in self._slots:
            text = TEMPLATE.format(question=question, answer=answer)
            ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids
            ids = ids[ids.index(self.image_id) + 1 :]
            prompt = TEMPLATE.format(question=question, answer="")[: -len(" </s>")]
            start = len(self.processor.tokenizer(prompt, add_special_tokens=False).input_ids)
            start -= len(self.prefix()) + 1
            labels = [-100] * start + ids[start:]
            pad = SLOT - len(ids)
            assert pad >= 0, (question, answer, len(ids))
            self._slots[question, answer] = (ids + [0] * pad, labels + [-100] * pad)
        return self._slots[question, answer]

    def prefix(self) -> list[int]:
        """Token ids before the image."""
        ids = self.processor.tokenizer("USER: <image>", add_special_tokens=False).input_ids
        return ids[: ids.index(self.image_id)]

    def questions(
        self, batch: list[scenes.Scene], rng: np.random.Generator, turn: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed questions: ids and labels [batch, questions, SLOT]."""
        ids, labels = [], []
        for scene in batch:
            names, shares, ask = (
                (scenes.KINDS, scenes.TRAINING_SHARES, scenes.ask)
                if scene.number is None
                else (scenes.DETAIL_KINDS, scenes.DETAIL_SHARES[turn], scenes.ask_detail)
            )
            kinds = rng.choice(len(names), size=self.args.questions, p=shares)
            slots = [self.slot(*ask(scene, names[k], rng)) for k in kinds]
            ids.append([s[0] for s in slots])
            labels.append([s[1] for s in slots])
        return torch.tensor(ids), torch.tensor(labels)


PATCH_CLASSES = {"digit": 10, "colour": 8, "left": 11, "cell": 10}


class PatchHeads(nn.Module):
    """Linear heads for the tower's training; thrown away afterwards."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in PATCH_CLASSES.items()})
        self.presence = nn.Linear(width, 10)

    def loss(self, hidden: torch.Tensor, batch: list[scenes.Scene]) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and accuracy of naming each patch, from the tower's output [batch, 1 + visual tokens, width]."""
        target = stacked_labels(batch, self.size)
        present = torch.zeros(len(batch), 10)
        for row, scene in enumerate(batch):
            present[row, scene.digits[scene.digits >= 0]] = 1
        loss = F.binary_cross_entropy_with_logits(self.presence(hidden[:, 0]).float(), present)
        accuracy = {}
        for name, head in self.heads.items():
            logits = head(hidden[:, 1:]).float()
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target[name].flatten(), ignore_index=-1)
            known = target[name] >= 0
            accuracy[name] = (logits.argmax(-1) == target[name])[known].float().mean().item()
        return loss, accuracy


def train_tower(model: LlavaForConditionalGeneration, batches: Batches, args: argparse.Namespace) -> None:
    """Pretrain the vision tower on labels of digit, colour, left neighbour and cell for each patch."""
    tower = model.model.vision_tower
    heads = PatchHeads(tower.config.hidden_size, args.image_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.tower_lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    forward = torch.compile(tower) if args.compile else tower
    started = time.time()
    for step in range(args.tower_steps):
        for group in optimizer.param_groups:
            group["lr"] = args.tower_lr * schedule(step, args.tower_steps, 100)
        batch, _ = batches.scenes(10_000_000 + step, args.tower_batch)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = forward(batches.pixels(batch), output_hidden_states=True).hidden_states[-1].float()
            loss, accuracy = heads.loss(hidden, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == args.tower_steps - 1:
            shown = " ".join(f"{k} {v:.3f}" for k, v in accuracy.items())
            print(f"tower {step} loss {loss.item():.3f} {shown} {time.time() - started:.0f}s", flush=True)


def align_projector(model: LlavaForConditionalGeneration, batches: Batches, args: argparse.Namespace) -> None:
    """Teach the projector to write each patch in the decoder's own words before the decoder learns to read.

    A patch becomes the sum of the embeddings of its digit's and its colour's token, and of fixed vectors for its left
    neighbour and its cell: what LLaVA's first stage does with captions. Without it, binding takes ten times the steps.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(args.seed)

    def rows(texts: Sequence[str]) -> torch.Tensor:
        ids = [batches.processor.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        assert all(len(i) == 1 for i in ids)
        return words[[i[0] for i in ids]]

    vectors = {
        "digit": rows([f" {digit}" for digit in range(10)]),
        "colour": rows([f" {colour}" for colour in scenes.COLOUR_NAMES]),
        "left": torch.randn(PATCH_CLASSES["left"], words.shape[1], generator=generator) * words.std(),
        "cell": torch.randn(PATCH_CLASSES["cell"], words.shape[1], generator=generator) * words.std(),
    }
    with torch.no_grad():  # the tower's features are large: at its usual scale the projector starts 250 x too loud
        projector.linear_1.weight.mul_(0.3)
        projector.linear_2.weight.mul_(0.1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(args.align_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * schedule(step, args.align_steps, 50)
        batch, _ = batches.scenes(20_000_000 + step, args.tower_batch)
        target = torch.zeros(len(batch), visual_tokens(args), words.shape[1])
        for name, labels in stacked_labels(batch, args.image_size).items():
            target += vectors[name][labels.clamp(min=0)] * (labels >= 0)[..., None]
        with torch.no_grad():
            features = tower(batches.pixels(batch), output_hidden_states=True).hidden_states[-1][:, 1:]
        loss = F.mse_loss(projector(features), target) / target.var()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == args.align_steps - 1:
            print(f"align {step} unexplained {loss.item():.3f}", flush=True)


def stacked_labels(batch: list[scenes.Scene], size: int) -> dict[str, torch.Tensor]:
    """Patch labels of a batch, [batch, visual tokens] each; the class after the last cell says "no ink here"."""
    labels = [scenes.patch_labels(scene, PATCH, size) for scene in batch]
    stacked = {name: torch.from_numpy(np.stack([x[name] for x in labels])) for name in labels[0]}
    stacked["cell"] = torch.where(stacked["cell"] < 0, PATCH_CLASSES["cell"] - 1, stacked["cell"])
    return stacked


def schedule(step: int, steps: int, warmup: int, decay: float = 0.3) -> float:
    """Linear warm-up, constant, then down to nothing over the last share `decay` of the steps.

    Not a cosine: a run can be continued with another number of steps as long as the descent has not begun.
    """
    return min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))


_PREFIX = 0  # tokens that all packed questions share; set by train_decoder


def packed_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention of packed questions: each sees the shared prefix and itself, never its neighbours."""
    n = _PREFIX
    shared = F.scaled_dot_product_attention(
        query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True, scale=scaling, enable_gqa=True
    )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    b, h, t, d = query[:, :, n:].shape
    own_q, own_k, own_v = (x[:, :, n:].reshape(b, h, t // SLOT, SLOT, d) for x in (query, key, value))
    to_shared = (query[:, :, n:] @ key[:, :, :n].transpose(-1, -2)).view(b, h, t // SLOT, SLOT, n)
    later = torch.ones(SLOT, SLOT, dtype=torch.bool).triu(1)
    to_own = (own_q @ own_k.transpose(-1, -2)).masked_fill(later, -1e4)
    weights = (torch.cat([to_shared, to_own], -1).float() * scaling).softmax(-1).to(value.dtype)
    packed = (weights[..., :n].reshape(b, h, t, n) @ value[:, :, :n]).view(b, h, t // SLOT, SLOT, d)
    packed = packed + weights[..., n:] @ own_v
    return torch.cat([shared, packed.view(b, h, t, d)], 2).transpose(1, 2), None


def train_decoder(model: LlavaForConditionalGeneration, batches: Batches, args: argparse.Namespace) -> float:
    """Train projector and decoder on packed questions, loss on the answers only; returns the seconds it took.

    In the first steps each grid cell's patches are pooled into one visual token: a look-up is found among nine tokens
    long before it is found among 144, at a fifth of the cost, and stays when all tokens come. In the last steps
    (`detail_steps`) half the scenes have small digits, and the tower learns too, on the answers and on its patches.
    """
    global _PREFIX
    tower, projector, decoder = model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model
    prefix = torch.tensor(batches.prefix())
    before_image = len(prefix)
    every = torch.arange(before_image + visual_tokens(args))
    # Where the pooled tokens stand: at the middle patch of their block.
    side, block = args.image_size // PATCH, args.image_size // scenes.GRID // PATCH
    middle = torch.arange(scenes.GRID) * block + block // 2
    coarse = torch.cat([every[:before_image], before_image + (middle[:, None] * side + middle).flatten()])
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)
    before = decoder.config._attn_implementation
    model.set_attn_implementation({"text_config": "packed"})

    torch.manual_seed(args.seed)  # the heads are the same whether or not the run was continued
    heads = PatchHeads(tower.config.hidden_size, args.image_size)

    def begin(details: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        """Say what learns in this stage, and make its optimizer."""
        tower.requires_grad_(details)
        learning = [p for p in model.parameters() if p.requires_grad] + (list(heads.parameters()) if details else [])
        groups = [
            {"params": [p for p in learning if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return learning, torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)

    state_file = args.out / "decoder_state.pt"
    first, spent = 0, 0.0
    parameters, optimizer = begin(False)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first, spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        if first > args.steps:
            parameters, optimizer = begin(True)
            heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])

    def answers(features: torch.Tensor, ids: torch.Tensor, where: torch.Tensor, pooled: bool) -> torch.Tensor:
        embed = decoder.get_input_embeddings()
        b = len(ids)
        visual = projector(features)
        if pooled:
            visual = visual.unflatten(1, (scenes.GRID, block, scenes.GRID, block)).mean((2, 4)).flatten(1, 2)
        image_positions = coarse if pooled else every
        slots = len(every) + torch.arange(SLOT).repeat(args.questions)
        positions = torch.cat([image_positions, slots])[None]
        inputs = torch.cat([embed(prefix).expand(b, -1, -1), visual, embed(ids.flatten(1))], 1)
        hidden = decoder(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
        return model.lm_head(hidden.flatten(0, 1)[where])

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return tower(pixels, output_hidden_states=True).hidden_states[-1]

    if args.compile:
        answers, encode = torch.compile(answers, dynamic=False), torch.compile(encode)
    started = time.time()
    log: dict[str, float] = {}
    ends = [args.steps, *(args.steps + sum(args.detail_steps[: n + 1]) for n in range(len(args.detail_steps)))]
    for step in range(first, ends[-1]):
        details = step >= args.steps
        turn = max(0, sum(step >= end for end in ends) - 1)
        if step == args.steps:
            parameters, optimizer = begin(True)
        for group in optimizer.param_groups:
            if details:
                rate = schedule(step - ends[turn], args.detail_steps[turn], 50, decay=0.5)
                group["lr"] = args.detail_lr * rate
            else:
                group["lr"] = args.lr * schedule(step, args.steps, 100)
        # Binding is found among two digits ten times sooner than among six: scenes grow during the first steps.
        most = 2 + min(4, step // args.growth)
        batch, rng = (
            batches.mixed(step, args.batch)
            if details
            else batches.scenes(step, args.batch, fewest=min(3, most - 1), most=most)
        )
        ids, labels = batches.questions(batch, rng, turn)
        pooled = step < args.pooled_steps
        _PREFIX = len(coarse if pooled else every)
        # The hidden state one place before each answer token predicts it. Padded to a fixed count for the compiler.
        sequence = torch.full((len(ids), _PREFIX + args.questions * SLOT), -100)
        sequence[:, _PREFIX - 1 : -1] = labels.flatten(1)
        sequence = sequence.flatten()
        where = torch.nonzero(sequence != -100)[:, 0]
        room = args.batch * args.questions * 5 - len(where)
        assert room >= 0
        target = F.pad(sequence[where], (0, room), value=-100)
        where = F.pad(where, (0, room))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(details):
                hidden = encode(batches.pixels(batch))
            logits = answers(hidden[:, 1:], ids, where, pooled)
        loss = F.cross_entropy(logits.float(), target, ignore_index=-100)
        named, seen = heads.loss(hidden.float(), batch) if details else (torch.zeros(()), {})
        (loss + 0.25 * named).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log["loss"] = loss.item() if step == first else 0.95 * log["loss"] + 0.05 * loss.item()
        if step % 50 == 0:
            shown = " ".join(f"{k} {v:.3f}" for k, v in seen.items())
            print(f"decoder {step} loss {log['loss']:.4f} {shown} {time.time() - started:.0f}s", flush=True)
        if (step + 1) % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state["heads"] = heads.state_dict()
            state["seconds"] = spent + time.time() - started
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
    model.set_attn_implementation({"text_config": before})
    return spent + time.time() - started


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write model and processor for `from_pretrained`: weights stored in fp16, computed in fp32."""
    model = model.eval().requires_grad_(False)
    model.config.dtype = torch.float32
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.generation_config.update(do_sample=False, max_new_tokens=16, pad_token_id=0)
    model.save_pretrained(out, state_dict=half)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--tower-batch", type=int, default=48)
    parser.add_argument("--tower-lr", type=float, default=1e-3)
    parser.add_argument("--align-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument(
        "--detail-steps", type=int, nargs="*", default=[700, 450], help="rounds of steps with small digits, at the end"
    )
    parser.add_argument("--detail-lr", type=float, default=8e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--questions", type=int, default=10, help="questions packed behind each image")
    parser.add_argument("--pooled-steps", type=int, default=600)
    parser.add_argument("--growth", type=int, default=100, help="steps until scenes may hold one digit more, up to six")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--variants", type=int, default=12, help="drawn variants of each scan")
    parser.add_argument("--image-size", type=int, default=scenes.SIZE, help="side of the image, whole patches a cell")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if args.image_size < 24 or args.image_size % (scenes.GRID * PATCH):
        parser.error(f"--image-size {args.image_size}: must be a multiple of {scenes.GRID * PATCH}")
    args.out.mkdir(parents=True, exist_ok=True)

    processor = make_processor(args.image_size)
    model = make_model(processor, args)
    batches = Batches(processor, args)
    tower_file = args.out / "tower.pt"
    if tower_file.exists():
        model.model.vision_tower.load_state_dict(torch.load(tower_file, weights_only=True))
    else:
        train_tower(model, batches, args)
        torch.save(model.model.vision_tower.state_dict(), tower_file)
    if not (args.out / "decoder_state.pt").exists():
        align_projector(model, batches, args)
    seconds = train_decoder(model, batches, args)
    save(model, processor, args.out)

    trained = LlavaForConditionalGeneration.from_pretrained(args.out).eval()
    tasks = {name: load_samples(assets.folder("test", name)) for name in ("digit-scenes", "digit-details")}
    dense = evaluate(trained, processor, tasks, {}, batch_size=32, timed_batches=0).rows
    options = {k: v for k, v in vars(args).items() if k != "out"}
    facts = {
        "accuracy": {row.task: row.accuracy for row in dense},
        "accuracy_by_kind": {row.task: row.accuracy_by_kind for row in dense},
        "decoder_minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "options": options,
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
