"""Fresh samples of an evaluation, as a table that people read."""

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.files import to_json

_ENDS = 2  # as many of the best, and of the worst


def best_and_worst(samples: list[dict]) -> list[dict]:
    """The samples with the highest rewards, then those with the lowest, each once. Of a prompt of
    messages only the last one is shown."""
    ranked = sorted(samples, key=lambda sample: -sample["reward"])
    chosen = ranked if len(ranked) <= 2 * _ENDS else [*ranked[:_ENDS], *ranked[-_ENDS:]]
    return [
        {"reward": s["reward"], "prompt": _text(s["prompt"]), "response": s["response"]}
        for s in chosen
    ]


def samples_table(samples: list[dict], step: int) -> str:
    """Lines for the console: reward, the end of the prompt, the beginning of the response."""
    lines = [f"samples after step {step:,}: the best and the worst rewards"]
    for sample in samples:
        prompt, response = (one_line(sample[name], None) for name in ("prompt", "response"))
        prompt = prompt if len(prompt) <= 40 else f"...{prompt[-37:]}"
        response = response if len(response) <= 60 else f"{response[:57]}..."
        lines.append(f"  {sample['reward']:8.3f}  {prompt} -> {response}")
    return "\n".join(lines)


def _text(prompt: str | list[dict]) -> str:
    content = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    return content if isinstance(content, str) else to_json(content or prompt[-1])
