"""Does it align? Experiments on the whole method, over seeds, with intervals and paired tests.

recipe.py        a YAML file to a graph of stages
stages.py        what a stage does
peers.py         DPO and GRPO by TRL, to compare with
runner.py        the graph, by several processes, through kills
statistics.py    intervals and tests over seeds and prompts
report.py        tables, plots and the index
"""
