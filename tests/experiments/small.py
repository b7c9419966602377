"""A small recipe for tests."""

import yaml

SMALL = {
    "title": "t",
    "question": "q",
    "seeds": [0, 1],
    "baseline": "initial",
    "measures": ["reward", "ranking_accuracy"],
    "stages": {
        "rows": {"select": {"data": "{demo.train}", "rows": 8, "seed": "{seed}"}},
        "train": {
            "train": {"model_name_or_path": "{demo.model}", "train_data": "{rows}", "max_steps": 2}
        },
        "held_out": {"select": {"data": "{demo.eval}", "rows": 6}},
        "evaluate": {
            "evaluate": {
                "model_name_or_path": "{train}",
                "data": "{held_out}",
                "reward_fn": "rrhf_fast.demo.reward:score",
                "num_samples": 2,
                "max_new_tokens": 8,
            }
        },
        "rank": {"rank": {"model_name_or_path": "{train}", "data": "{held_out}"}},
    },
    "results": ["evaluate", "rank"],
    "arms": {
        "initial": {
            "evaluate.model_name_or_path": "{demo.model}",
            "rank.model_name_or_path": "{demo.model}",
        },
        "RRHF": {},
        "more samples": {"evaluate.num_samples": 3},
        "real": {"evaluate.model_name_or_path": "{models}/none"},
    },
}


def write(path, **changes):
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return path


def stages_of(arm, seed=0):
    return [stage for stage, _ in arm.results[seed]]
