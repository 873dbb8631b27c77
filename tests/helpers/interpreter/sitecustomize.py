"""With this folder in PYTHONPATH, vLLM's CPU build runs its second model runner, whose kernels are Triton's.

Triton has no CPU backend in its wheels, and vLLM asks for one by name. With TRITON_INTERPRET=1 the interpreter runs the
kernels, and a name is all that is missing; in each process, so also in the workers that vLLM starts.
"""

from types import SimpleNamespace

import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
