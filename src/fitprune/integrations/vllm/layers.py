"""vLLM's decoder layers, and what a step of its engine is to them.

Legend: T rows of a step, T' those that are present, R requests, m rows of a request that are present, Q of its prompt.
A stage is a run of layers that the same rows enter; stage 0 is the dense one.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

from fitprune.scoring.softmax import Softmax
from fitprune.scoring.view import Prompt

NORMS = (("input_layernorm", "post_attention_layernorm"), ("attention_norm", "ffn_norm"))  # what layers call their two


@dataclasses.dataclass
class Layer:
    """One decoder layer of vLLM's.

    Attributes:
        module: the layer.
        norm: the norm after its attention; its two results, hidden states and residual, go into and around the MLP.
        attention: its vLLM attention.
        takes: names of the module's arguments.
    """

    module: Any
    norm: Any
    attention: Any
    takes: tuple[str, ...]

    @classmethod
    def of(cls, number: int, module: Any) -> Layer:
        """Read a layer.

        Args:
            number: its place in the decoder, for messages.
            module: the layer.

        Raises:
            ValueError: it has another form than rows can leave in.
        """
        from vllm.model_executor.layers.attention import Attention as VllmAttention

        where = f"layer {number}, a {type(module).__name__}"
        takes = tuple(inspect.signature(module.forward).parameters)
        if takes[:3] != ("positions", "hidden_states", "residual"):
            raise ValueError(f"{where}: takes {takes}; must take positions, hidden_states, residual")
        norms = tuple(name for name, _ in module.named_children() if "norm" in name)
        if norms not in NORMS:
            raise ValueError(f"{where}: has norms {norms}; must have one before its attention and one before its MLP")
        inside = [child for child in module.modules() if isinstance(child, VllmAttention)]
        if len(inside) != 1:
            raise ValueError(f"{where}: has {len(inside)} attentions; must have one")
        impl = inside[0].impl
        if getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)):
            raise ValueError(f"{where}: looks back {impl.sliding_window} tokens; must see all")
        if getattr(impl, "alibi_slopes", None) is not None or inside[0].kv_sharing_target_layer_name is not None:
            raise ValueError(f"{where}: has ALiBi or another layer's keys; must have rotary positions and its own")
        return cls(module, getattr(module, norms[1]), inside[0], takes)

    def softmax(self) -> Softmax:
        """Give how its attention turns queries and keys into weights."""
        impl = self.attention.impl
        softcap = getattr(impl, "logits_soft_cap", None) or None  # backends say "none" by 0
        return Softmax(float(impl.scale), softcap=softcap, sinks=getattr(impl, "sinks", None))


@dataclasses.dataclass
class Request:
    """A request whose prompt with images is prefilled in this step.

    Attributes:
        row: its number in the step's batch.
        prompt: as scorers see it.
        question: [1, Q] bool.
        kept: [m] int64, the prompt's columns that are present.
        computed: how many tokens of its beginning are in vLLM's cache instead of in the step.
        first: place of its first image.
        lost: tokens that it has lost before each stage.
    """

    row: int
    prompt: Prompt
    question: torch.Tensor
    kept: torch.Tensor
    computed: int
    first: int
    lost: list[int]


@dataclasses.dataclass
class Step:
    """One forward of the model.

    Attributes:
        common: attention metadata of stage 0, as vLLM's builder takes it.
        context: vLLM's forward context.
        lengths: of each request, the rows that are present.
        pruned: requests that lose tokens in this step.
        lost: of each request, tokens lost before each stage.
        rows: [T'] int64, the dense rows that are present; None for all.
        total: how many dense rows there are.
        hidden: [T', d], input of the present layer, where tokens may leave.
        states: query, key and value of the present layer, [T', heads * D] each, where tokens may leave.
        places: of all stages, keys of each request and slots of the step's; where no row leaves.
    """

    common: Any
    context: Any
    lengths: list[int]
    pruned: list[Request]
    lost: list[list[int]]
    total: int
    rows: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    states: tuple[torch.Tensor, ...] | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None
