"""Sizes of a decoder and a vision tower, and the fingerprint by which a recipe knows its model. Knows no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from fitprune._support import checked
from fitprune._support.messages import short

# Above these a file is damaged or hostile.
MOST_TOKENS = 1_000_000  # of one image or prompt: more than a context holds
MOST_LAYERS = 1024  # eight times the deepest decoder
MOST_SIZE = 10_000_000  # of a width, a vocabulary, a picture
MOST_MACS = 10**18

LINEAR_CHUNK = 64  # tokens that a linear-attention layer takes at a time


@dataclasses.dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder, and where visual tokens may leave it.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: as in transformers.
        intermediate: width of the gated MLP; in a mixture of experts, that of all experts a token goes through.
        vocab: only prices the output head and does not distinguish models.
        router: experts that a router chooses from, 0 without one.
        query_gate: whether a gate as wide as the queries is projected beside them.
        bidirectional: whether tokens of an image attend to later ones, so that scoring looks at all keys.
        first_prunable: the first layer that tokens may leave.
        linear_layers: layers without softmax attention (linear attention, convolution): they have no keys to cache, and
            nothing to rank tokens by, so none leave there.
        linear_macs: multiply-accumulates of such a layer's mixer, for each token.
        linear_chunk_macs: the same, for each chunk of LINEAR_CHUNK tokens, the last one partly filled.
        mlps: for each layer the multiply-accumulates of its MLP for one token, where it is not the gated one that
            `intermediate` and `router` describe in every layer; else empty.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = dataclasses.field(default=0, compare=False)
    router: int = 0
    query_gate: bool = False
    bidirectional: bool = False
    first_prunable: int = 0
    linear_layers: tuple[int, ...] = ()
    linear_macs: int = 0
    linear_chunk_macs: int = 0
    mlps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        optional = ("vocab", "router", "first_prunable", "linear_macs", "linear_chunk_macs")
        _require_sizes(self, may_be_zero=optional, others=("query_gate", "bidirectional", "linear_layers", "mlps"))
        for name in ("query_gate", "bidirectional"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={short(getattr(self, name))}: must be true or false")
        object.__setattr__(self, "linear_layers", tuple(self.linear_layers))
        linear = self.linear_layers
        if len(linear) > self.layers or any(type(n) is not int or not 0 <= n < self.layers for n in linear):
            raise ValueError(f"linear_layers={short(linear)}: must be layers from 0 to {self.layers - 1}")
        object.__setattr__(self, "mlps", tuple(self.mlps))
        counts = all(type(n) is int and 1 <= n <= MOST_MACS for n in self.mlps)
        if (self.mlps and len(self.mlps) != self.layers) or not counts:
            raise ValueError(f"mlps={short(self.mlps)}: must be empty or a count for each of the {self.layers} layers")
        if not self.prunable:
            raise ValueError(f"first_prunable={self.first_prunable}: no layer with attention is left to prune")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with softmax attention, which cache keys."""
        linear = set(self.linear_layers)
        return tuple(layer for layer in range(self.layers) if layer not in linear)

    @property
    def prunable(self) -> tuple[int, ...]:
        """The layers that visual tokens may leave, inside or before them."""
        return tuple(layer for layer in self.attention_layers if layer >= self.first_prunable)

    def mixer_macs(self, layer: int, tokens: int, *, projected: int | None = None) -> int:
        """Count the multiply-accumulates of a layer's attention, or of what it has instead, over `tokens`.

        `projected` of them go through the output projection; by default all.
        """
        projected = tokens if projected is None else projected
        if layer in self.linear_layers:
            return tokens * self.linear_macs + -(-tokens // LINEAR_CHUNK) * self.linear_chunk_macs
        output = projected * self.hidden * self.q_width
        return tokens * self.input_macs + 2 * tokens * tokens * self.q_width + output

    @property
    def input_macs(self) -> int:
        """Multiply-accumulates of a layer's queries, keys and values for one token."""
        return self.hidden * (self.q_width * (2 if self.query_gate else 1) + 2 * self.kv_width)

    def mlp_macs(self, layer: int) -> int:
        """Count the multiply-accumulates of a layer's MLP for one token."""
        return self.mlps[layer] if self.mlps else self.hidden * (3 * self.intermediate + self.router)

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class VisionSizes:
    """Sizes of a ViT tower with a two-layer projector, for one image (or one crop) of fixed size.

    Attributes:
        layers, hidden, intermediate, image_size, patch_size: of the ViT, as in transformers.
        class_tokens: tokens in the tower beside the patches.
        beside_macs: multiply-accumulates for one image of what runs beside the ViT: LLaVA-HR's ConvNeXt and adapters.
    """

    layers: int
    hidden: int
    intermediate: int
    image_size: int
    patch_size: int
    class_tokens: int = 1
    beside_macs: int = 0

    def __post_init__(self) -> None:
        _require_sizes(self, may_be_zero=("class_tokens", "beside_macs"))
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size}: must be at least patch_size={self.patch_size}")

    @property
    def patches(self) -> int:
        """Patches of one crop."""
        return (self.image_size // self.patch_size) ** 2

    def flops(self, decoder_hidden: int) -> int:
        """FLOPs of tower and projector for one crop."""
        d, m, n = self.hidden, self.intermediate, self.patches + self.class_tokens
        embed = 2 * self.patches * d * 3 * self.patch_size**2
        tower = self.layers * (8 * n * d * d + 4 * n * n * d + 4 * n * d * m)
        projector = 2 * self.patches * (d * decoder_hidden + decoder_hidden**2)
        return embed + tower + projector + 2 * self.beside_macs


def _require_sizes(
    sizes: DecoderSizes | VisionSizes, may_be_zero: Collection[str] = (), others: Collection[str] = ()
) -> None:
    """Refuse sizes that no model has, so that a damaged file fails where it is read; `others` are no sizes."""
    for name in (field.name for field in dataclasses.fields(sizes) if field.name not in others):
        most = MOST_LAYERS if name == "layers" else MOST_MACS if name.endswith("_macs") else MOST_SIZE
        checked.whole(name, getattr(sizes, name), 0 if name in may_be_zero else 1, most)


@dataclasses.dataclass(frozen=True)
class ModelFingerprint:
    """What recipes and statistics must agree with before they are used on a model.

    Attributes:
        model_type: the config's.
        decoder: sizes of the text decoder.
        vision: sizes of the vision tower, where the cost model knows its kind.
        image_token_id: id that marks a visual token; None where it is not known (the published recipes).
        config_hash: hash of what the config says of the architecture; None where it is not known.
    """

    model_type: str
    decoder: DecoderSizes
    vision: VisionSizes | None = dataclasses.field(default=None, compare=False)
    image_token_id: int | None = dataclasses.field(default=None, compare=False)
    config_hash: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("model_type", "config_hash"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "model_type"):
                raise ValueError(f"{name}={short(value)}: must be a string")
        if self.image_token_id is not None:
            checked.whole("image_token_id", self.image_token_id, -MOST_SIZE, MOST_SIZE)

    def to_dict(self) -> dict[str, Any]:
        """Give plain data for JSON; what is at its default or unknown is left out."""
        data = dataclasses.asdict(self)
        for part, sizes in (("decoder", DecoderSizes), ("vision", VisionSizes)):
            defaults = {field.name: field.default for field in dataclasses.fields(sizes) if field.name != "vocab"}
            if data[part] is not None:
                data[part] = {k: v for k, v in data[part].items() if k not in defaults or v != defaults[k]}
        return {key: value for key, value in data.items() if value is not None or key == "vision"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelFingerprint:
        """Read `to_dict`'s data.

        Args:
            data: a dictionary as JSON holds it.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            if not isinstance(data["model_type"], str):
                raise ValueError(f"model_type={short(data['model_type'])}: must be a string")
            vision = data.get("vision")
            rest = {key: value for key, value in data.items() if key not in ("decoder", "vision")}
            return cls(
                decoder=DecoderSizes(**data["decoder"]),
                vision=None if vision is None else VisionSizes(**vision),
                **rest,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"model={short(data)}: not a model's sizes ({error}); fit or measure again") from None

    def require_same(self, other: ModelFingerprint, *, what: str) -> None:
        """Refuse `what`, which was made for `self`, on the model `other`.

        Args:
            other: the model at hand.
            what: the subject of the error, such as "recipe".

        Raises:
            ValueError: the models differ; the message names each difference.
        """
        mine, theirs = (
            {
                "model_type": model.model_type,
                **{k: v for k, v in dataclasses.asdict(model.decoder).items() if k != "vocab"},
                "image_token_id": model.image_token_id,
                "config_hash": model.config_hash,
            }
            for model in (self, other)
        )
        unknown = [k for k in ("image_token_id", "config_hash") if mine[k] is None or theirs[k] is None]
        differing = [
            f"{k} {mine[k]} there, {theirs[k]} here" for k in mine if k not in unknown and mine[k] != theirs[k]
        ]
        if differing:
            raise ValueError(f"{what} is of another model: {', '.join(differing)}; make one from this model")
