"""Does it align? Experiments on the whole method, over seeds, with intervals and paired tests.

recipe.py        turn a YAML file into a graph of stages
stages.py        the kinds of stages
peers.py         DPO and GRPO by TRL, for comparison
runner.py        run the graph in several processes; survives kills
statistics.py    intervals and tests over seeds and prompts
report.py        tables, plots and the index
"""
