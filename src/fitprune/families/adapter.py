"""Find the parts of a model, under the same names for every family.

What is particular about a family is in its row of the table; here are the parts that many families have, under the
names that they have for them. All other packages work on what `adapt` returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from fitprune._support.host import first_attribute, layer_windows
from fitprune.costs.sizes import DecoderSizes, ModelFingerprint
from fitprune.families.config import family_of, fingerprint_of, say_generic, token_ids
from fitprune.families.table import GENERIC, Family, Part


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
    """A model's parts, under the same names for every family.

    Attributes:
        model: the whole model, without what wraps it.
        family: what is particular about it.
        decoder: the language model that owns `layers`.
        layers: the decoder layers, a ModuleList.
        attentions: for each layer its attention; None where it has none.
        mlps: for each layer its MLP.
        norm: the decoder's final norm.
        windows: for each layer, how many tokens its attention looks back, its own counted; None for all.
        fingerprint: type and sizes.
        token_ids: modality ("image", "video") -> id that marks its visual tokens in `input_ids`.
    """

    model: Any
    family: Family
    decoder: Any
    layers: Any
    attentions: tuple[Any, ...]
    mlps: tuple[Any, ...]
    norm: Any
    windows: tuple[int | None, ...]
    fingerprint: ModelFingerprint
    token_ids: dict[str, int]

    @property
    def needs_left_padding(self) -> str:
        """Why padding after a token makes a row differ from its sample alone; empty where it does not."""
        if self.fingerprint.decoder.linear_layers:
            return "its layers without attention run over padding as over tokens"
        if any(self.windows):
            return "its windows count padding as tokens"
        if self.fingerprint.decoder.bidirectional:
            return "its image tokens attend to what comes after them"
        if "mrope_section" in (getattr(self.decoder.config, "rope_parameters", None) or {}):
            return "its multimodal positions go on from the last column"
        return ""


def unwrapped(model: Any) -> Any:
    """Take a model out of what wraps it: PEFT, a pipeline, DataParallel, DistributedDataParallel; others stay."""
    for _ in range(8):  # no deeper: some objects make a new `model` at every access
        if callable(getattr(model, "get_base_model", None)):  # PEFT
            inner = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        elif not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):  # a pipeline
            inner = model.model
        else:
            break
        model = inner
    return model


def adapt(model: Any) -> AdaptedModel:
    """Find the parts of a model.

    Args:
        model: the model, perhaps wrapped (see `unwrapped`).

    Raises:
        ValueError: the family is refused, or the model has no decoder layers of the common shape.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"model is a {type(model).__name__}: must be a transformers model with a config; a wrapper mostly has the "
            "model as .model, .module or .get_base_model()"
        )
    fingerprint, family = fingerprint_of(config), family_of(config)
    base = getattr(model, "base_model", None)
    decoder = _part(family, "decoder", base, "language_model", "text_model")
    decoder = getattr(decoder, "model", decoder)  # some wrap the text model's own ...ForCausalLM
    layers = getattr(decoder, "layers", None)
    if base is model or not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(
            f"model is a {type(model).__name__} without decoder layers at model.language_model.layers; "
            "pass the ...ForConditionalGeneration model"
        )
    if len(layers) != fingerprint.decoder.layers:
        raise ValueError(f"model has {len(layers)} decoder layers but its config says {fingerprint.decoder.layers}")
    attentions = tuple(getattr(layer, "self_attn", None) for layer in layers)
    mlps = tuple(_part(family, "mlp", layer, "mlp", "feed_forward", "block_sparse_moe") for layer in layers)
    norm = _part(family, "norm", decoder, "norm", "embedding_norm", "final_layernorm")
    without = [n for n, attention in enumerate(attentions) if attention is None]
    encoder = getattr(base, "get_image_features", None)
    if without != list(fingerprint.decoder.linear_layers) or None in mlps or norm is None or encoder is None:
        lacking = {
            f"self_attn in layers {without}": without != list(fingerprint.decoder.linear_layers),
            "an mlp in every layer": None in mlps,
            "a final norm": norm is None,
            "get_image_features": encoder is None,
        }
        named = ", ".join(what for what, lacks in lacking.items() if lacks)
        raise ValueError(
            f"model_type={config.model_type!r}: {type(model).__name__} lacks {named}, and so the shape that fitprune "
            "prunes; if it has them under other names, register a family that says them (docs/extending.md); 'fitprune "
            "families' lists what is supported"
        )
    if family is GENERIC:
        say_generic(config.model_type)
    try:
        fingerprint = dataclasses.replace(
            fingerprint, decoder=_priced(config.text_config, fingerprint.decoder, attentions, mlps)
        )
    except ValueError:
        if getattr(config, "quantization_config", None) is None:  # packed weights do not show their sizes
            raise
    windows = layer_windows(decoder.config, len(layers))
    ids = token_ids(config, family)
    return AdaptedModel(model, family, decoder, layers, attentions, mlps, norm, windows, fingerprint, ids)


def _part(family: Family, part: Part, whole: Any, *usual: str) -> Any:
    """Find a part of a module under the name in the family's row, or else under a usual one; None if not there.

    Args:
        family: the row.
        part: which part.
        whole: the module that has it.
        *usual: names to look under where the row has none.

    Raises:
        ValueError: the row says a name, and there is no such module.
    """
    if (name := family.parts.get(part)) is None:
        return first_attribute(whole, *usual)
    if not isinstance(module := getattr(whole, name, None), nn.Module):
        there = [name for name, _ in whole.named_children()] if isinstance(whole, nn.Module) else []
        raise ValueError(
            f"family {family.model_type!r}: parts[{part!r}]={name!r}: {type(whole).__name__} has no such module; must "
            f"be one of {there}: mend the family's row"
        )
    return module


def _priced(text: Any, sizes: DecoderSizes, attentions: Sequence[Any], mlps: Sequence[Any]) -> DecoderSizes:
    """Compare the cost model with the weights: an MLP of another kind is counted, another attention refused.

    Args:
        text: config of the text model.
        sizes: as the config says them.
        attentions: each layer's attention, None where it has none.
        mlps: each layer's MLP.

    Raises:
        ValueError: an attention has other weights than queries, keys, values, output and perhaps a gate of the queries.
    """
    chosen = first_attribute(text, "num_experts_per_tok", "moe_topk", "top_k_experts")
    plain, gate = sizes.input_macs + sizes.hidden * sizes.q_width, sizes.hidden * sizes.q_width
    gated = False
    for layer, attention in enumerate(attentions):
        if attention is None or (extra := _macs(attention, chosen) - plain) == 0:
            continue
        gated = extra == gate and not sizes.query_gate
        if not gated:
            raise ValueError(
                f"the attention of layer {layer} ({type(attention).__name__}) has {plain + extra} weights where its "
                f"sizes make {plain}: its cost is not modelled, so budgets would be wrong; not supported"
            )
    counted = tuple(_macs(mlp, chosen) for mlp in mlps)
    usual = all(macs == sizes.mlp_macs(layer) for layer, macs in enumerate(counted))
    return dataclasses.replace(sizes, query_gate=sizes.query_gate or gated, mlps=() if usual else counted)


def _macs(module: Any, chosen: int | None) -> int:
    """Count a module's multiply-accumulates for one token.

    Args:
        module: a layer's attention or MLP, or a part of it.
        chosen: how many experts the token goes through; None where that is not known.

    Raises:
        ValueError: it has experts, and how many are chosen is not known.
    """
    if hasattr(module, "in_features"):  # a Linear, quantized or not
        return int(module.in_features * module.out_features)
    parts = sum(_macs(child, chosen) for child in module.children())
    experts = isinstance(module, nn.ModuleList) or any(w.ndim == 3 for w in module.parameters(recurse=False))
    if experts and chosen is None:
        raise ValueError(
            f"{type(module).__name__} has experts, and the config has no num_experts_per_tok, which says how many a "
            "token goes through: its cost is not modelled, so budgets would be wrong; not supported"
        )
    if isinstance(module, nn.ModuleList):
        return parts * int(chosen or 1) // len(module)
    for name, weight in module.named_parameters(recurse=False):
        if name.endswith("bias"):
            continue
        if weight.ndim == 3:  # experts in one tensor
            parts += weight.numel() // weight.shape[0] * int(chosen or 1)
        elif weight.ndim == 2:
            parts += weight.numel()
    return parts
