"""Hostile and unlucky model folders: each is a copy of a good one with one thing changed."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.mlp.up_proj.weight"
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
DOUBLING = (
    "{% set n = namespace(x='0123456789' * 100) %}"
    "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
# JSON of any file that no reader expects.
BAD_JSON = {
    "empty": b"",
    "text": b"not json",
    "list": b"[]",
    "null": b"null",
    "number": b"1",
    "string": b'"x"',
    "nested": b"[" * 100_000,
    "nested entry": b'{"a":' * 100_000,
    "binary": b"\xff\xfe\x00\x01",
    "huge number": b'{"vocab_size": 1' + b"0" * 10_000 + b"}",
}
# Values of entries of config.json; each is tried alone.
CONFIG = {
    "vocab_size": [0, -1, 10**18, "x", None, 1.5, [576], True, float("nan"), 10],
    "hidden_size": [0, -64, 10**9, 10**18, "x", 63],
    "num_hidden_layers": [0, -1, 5, 10**6, 10**12, "x", 3],
    "num_attention_heads": [0, -4, 3, 10**9, 1000, "x"],
    "num_key_value_heads": [0, 3, 10**9],
    "head_dim": [0, -16, 10**12, 15],
    "intermediate_size": [0, 10**12, "x"],
    "max_position_embeddings": [0, -1, 1, 10**18, "x"],
    "rope_parameters": [
        {"rope_type": "nonsense", "rope_theta": 1.0},
        {"rope_type": "default", "rope_theta": 0.0},
        {"rope_type": "default", "rope_theta": -1.0},
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "linear"},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1e308},
        [],
        "x",
    ],
    "rms_norm_eps": [float("nan"), -1e9, float("inf"), "x"],
    "hidden_act": ["nonsense", None, 5],
    "eos_token_id": [[1, 2], [], -1, 10**9, True, "x", {"a": 1}, [[1]]],
    "pad_token_id": [-1, 10**9, "x"],
    "dtype": ["float7", "int64", "bool", 5, ["float32"]],
    "model_type": ["nonsense", "", None, 5, ["llama"], "bert", "clip", "../llama"],
    "architectures": ["x", [], [5], None],
    "tie_word_embeddings": [False, "x"],
    "layer_types": [["full_attention"], ["nonsense"] * 4, 5],
    "quantization_config": [{}, "x", {"quant_method": "nonsense"}, {"quant_method": "gptq"}],
    "attn_implementation": ["nonsense", "someone/kernel", "flash_attention_2", {"": "x"}, 5],
    "_attn_implementation": ["nonsense", "someone/kernel"],
    "auto_map": ["x", [], {"AutoConfig": 5}],
    "transformers_weights": ["../../outside.safetensors", "/etc/passwd", "adapter_model.bin", 5],
    "torch_dtype": ["float7"],
    "\ud800": ["\ud800"],
    "num_labels": [0, -1, 10**12, "x"],
    "id2label": [5, {"x": "y"}, [1]],
}
GENERATION = {
    "temperature": [float("nan"), "x", -1.0],
    "max_length": ["x", -1, 10**30],
    "eos_token_id": ["x", -1, 10**9, True, [[1]], {}],
    "pad_token_id": ["x", 10**9],
    "penalty_alpha": [0.6],
    "dola_layers": ["high"],
    "cache_implementation": ["nonsense"],
    "watermarking_config": [{"seed": 1}, "x"],
    "num_beams": ["x", 0, 10**9],
    "custom_generate": ["someone/code"],
    "bad_words_ids": ["x", [[]]],
    "\ud800": ["\ud800"],
}
TOKENIZER = {
    "eos_token": [None, 5, ["</s>"], {"a": 1}, "nonsense", "", "\ud800"],
    "pad_token": [None, 5, "nonsense"],
    "bos_token": [5],
    "tokenizer_class": ["nonsense", 5, "../x", "LlamaTokenizer", "BertTokenizer"],
    "model_max_length": ["x", -1, 0, float("nan"), 10**30],
    "padding_side": ["up", 5],
    "extra_special_tokens": [5, [5], {"a": 5}],
    "added_tokens_decoder": [5, {"x": 1}, {"0": {"content": 5}}, {"9999": {"content": "<x>"}}],
    "auto_map": ["x", 5, ["evil.A", None], {"AutoTokenizer": ["evil.A", None]}],
    "chat_template": [
        5,
        ["x"],
        {"a": "b"},
        "{% for",
        "{% for i in range(10**12) %}{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{{ raise_exception('no') }}",
        "{{ raise_exception(5) }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__()[0] }}",
        "{{ nonsense.nonsense.nonsense }}",
        "{% include '/etc/passwd' %}",
        "{{ messages|map('nonsense')|list }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "",
        "constant",
        "{{ messages }}",
        "\ud800",
        ENDLESS,
        DOUBLING,
    ],
}
Change = Callable[[Path], None]


def folders() -> dict[str, Change]:
    """The name of each folder, and what makes it of a good one."""
    changes: dict[str, Change] = {}
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in names:
        for kind, content in BAD_JSON.items():
            changes[f"{name} {kind}"] = _content(name, content)
        if name not in ("generation_config.json", "tokenizer_config.json"):
            changes[f"{name} missing"] = lambda folder, name=name: (folder / name).unlink()
    for name, entries in zip(
        ("config.json", "generation_config.json", "tokenizer_config.json"),
        (CONFIG, GENERATION, TOKENIZER),
        strict=True,
    ):
        for entry, values in entries.items():
            for value in values:
                text = ascii(value)
                text = text if len(text) <= 70 else text[:67] + "..."
                changes[f"{name} {ascii(entry)[1:-1]} {text}"] = _entry(name, entry, value)
    return changes | _WEIGHTS | _TOKENIZERS


def make(change: Change, good: Path, folder: Path) -> Path:
    """Copy the good folder and change it; of a checkpoint without the sums that would show it."""
    shutil.copytree(good, folder)
    (folder / "checksums.json").unlink(missing_ok=True)
    change(folder)
    return folder


def edit(file: Path, **entries: object) -> None:
    """Set entries of a JSON object."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | entries))


def _content(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def _entry(name: str, entry: str, value: object) -> Change:
    return lambda folder: edit(folder / name, **{entry: value})


def weights(change: Callable[[dict], object]) -> Change:
    """Change the tensors in place, or return others."""

    def on_folder(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS, {"format": "pt"})

    return on_folder


def _header(change: Callable[[dict], object]) -> Change:
    """Change the JSON header of the file of weights."""

    def on_folder(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        data = content[8 + length :]
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return on_folder


def _bytes(change: Callable[[bytes], bytes]) -> Change:
    def on_folder(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return on_folder


def _index(content: object) -> Change:
    """Put the weights outside the folder and an index in their place."""

    def on_folder(folder: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside.safetensors"
        keys = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(outside)
        places = {
            "..": f"../{outside.name}",
            "absolute": str(outside.absolute()),
            "link": "linked.safetensors",
            "missing": "model-00001-of-00001.safetensors",
        }
        if content == "link":
            (folder / "linked.safetensors").symlink_to(outside)
        made = {"metadata": {}, "weight_map": dict.fromkeys(keys, places.get(str(content)))}
        (folder / INDEX).write_text(json.dumps(made if str(content) in places else content))

    return on_folder


def _pickles(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


_WEIGHTS: dict[str, Change] = {
    "weights missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights empty": _bytes(lambda content: b""),
    "weights truncated": _bytes(lambda content: content[:-1000]),
    "weights truncated in the header": _bytes(lambda content: content[:100]),
    "weights with a huge header": _bytes(lambda c: struct.pack("<Q", 2**62) + c[8:]),
    "weights with a wrong header": _bytes(lambda c: struct.pack("<Q", 50) + c[8:]),
    "weights that are no safetensors": _bytes(lambda content: b"\x80\x04hello" * 100),
    "weights with trailing bytes": _bytes(lambda content: content + b"x" * 100),
    "weights are a folder": lambda f: (f / WEIGHTS).unlink() or (f / WEIGHTS).mkdir(),
    "weights with overlapping tensors": _header(
        lambda h: h[LAYER].update(data_offsets=h["model.norm.weight"]["data_offsets"])
    ),
    "weights with a huge shape": _header(lambda h: h[LAYER].update(shape=[2**40, 2**40])),
    "weights of an unknown dtype": _header(lambda h: h[LAYER].update(dtype="F7")),
    "weights of another shape": weights(lambda t: t.update({LAYER: torch.zeros(3, 5)})),
    "weights transposed": weights(lambda t: t.update({LAYER: t[LAYER].T.contiguous()})),
    "weights missing one": weights(lambda t: t.pop(LAYER) is None),
    "weights missing all": weights(lambda t: {"x": torch.zeros(1)}),
    "weights missing a layer": weights(
        lambda t: {name: x for name, x in t.items() if ".layers.3." not in name}
    ),
    "weights with one more": weights(lambda t: t.update(more=torch.zeros(3))),
    "weights of integers": weights(
        lambda t: t.update({LAYER: torch.zeros_like(t[LAYER], dtype=torch.int64)})
    ),
    "weights of booleans": weights(
        lambda t: t.update({LAYER: torch.zeros_like(t[LAYER], dtype=torch.bool)})
    ),
    "weights of float64": weights(lambda t: {name: x.double() for name, x in t.items()}),
    "weights of bfloat16": weights(lambda t: {name: x.bfloat16() for name, x in t.items()}),
    "weights that overflow": weights(lambda t: t.update({LAYER: t[LAYER] * 0 + 3e38})),
    "weights of zero": weights(lambda t: {name: x * 0 for name, x in t.items()}),
    "weights of NaN": weights(lambda t: t.update({LAYER: t[LAYER] * float("nan")})),
    "pickles": _pickles,
    "index ..": _index(".."),
    "index absolute": _index("absolute"),
    "index through a link": _index("link"),
    "index without a shard": _index("missing"),
    "index of nothing": _index({"metadata": {}, "weight_map": {}}),
    "index without a map": _index({"metadata": {}}),
    "index of numbers": _index({"metadata": {}, "weight_map": {"a": 5}}),
    "index is a list": _index([]),
    "index of lists": _index({"metadata": {}, "weight_map": {"a": ["b"]}}),
    "index of a null byte": _index({"metadata": {}, "weight_map": {"a": "b\0c"}}),
    "adapters inside": lambda f: edit(f / "adapter_config.json", peft_type="LORA", r=2),
    "adapters of code inside": lambda f: edit(
        f / "adapter_config.json", base_model_name_or_path="someone/else"
    ),
}


def _tokenizer(change: Callable[[dict], object]) -> Change:
    def on_folder(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return on_folder


def _added(number: int, content: object = "Why", **entries: object) -> Change:
    token = {
        "id": number, "content": content, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": False,
    }  # fmt: skip
    return _tokenizer(lambda t: t["added_tokens"].append(token | entries))


def _gaps(tokenizer: dict) -> None:
    vocab = tokenizer["model"]["vocab"]
    for token, number in vocab.items():
        if number > 300:
            vocab[token] = number + 100_000


def _template_folder(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.unlink(missing_ok=True)
    path.mkdir()


_TOKENIZERS: dict[str, Change] = {
    "tokenizer beyond the embedding": _added(576),
    "tokenizer far beyond the embedding": _added(2**31 - 1),
    "tokenizer beyond 32 bits": _added(2**32),
    "tokenizer with a negative id": _added(-1),
    "tokenizer with a token twice": _added(5),
    "tokenizer with a token of no text": _added(576, ""),
    "tokenizer with a token that is no text": _added(576, 5),
    "tokenizer with gaps": _tokenizer(_gaps),
    "tokenizer without vocabulary": _tokenizer(
        lambda t: t["model"].update(vocab={}, merges=[]) or t.update(added_tokens=[])
    ),
    "tokenizer without model": _tokenizer(lambda t: t.pop("model")),
    "tokenizer of an unknown kind": _tokenizer(lambda t: t["model"].update(type="nonsense")),
    "tokenizer without added tokens": _tokenizer(lambda t: t.update(added_tokens=[])),
    "tokenizer with a bad expression": _tokenizer(
        lambda t: t.update(
            normalizer={"type": "Replace", "pattern": {"Regex": "(((("}, "content": "x"}
        )
    ),
    "tokenizer that removes everything": _tokenizer(
        lambda t: t.update(
            normalizer={"type": "Replace", "pattern": {"Regex": "(?s)."}, "content": ""}
        )
    ),
    "tokenizer with a broken template": _tokenizer(
        lambda t: t.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        )
    ),
    "tokenizer that adds unknown tokens": _tokenizer(
        lambda t: t.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<x>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [],
                "special_tokens": {"<x>": {"id": "<x>", "ids": [9999], "tokens": ["<x>"]}},
            }
        )
    ),
    "tokenizer that cuts": _tokenizer(
        lambda t: t.update(
            truncation={
                "direction": "Right",
                "max_length": 1,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        )
    ),
    "template file": lambda f: (f / "chat_template.jinja").write_text("{% for") and None,
    "template file binary": lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe") and None,
    "template file endless": lambda f: (f / "chat_template.jinja").write_text(ENDLESS) and None,
    "template folder": _template_folder,
}
