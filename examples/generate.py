"""Complete a few prompts with a Mixture-of-Experts model that is larger than its memory budget.

python examples/generate.py Qwen/Qwen1.5-MoE-A2.7B 6GiB
"""

import sys

from expertflow import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "A recipe for pancakes:",
]


def main() -> None:
    model, memory = sys.argv[1:]
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64, seed=1)
    # batch=2: both prompts at once, so that an expert that both need is read once.
    with LLM(model, memory=memory, batch=2, context=512) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt}{output.outputs[0].text}\n")

        print("And one, as it is written:", end=" ")
        for piece in llm.stream("Once upon a time", params):
            print(piece, end="", flush=True)

        stats = llm.stats
        print(f"\n\n{stats.hit_ratio:.0%} of the experts were in memory when needed.")


if __name__ == "__main__":
    main()
