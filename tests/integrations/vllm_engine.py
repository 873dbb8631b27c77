"""Answer prompts by a vLLM engine: what test_vllm.py starts, since an engine takes its process whole.

    python vllm_engine.py MODEL JOB ANSWERS

JOB is JSON: {"options": of vllm.LLM, "prompts": [[text, [image file, ...]], ...], "tokens": ...}; ANSWERS gets
{"ids": [[token id, ...], ...], "logprobs": [[of each such token], ...], "preemptions": how often}.
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
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=job.get("ignore_eos", False)
    )
    done = llm.generate(prompts, sampling, use_tqdm=False)
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    answers = [one.outputs[0] for one in done]
    found = {
        "ids": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [each[token].logprob for token, each in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
        "preemptions": metrics["vllm:num_preemptions"],
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
