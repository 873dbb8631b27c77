"""A family of your own: fitprune refuses a model whose MLPs have another name, and prunes it after `register_family`.

Random weights and pixels, so it needs no download; yours would come with `load_model`.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fitprune import Family, fit, measure, prune, register_family


class TinyConfig(LlavaConfig):
    model_type = "tiny_vlm"


class TinyLayer(LlamaDecoderLayer):
    """A decoder layer that calls its MLP "ff_block"."""

    def __init__(self, config, number):
        super().__init__(config, number)
        self.ff_block = self._modules.pop("mlp")

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.ff_block(self.post_attention_layernorm(hidden_states))


torch.manual_seed(0)
text = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=100)
tower = CLIPVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=2, image_size=32, patch_size=8)
model = LlavaForConditionalGeneration(TinyConfig(text_config=text, vision_config=tower, image_token_id=99))
model.model.language_model.layers = torch.nn.ModuleList(TinyLayer(text, number) for number in range(4))
# An image of 16 visual tokens, then a question of three.
inputs = {"input_ids": torch.tensor([[1, 2, *[99] * 16, 3, 4, 5]]), "pixel_values": torch.randn(1, 3, 32, 32)}

try:
    measure(model.eval(), [inputs])
except ValueError as error:
    print("before:", error)

register_family(Family("tiny_vlm", "Tiny VLM", parts={"mlp": "ff_block"}))
recipe = fit(measure(model, [inputs]), flops_reduction=0.4)
with prune(model, recipe) as pruner, torch.no_grad():
    model(**inputs)
print("after: visual tokens kept by each layer:", [layer[0][0] for layer in pruner.last.kept])
