"""Does it align? Experiments on the whole method, over seeds, with intervals and paired tests.

recipe.py        turn a YAML file into a graph of stages
stages.py        the kinds of stages
peers.py         DPO, GRPO and RLOO by TRL, for comparison
ppo.py           PPO, for comparison
tasks/           tasks beside the demo: reasoning, long form, safety, written principles
runner.py        run the graph in several processes; survives kills
statistics.py    intervals and tests over seeds and prompts
report.py        tables, plots and the index
"""
