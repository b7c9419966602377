"""Load any Hugging Face decoder, run it over a packed forest, read log-probs off its head."""
