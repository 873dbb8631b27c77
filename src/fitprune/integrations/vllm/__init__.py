"""Serve a recipe in vLLM: visual tokens leave inside the LLM's prefill, as they do under `prune`.

A vLLM plug-in (entry point `vllm.general_plugins`). Where a recipe is configured it hooks the decoder's layers in each
worker once the model is loaded; nothing of vLLM is replaced. vLLM runs the tokens of all requests of a step as one list
of rows, and looks up each layer's attention metadata by the layer's name. So a row that leaves is left out of the list,
and the layers after it get metadata of their own, made by vLLM's own builder, for fewer tokens: their keys fill the
first slots of the request's blocks. How many tokens a request lost is kept by its id: its first blocks may be others'
too, as nothing leaves before the first image.

`plugin` wraps what `hooks` lists; `configured` finds the recipe; `settings` sets the engine's arguments and `rules`
refuses what would be wrong; `scheduler` has each prompt that is pruned come whole from its first image on;
`cached_keys` reads what came before; `runners` reads vLLM's two model runners, `layers` its decoder; `pruner` lets
tokens leave. docs/serve.md says what is supported. This file imports nothing, so that the entry point costs nothing.
"""
