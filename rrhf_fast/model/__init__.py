"""Load any Hugging Face decoder, run it over a packed forest, read log-probs off its head.

decoder.py loads and checks a model, and reads its head; sharded.py loads one in shards.
rrhf.py is the root module: a pack goes in, the loss (config.py) comes out; lora.py adds adapters.
attention.py chooses forest_flex, forest_flash or forest_sdpa (backend.py: protocol, chains.py).
layers.py checkpoints and compiles layers; weight_copies.py keeps 16-bit weights between steps.
generate.py and diverse_beam.py sample responses; save.py writes Hugging Face folders.
"""
