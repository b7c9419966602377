"""Recreate the embedded demo: `python -m experiments.make_demo --seed 0 --output_dir DIR`.

Writes DIR/model (weights, tokenizer), DIR/train.jsonl and DIR/eval.jsonl. Equal seeds give equal
files on the same machine with the same libraries. Takes about three minutes on one core.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import demo_corpus as corpus
from rrhf_fast.demo import reward
from rrhf_fast.model.diverse_beam import diverse_beam_search
from rrhf_fast.stages.files import write_rows

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_NEW_TOKENS = 96


def make(
    output_dir: Path,
    seed: int = 0,
    documents: int = 40_000,
    batch_size: int = 64,
    train_prompts: int = 448,
    eval_prompts: int = 96,
    hidden_size: int = 64,
    layers: int = 4,
) -> None:
    """Corpus -> tokenizer -> pre-trained model -> responses -> scored rows, in output_dir.

    documents, batch_size: pre-training is one pass of documents // batch_size steps.
    train_prompts, eval_prompts: numbers of rows, six responses each.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    train_tasks, eval_tasks = corpus.split_tasks(rng, eval_share=0.2)
    texts = []
    for _ in range(documents):
        task = rng.choice(train_tasks)
        texts.append((corpus.prompt(rng, task), corpus.response(rng, task, corpus.MIXED)))

    tokenizer = train_tokenizer(texts)
    model = pretrain(tokenizer, texts, batch_size, hidden_size, layers)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")

    for name, tasks, count in (
        ("train", train_tasks, train_prompts),
        ("eval", eval_tasks, eval_prompts),
    ):
        rows = make_rows(model, tokenizer, rng, tasks, count)
        write_rows(output_dir / f"{name}.jsonl", rows)


def train_tokenizer(
    texts: list[tuple[str, str]], vocab_size: int = 576, context: int = 256
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text round-trips. Prepends BOS; the trainer appends EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((prompt + response for prompt, response in texts), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def pretrain(
    tokenizer, texts: list[tuple[str, str]], batch_size: int, hidden_size: int, layers: int
) -> LlamaForCausalLM:
    """Train for one pass over the texts, tokenised as by the engine: BOS, prompt, response, EOS."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 4,
        num_hidden_layers=layers,
        head_dim=16,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    prompts = tokenizer([p for p, _ in texts])["input_ids"]
    responses = tokenizer([r for _, r in texts], add_special_tokens=False)["input_ids"]
    rows = [p + r + [tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)]

    steps = len(rows) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    for step in range(steps):
        batch = rows[step * batch_size : (step + 1) * batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in batch],
            batch_first=True,
            padding_value=tokenizer.pad_token_id,
        )
        # Padding is on the right, where causal attention hides it from real tokens.
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"pretrain step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    return model.eval()


def make_rows(
    model, tokenizer, rng: random.Random, tasks: list[corpus.Task], count: int
) -> list[dict]:
    """Make `count` rows with distinct prompts: four responses of the model, two of the grammar."""
    task_of = {}
    while len(task_of) < count:
        task = rng.choice(tasks)
        task_of.setdefault(corpus.prompt(rng, task), task)
    rows = []
    prompts = list(task_of)
    for start in range(0, count, 32):
        chunk = prompts[start : start + 32]
        for prompt, sampled in zip(chunk, sample(model, tokenizer, chunk), strict=True):
            good = corpus.response(rng, task_of[prompt], corpus.GOOD)
            bad = corpus.response(rng, task_of[prompt], corpus.BAD)
            by_source = [*sampled, ("provided_good", good), ("provided_bad", bad)]
            responses = [text for _, text in by_source]
            rows.append(
                {
                    "prompt": prompt,
                    "responses": responses,
                    "scores": reward.score([prompt] * len(responses), responses),
                    "sources": [source for source, _ in by_source],
                }
            )
    return rows


def sample(model, tokenizer, prompts: list[str]) -> list[list[tuple[str, str]]]:
    """(source, response) per prompt: beam search, diverse beam search and two of top-p."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    limits = dict(
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def beams(groups: int, penalty: float) -> list[list[str]]:
        tokens, _ = diverse_beam_search(
            model,
            **inputs,
            num_beams=4,
            num_beam_groups=groups,
            diversity_penalty=penalty,
            **limits,
        )
        texts = tokenizer.batch_decode(tokens.flatten(0, 1), skip_special_tokens=True)
        return [texts[i : i + 4] for i in range(0, len(texts), 4)]

    plain, diverse = beams(1, 0.0), beams(4, 1.0)
    tokens = model.generate(
        **inputs, do_sample=True, top_p=0.95, top_k=0, num_return_sequences=2, **limits
    )
    top_p = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    out = []
    for i in range(len(prompts)):
        beam = plain[i][0]
        other = next((text for text in diverse[i] if text != beam), beam)
        pair = [("top_p", text) for text in top_p[2 * i : 2 * i + 2]]
        out.append([("beam", beam), ("diverse_beam", other), *pair])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    # One thread, so that the files do not depend on the number of cores.
    torch.set_num_threads(1)
    make(args.output_dir, seed=args.seed)


if __name__ == "__main__":
    main()
