# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which learning rate?
#
# An ablation on the CPU: one small experiment, a few values, three seeds of each. It opens in
# Jupyter with jupytext, or runs as it is: `python experiments/notebooks/ablation.py`. The same from
# the shell:
#
#     internlm2 run experiments/ablations/small.py --sweep learning_rate=1e-3,4e-3,1.6e-2 --seeds 3
#
# What has run before is not run again: change the grid and only what is new is trained.

# %%
import os
from pathlib import Path

import internlm2_jax

ROOT = Path(__file__).parents[2] if "__file__" in globals() else Path.cwd()
SMALL = ROOT / "experiments" / "ablations" / "small.py"
# A test runs these cells in seconds.
TINY = bool(os.environ.get("INTERNLM2_TINY"))

# %% [markdown]
# The experiment, and what may be set in it:

# %%
print(internlm2_jax.config.text(internlm2_jax.load(SMALL)))

# %%
found = internlm2_jax.ablate(
    SMALL,
    {"learning_rate": [1e-3, 4e-3, 1.6e-2][: 2 if TINY else 3]},
    seeds=2 if TINY else 3,
    folder=os.environ.get("INTERNLM2_ABLATION", "runs/ablation"),
    function="tiny" if TINY else "experiment",
    assignments=[f"corpus={os.environ['INTERNLM2_CORPUS']!r}"]
    if "INTERNLM2_CORPUS" in os.environ
    else [],
    before=print,
)

# %% [markdown]
# The table: means and standard deviations over seeds, of the results that differ.

# %%
print(found)

# %% [markdown]
# The plot: the line is the mean, the band reaches from the lowest to the highest seed.

# %%
figure = found.figure()
figure.savefig(found.folder / "validation_loss.svg")
figure  # noqa: B018
