"""Answer prompts by a vLLM engine of its own process: what test_vllm.py starts, since an engine takes its process whole.

    python vllm_engine.py MODEL JOB ANSWERS

JOB is JSON: {"options": of vllm.LLM, "prompts": [[text, [image file, ...]], ...], "tokens": ...}; ANSWERS gets
{"ids": [[token id, ...], ...], "preemptions": ..., "plan": layers that were hooked}.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main() -> None:
    model, job, out = sys.argv[1:]
    job = json.loads(Path(job).read_text())
    llm = LLM(model, disable_log_stats=False, **job["options"])
    prompts = []
    for text, files in job["prompts"]:
        images = [Image.open(file).convert("RGB") for file in files]
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}} if images else {"prompt": text})
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=job.get("ignore_eos", False))
    done = llm.generate(prompts, sampling, use_tqdm=False)
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    found = {
        "ids": [list(one.outputs[0].token_ids) for one in done],
        "preemptions": metrics["vllm:num_preemptions"],
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
