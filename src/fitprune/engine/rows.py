"""The rows of one forward: which tokens are present at a layer, and what the layer gets for them.

Rows of a batch may keep different numbers of tokens. They are packed to the right: a shorter row has padding on its
left, and the prompt's own padding leaves with the first tokens that leave. A layer's own mask of rows and keys is cut
to those present, whatever it hides or shows (windows, later tokens of an image); where the attention implementation has
no such mask, one is made by transformers' own function.

Shapes: B batch, P columns of the past, Q columns of this forward, m rows present at a layer (Q until tokens leave), d
hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fitprune.engine.cache import PrunedLayer, pack
from fitprune.families.adapter import AdaptedModel
from fitprune.scoring.received import Attention
from fitprune.scoring.view import LayerView, Prompt

# What a scorer may look at -> stays [B, m] bool, or None where nothing leaves.
Choose = Callable[[LayerView], "torch.Tensor | None"]


@dataclasses.dataclass
class Forward:
    """The state of one forward that prunes, or that continues a pruned cache.

    Attributes:
        past: P, columns of the sequence before this forward.
        length: Q.
        valid: [B, P + Q] False at padding; None where there is none.
        choose: what stays at a layer; None where this forward prunes nothing, and has none of the following.
        prompt: the whole prefill, for scorers.
        hidden: [B, m, d] input of the present layer, for scorers.
        previous: the view inside the layer before, for scorers; None once rows have left after it.
        ahead: where queries, keys and values go while they are computed before their layer runs; else None.
        kept: [B, m] columns, within this forward, of the rows present; -1 at padding.
        image: [B, m] image number of each row present, -1 for text and padding.
        question: [B, m] rows whose attention is cross.
        packed: whether rows have left, so that the rows present are no longer all Q.
        entered: for each layer so far, `kept` before it.
        after: for each layer so far, `kept` after it.
        index: [B, m'] rows that stay, between a layer's attention and its end; shorter samples are filled on the left.
        kept_next: [B, m'] `kept` of those.
        keys_valid: [B, keys] False at keys of the present layer that are padding; None where there is none.
        rope_offset: [B, P + Q] of multimodal rotary positions after this forward; None where it stays. See `rotary`.
        stages: what was made for a layer, by the columns that its cache holds and what it is given for each position;
            until more rows leave.
    """

    past: int
    length: int
    valid: torch.Tensor | None
    choose: Choose | None = None
    prompt: Prompt | None = None
    hidden: torch.Tensor | None = None
    previous: LayerView | None = None
    ahead: list[Attention] | None = None
    kept: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    image: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    question: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    packed: bool = False
    entered: list[torch.Tensor] = dataclasses.field(default_factory=list)
    after: list[torch.Tensor] = dataclasses.field(default_factory=list)
    index: torch.Tensor | None = None
    kept_next: torch.Tensor | None = None
    keys_valid: torch.Tensor | None = None
    rope_offset: torch.Tensor | None = None
    stages: dict[tuple[int, ...], tuple[Any, _Stage]] = dataclasses.field(default_factory=dict)

    def is_plain_step(self, cache: Any, mask: Any) -> bool:
        """Whether one token is decoded that sees every key held, so that each layer runs as in the dense model."""
        plain = self.choose is None and self.length == 1 and self.valid is None and mask is None and cache is not None
        return plain and all(layer.shows_all for layer in cache.layers if isinstance(layer, PrunedLayer))

    def enter(
        self,
        adapted: AdaptedModel,
        number: int,
        layer: PrunedLayer | None,
        hidden: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Cut a layer's positions and mask to the rows present and the keys that its cache holds.

        Args:
            adapted: the model.
            number: the layer's.
            layer: its cache, if there is one.
            hidden: [B, m, d], its input.
            kwargs: its keyword arguments in the dense model.

        Returns:
            The arguments to call it with.

        Raises:
            ValueError: no masks can be made for the attention implementation.
        """
        if self.choose is not None:
            self.entered.append(self.kept)
        columns = None if layer is None else layer.columns
        if not self.packed and columns is None:
            self.keys_valid = self.valid
            return kwargs
        cut = (kwargs.get("attention_mask"), kwargs.get("position_embeddings"))
        given = (columns, *cut, adapted.attentions[number] is None)
        key = tuple(id(part) for part in given)
        if key not in self.stages:
            # What the ids are of is kept with what was made of it, so that no other tensor gets such an id.
            self.stages[key] = (given, self._stage(adapted, number, layer or PrunedLayer(), hidden, kwargs))
        stage = self.stages[key][1]
        self.keys_valid = stage.keys_valid
        if layer is not None:
            layer.expect(*stage.held)
        return {**kwargs, **stage.replaced}

    def _stage(
        self, adapted: AdaptedModel, number: int, layer: PrunedLayer, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> _Stage:
        """Make what a layer needs whose rows or keys are not those of the dense model."""
        (batch, rows, _), device, mask = hidden.shape, hidden.device, kwargs.get("attention_mask")
        kept = self.kept.to(device) if self.packed else None
        replaced = (
            {} if kept is None else rows_at(kwargs, kept.clamp(min=0), adapted.decoder.config._attn_implementation)
        )
        if adapted.attentions[number] is None:  # it runs over the rows as they come, and padding must give it nothing
            assert kept is not None
            valid = kept >= 0
            replaced["attention_mask"] = None if bool(valid.all()) else valid
            return _Stage(replaced, None, (kept, 0, False))
        own = mask if isinstance(mask, torch.Tensor) and mask.ndim == 4 else None
        if own is None:
            _require_plain_mask(adapted, number, mask, self.past + self.length)
        if kept is not None:
            new = torch.where(kept < 0, -1, kept + self.past)
        elif rows == 1 and adapted.windows[number] is None:
            return self._step(layer, hidden, adapted.decoder.config)
        else:
            new = torch.arange(self.past, self.past + self.length, device=device).expand(batch, -1)
        columns = torch.cat([layer.all_columns(self.past, batch, device), new], 1)
        present = columns >= 0
        if self.packed or layer.columns is None:
            held = (columns, self.past + self.length, not bool(present.all()))
        else:
            held = (layer.columns, layer.covered, layer.padded)
        if own is not None:
            if own.shape[-1] != self.past + self.length:
                raise ValueError(
                    f"layer {number}'s attention mask covers {own.shape[-1]} keys: must cover the sequence's "
                    f"{self.past + self.length}; use a DynamicCache"
                )
            replaced["attention_mask"] = cut_mask(own, kept, columns)
            return _Stage(replaced, None, held)
        if self.valid is not None:
            present = present & self.valid.to(device).expand(batch, -1).gather(1, columns.clamp(min=0))
        everything = bool(present.all())
        if everything and present.shape[1] == rows and adapted.decoder.config._attn_implementation == "sdpa":
            replaced["attention_mask"] = None  # as transformers' function says, after many small operations
        else:
            replaced["attention_mask"] = _causal_mask(present, hidden, adapted.decoder.config)
        return _Stage(replaced, None if everything else present, held)

    def _step(self, layer: PrunedLayer, hidden: torch.Tensor, config: Any) -> _Stage:
        """Make what a layer needs to decode one token: the same as `_stage`, with as few operations as it can."""
        assert layer.columns is not None
        held = (layer.columns, layer.covered, layer.padded)
        if self.valid is None and not layer.padded:  # nothing is hidden
            return _Stage({"attention_mask": None}, None, held)
        recorded = layer.columns >= 0
        if self.valid is None:
            tail = recorded.new_ones(len(recorded), self.past + self.length - layer.covered)
        else:
            valid = self.valid.to(recorded.device)
            recorded = recorded & valid.gather(1, layer.columns.clamp(min=0))
            tail = valid[:, layer.covered :]
        present = torch.cat([recorded, tail], 1)
        if config._attn_implementation == "sdpa":
            return _Stage({"attention_mask": present[:, None, None]}, present, held)
        return _Stage({"attention_mask": _causal_mask(present, hidden, config)}, present, held)

    def view(self, layer: int, before: bool, device: torch.device, attention: Callable[[], Attention]) -> LayerView:
        """Show the present layer to a scorer, before the layer or inside it."""
        assert self.hidden is not None
        assert self.prompt is not None
        return LayerView(
            layer=layer,
            before=before,
            image=self.image.to(device),
            question=self.question.to(device),
            column=self.kept.to(device),
            hidden=self.hidden.to(device),
            prompt=self.prompt,
            attention=attention,
            previous=self.previous if before else None,
        )

    def leave(self, stays: torch.Tensor) -> None:
        """Let all rows but these, [B, m] bool, leave at the end of the present layer."""
        present = (self.kept >= 0).to(stays.device)
        if not bool((present & ~stays).any()):
            return
        self.index, self.kept_next = pack(self.kept, stays & present)

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """Take the rows that stay, if some leave: [B, m, d] -> [B, m', d].

        Raises:
            ValueError: the MLP does not see the layer's rows, as in the common shape.
        """
        if self.index is not None and hidden.shape[:2] != self.kept.shape:
            raise ValueError(
                f"a layer's MLP is given {list(hidden.shape)} where {list(self.kept.shape)} rows are present: the "
                "decoder is not of the common shape, and cannot be pruned"
            )
        return hidden if self.index is None else _take(hidden, self.index)

    def scatter(self, output: Any) -> Any:
        """Put gathered rows back: [B, m', d] -> [B, m, d]. Where a token leaves stands another's: it is dropped."""
        if self.index is None:
            return output
        if isinstance(output, tuple):  # experts may tell their routing too
            return (self.scatter(output[0]), *output[1:])
        if output.ndim != 3:
            raise ValueError(
                f"a layer's MLP gives {list(output.shape)} for rows {list(self.index.shape)}: the decoder is not of "
                "the common shape, and cannot be pruned"
            )
        index = self.index.to(output.device)
        place = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return _take(output, index.new_zeros(self.kept.shape).scatter_(1, index, place))

    def drop(self, hidden: torch.Tensor) -> torch.Tensor:
        """End a layer: drop the rows that leave, if any: [B, m, d] -> [B, m', d]."""
        if self.index is None or self.kept_next is None:
            return hidden
        hidden = _take(hidden, self.index)
        self.kept = self.kept_next
        index = self.index.to(self.image.device)
        self.image = self.image.gather(1, index).masked_fill(self.kept.to(index.device) < 0, -1)
        self.question = self.question.gather(1, index)
        self.index = self.kept_next = None
        self.packed = True
        self.stages.clear()
        self.previous = None
        return hidden

    def to_columns(self, hidden: torch.Tensor) -> torch.Tensor:
        """Put the rows back into their columns: [B, m, d] -> [B, Q, d], zero where a token left.

        Padding behind a token repeats it, so that in a right-padded prompt `logits[:, -1]`, which generate reads, and
        the logit before a draft are those of its last token.
        """
        batch, rows, width = hidden.shape
        behind = None if self.valid is None else _behind_tokens(self.valid[:, self.past :].to(hidden.device))
        if not self.packed and behind is None:
            return hidden
        row = torch.arange(1, rows + 1, device=hidden.device).expand(batch, -1)
        source = row
        if self.packed:
            kept = self.kept.to(hidden.device)
            # Row 0 is a zero row, for columns without a token; column Q takes the padding, and is cut off.
            source = row.new_zeros(batch, self.length + 1)
            source = source.scatter(1, torch.where(kept < 0, self.length, kept), row)[:, : self.length]
        if behind is not None:
            source = source.gather(1, behind)
        return _take(torch.cat([hidden.new_zeros(batch, 1, width), hidden], 1), source)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What layers share that see the same rows and hold the same columns of the past.

    Attributes:
        replaced: keyword arguments of the layer.
        keys_valid: as in `Forward`.
        held: what the layer's cache will hold; see `PrunedLayer.expect`.
    """

    replaced: dict[str, Any]
    keys_valid: torch.Tensor | None
    held: tuple[torch.Tensor, int, bool]


def _causal_mask(present: torch.Tensor, hidden: torch.Tensor, config: Any) -> Any:
    """Make a causal mask as the attention implementation takes it; of the keys [B, keys] the last are the rows' own."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    implementation = config._attn_implementation
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={implementation!r} has no entry in transformers' mask registry: a mask for the "
            "kept tokens cannot be made; register one, or load the model with 'sdpa' or 'eager'"
        )
    batch, keys = present.shape
    rows = hidden.shape[1]
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch,
        q_length=rows,
        kv_length=keys,
        q_offset=keys - rows,
        kv_offset=0,
        attention_mask=present,
        allow_is_causal_skip=True,
        dtype=hidden.dtype,
        config=config,
        device=hidden.device,
    )


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows: [B, m, d] by [B, m'] -> [B, m', d]."""
    flat = _flat(index.to(rows.device), rows.shape[1])  # whole rows are copied, which gather does value by value
    return rows.flatten(0, 1).index_select(0, flat).view(*index.shape, rows.shape[-1])


def _flat(index: torch.Tensor, count: int) -> torch.Tensor:
    """Number rows [B, m'] of `count` a sample through all samples: [B * m']."""
    return (index + count * torch.arange(len(index), device=index.device)[:, None]).flatten()


def rows_at(kwargs: dict[str, Any], kept: torch.Tensor, implementation: str) -> dict[str, Any]:
    """Cut position embeddings and position ids of a whole forward to the rows [B, m].

    Ids next to embeddings tell FlashAttention where packed sequences begin, and it would take gaps for that: it gets
    none.
    """
    embeddings, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    made: dict[str, Any] = {}
    if embeddings is not None:
        several = isinstance(embeddings, tuple)
        cut = tuple(_rows_of(e, kept) for e in (embeddings if several else (embeddings,)))
        made["position_embeddings"] = cut if several else cut[0]
    if ids is not None:
        gaps = embeddings is not None and "flash" in implementation
        made["position_ids"] = None if gaps else _rows_of(ids[..., None], kept)[..., 0]
    return made


def _rows_of(whole: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Take rows [B, m] of [..., B or 1, Q, d]; leading axes are those of multimodal rotary positions."""
    kept = kept.to(whole.device)
    if whole.shape[-3] == 1:  # alike in all samples; whole rows are copied, which gather does value by value
        return whole[..., 0, :, :][..., kept, :]
    *axes, _, length, width = whole.shape
    index = kept[..., None].expand(*axes, *kept.shape, width)
    return whole.expand(*axes, len(kept), length, width).gather(-2, index)


def cut_mask(mask: torch.Tensor, kept: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """Cut a layer's mask of rows and keys to those present.

    Args:
        mask: [B or 1, h, Q, K] of the unpruned sequence: bool, True where a row sees a key, or a number to add.
        kept: [B, m] rows, -1 at padding; None for all.
        columns: [B, keys] columns of the keys, -1 at padding, which no row sees.
    """
    mask = mask.expand(len(columns), -1, -1, -1)
    if kept is not None:
        rows = kept.clamp(min=0)[:, None, :, None]
        mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
    index = columns.clamp(min=0)[:, None, None]
    mask = mask.gather(3, index.expand(-1, mask.shape[1], mask.shape[2], -1))
    padding = (columns < 0)[:, None, None]
    return mask & ~padding if mask.dtype == torch.bool else mask.masked_fill(padding, torch.finfo(mask.dtype).min)


def _require_plain_mask(adapted: AdaptedModel, number: int, mask: Any, length: int) -> None:
    """Refuse a layer that hides more than later keys, where its attention implementation shows no mask to cut."""
    window = adapted.windows[number]
    windowed = window is not None and length > window
    if windowed or (
        adapted.fingerprint.decoder.bidirectional and mask is not None and not isinstance(mask, torch.Tensor)
    ):
        what = f"looks back {window} of {length} tokens" if windowed else "attends to later tokens of an image"
        raise ValueError(
            f"layer {number} {what}, and attn_implementation={adapted.decoder.config._attn_implementation!r} has no "
            "mask of rows and keys that could be cut to the tokens left: load the model with 'sdpa' or 'eager'"
        )


def _behind_tokens(valid: torch.Tensor) -> torch.Tensor | None:
    """For each column the last one up to it that has a token, itself without: [B, Q]; None if each is its own."""
    column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    last = torch.where(valid, column, -1).cummax(1).values
    last = torch.where(last < 0, column, last)
    return None if torch.equal(last, column) else last
