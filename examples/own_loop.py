"""The RRHF loss in your own training loop, with any model that gives logits.

python examples/own_loop.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import demo, rrhf_loss

PROMPT = "How do I dry wet boots?"
RESPONSES = [" Slowly, away from heat.", " Use a towel first.", " Boil them."]
REWARDS = torch.tensor([[1.0, 0.8, 0.0]])

tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR).eval()  # without dropout
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# One padded batch: the prompt is repeated here; rrhf_fast's own engine encodes it once.
prompt = tokenizer(PROMPT).input_ids
rows = [prompt + tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in RESPONSES]
width = max(map(len, rows))
input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
is_response = torch.tensor(
    [[len(prompt) <= i < len(row) for i in range(1, width)] for row in rows]
)  # [3, width - 1], of the tokens that are predicted

for step in range(5):
    logits = model(input_ids).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    out = rrhf_loss(logps[None], REWARDS, mask=is_response[None])  # one query of 3 responses
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scores = ", ".join(f"{p:.2f}" for p in out.logp_scores.tolist())
    print(f"step {step}: loss {out.loss.item():.3f}, mean log-probs {scores}")
