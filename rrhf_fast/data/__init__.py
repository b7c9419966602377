"""The way of the data, on the CPU. Imports no model and no engine.

    sources.py, files.py        a source -> records
    layouts.py, rows.py         a record -> a checked row; load.py does both for whole sources
    chat.py, tokenise.py        a row -> tokens: prompt, responses, rewards
    fill.py, corpus.py          all rows -> a memory-mapped file of tokens
    forest.py, padded.py        the tokens of several queries -> one pack
    packs.py                    all queries -> optimizer steps, packs and ranks

active.py reduces a packed forest to the part that has a gradient.
"""
