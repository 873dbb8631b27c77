"""Answer prompts by an engine of two ranks: what test_vllm_ranks.py starts, since an engine takes its process whole.

    python vllm_ranks.py MODEL JOB ANSWERS

JOB is JSON: {"options": of vllm.LLM, "prompts": [[text, [image file, ...]], ...], "tokens": ..., "runs": {name: ...}}.
With tensor parallelism a run is {"scorer": as in a recipe, "alone": whether ranks look at their own heads}; with data
parallelism it is the number of the rank that answers. ANSWERS gets {run: [[token id, ...], ...]}.
"""

import asyncio
import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from fitprune import register_scorer
from fitprune.integrations.vllm.ranks import TensorRanks
from fitprune.scoring.scorers import get_scorer

SCORER = "of-this-run"
run = {}


def of_this_run(view):
    return get_scorer(run["scorer"])(view)


register_scorer(SCORER, of_this_run, replace=True)  # the first process runs this file, and workers import it


class Worker:
    """What vLLM adds to its workers (worker_extension_cls)."""

    def score_by(self, scorer, alone):
        run["scorer"] = scorer
        if alone:
            TensorRanks.whole = lambda self, own: own


def tensor_parallel(model, job, prompts, sampling):
    llm = LLM(model, worker_extension_cls="vllm_ranks.Worker", **job["options"])
    answers = {}
    for name, each in job["runs"].items():
        llm.collective_rpc("score_by", args=(each["scorer"], each["alone"]))
        answers[name] = [list(done.outputs[0].token_ids) for done in llm.generate(prompts, sampling, use_tqdm=False)]
    return answers


async def data_parallel(model, job, prompts, sampling):
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model, **job["options"]))

    async def answer(name, rank, number):
        stream = llm.generate(prompts[number], sampling, f"{name} {number}", data_parallel_rank=rank)
        return [list(part.outputs[0].token_ids) async for part in stream][-1]

    async def answers(name, rank):
        return await asyncio.gather(*(answer(name, rank, number) for number in range(len(prompts))))

    try:
        found = await asyncio.gather(*(answers(name, rank) for name, rank in job["runs"].items()))
        return dict(zip(job["runs"], found, strict=True))
    finally:
        llm.shutdown()


def main():
    model, job, out = sys.argv[1:]
    job = json.loads(Path(job).read_text())
    prompts = []
    for text, files in job["prompts"]:
        images = [Image.open(file).convert("RGB") for file in files]
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}} if images else {"prompt": text})
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    if job["options"].get("data_parallel_size", 1) > 1:
        answers = asyncio.run(data_parallel(model, job, prompts, sampling))
    else:
        answers = tensor_parallel(model, job, prompts, sampling)
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
