# %% [markdown]
# # A trained model in a notebook
# Load, encode, generate, score. Open this file as a notebook in Jupyter (jupytext) or VS Code, or run it as it is.

# %% tags=["parameters"]
# --8<-- [start]
model_folder = "runs/mine"  # a pipeline, a stage, or a folder of models
cells_file = "cells.h5ad"  # raw counts

# %%
import anndata

import scldm

adata = anndata.read_h5ad(cells_file)
model = scldm.load(model_folder)
model.encode(adata)  # obsm["X_scldm"]: give it to scanpy.pp.neighbors
cells = model.generate({"cell_type": "B"}, n=200, seed=0)  # AnnData, integer counts
real = adata[adata.obs["cell_type"] == "B"].copy()
print(scldm.score(cells, real=real)[["generated", "floor", "better"]])
print(model.log_likelihood(adata)["nll_per_gene"].describe())
# --8<-- [end]

# %% [markdown]
# ## More than one condition
# A table, as a generate job takes it: labels, `n_cells` and, if you like, guidance and library size of a row.

# %%
import pandas as pd

table = pd.DataFrame({"cell_type": list(model.labels["cell_type"])[:2], "n_cells": 50, "guidance": [1.0, 2.0]})
some = model.generate(table, seed=1, genes=list(model.vocabulary.feature_ids[:3]))
some.obs.groupby("cell_type", observed=True)["total_counts"].mean()

# %% [markdown]
# ## Real cells, encoded and decoded

# %%
again = model.reconstruct(adata[:64].copy(), mean=True)
again.layers["mean"].shape

# %% [markdown]
# ## A folder for others: weights, names, and a card

# %%
saved = model.save_pretrained("shared_model", force=True)
scldm.Model.from_pretrained(saved)
