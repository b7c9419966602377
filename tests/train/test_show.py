"""--show_tokens: rows as the model sees them."""

import json

from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.train.__main__ import main
from tests import jsonl


def test_rows_are_shown_and_nothing_is_trained(tmp_path, capsys):
    rows = [
        {"prompt": f"{i}\x1b[2J\nB", "responses": ["a b", "c"], "scores": [1, 0]} for i in "xyz"
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        model_name_or_path=str(demo.MODEL_DIR),
        train_data=str(data),
        output_dir=str(tmp_path / "out"),
        show_tokens=2,
    )
    assert train(config).output_dir is None and not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert f"{data}:1: prompt, " in out and f"{data}:2: prompt, " in out and ":3:" not in out
    assert "    <s>x\\x1b[2J⏎\n    B\n" in out  # must not reach the terminal
    assert "responses[0], score 1, 3 tokens, learned\n    [a][ b][</s>]\n" in out
    assert "responses[1], score 0, 2 tokens, learned\n    [c][</s>]\n" in out


def test_tabs_and_persian_stay_readable(tmp_path, capsys):
    text = "if:\n\tمی\u200cخواهم"
    row = {"prompt": text, "responses": ["a", "b"], "scores": [1, 0]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    arguments = {"model_name_or_path": str(demo.MODEL_DIR), "show_tokens": "1"}
    arguments |= {"train_data": str(tmp_path / "rows.jsonl"), "max_length": "512"}
    assert main([word for name, value in arguments.items() for word in (f"--{name}", value)]) == 0
    assert "\n    \tمی\u200cخواهم\n" in capsys.readouterr().out


def warned(rows, folder, model, capsys, *words):
    """The warnings of --show_tokens and of training on these rows, which are the same."""
    jsonl.write(folder / "rows.jsonl", rows)
    options = {"model_name_or_path": model, "train_data": folder / "rows.jsonl", "max_length": 512}
    options = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main([*options, *words, "--show_tokens", "9"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert main([*options, *words, "--max_steps", "1", "--output_dir", str(folder / "out")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    texts = [line.partition("warning: ")[2] for line in said]
    assert sorted(line.partition("warning: ")[2] for line in shown) == sorted(texts)
    return texts


def test_rows_that_can_be_used_though_hardly_as_they_are_meant(tmp_path, capsys):
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [2, 1, 0]}
    rows = [row, row | {"finish_reasons": ["stop", "length", None]}]
    rows += [row | {"finish_reasons": ["length", "length", "stop"]}]
    rows += [row | {"finish_reasons": odd} for odd in (7, ["length"] * 5, [{}])]
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows += [pair | {"score_chosen": c, "score_rejected": r} for c, r in ((1, 5), (5, 1), (2, 2))]
    cut, pairs = warned([*rows, pair], tmp_path, demo.MODEL_DIR, capsys)
    assert cut.startswith("6 responses were cut off by a limit of length, and the model learns to")
    assert pairs.startswith("1 pairs have scores that prefer the rejected response, and")


def test_texts_that_a_template_has_rendered(chat_model, tmp_path, capsys):
    row = {"prompt": "user: q</s>assistant: ", "responses": ["a", "b"], "scores": [1, 0]}
    assert warned([row], tmp_path, chat_model, capsys) == []
    (tmp_path / "again").mkdir()
    (text,) = warned([row], tmp_path / "again", chat_model, capsys, "--apply_chat_template")
    assert text.startswith("1 of 1 prompts hold what the chat template renders, and it renders th")
    asked = {"role": "user", "content": "What is </s> between <think> and </think>?"}
    (tmp_path / "asked").mkdir()
    assert warned([row | {"prompt": [asked]}], tmp_path / "asked", chat_model, capsys) == []


def test_texts_that_bypass_a_chat_template(chat_model, tmp_path, capsys):
    rows = [{"prompt": prompt, "responses": ["a", "b"], "scores": [1, 0]} for prompt in "pq"]
    rows[1]["prompt"] = [{"role": "user", "content": "q"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", str(chat_model), "--train_data", str(tmp_path / "rows.jsonl")]
    assert main([*words, "--show_tokens", "2"]) == 0
    warning = "\n\ntrain_data: warning: 1 of 2 are text, which bypasses the model's chat template"
    assert warning in capsys.readouterr().out
    assert main([*words, "--show_tokens", "2", "--apply_chat_template", "true"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_the_demo_is_shown(capsys):
    assert main(["--show_tokens", "1"]) == 0
    assert "responses[0], score " in capsys.readouterr().out
