"""Names that no label can have: requests and generated cells have columns of these names."""

from __future__ import annotations

REQUEST_COLUMNS = ("n_cells", "guidance", "library_size")
GENERATED_COLUMNS = ("is_synthetic", "gen_index", "gen_shard", "guidance_scale", "total_counts", "n_genes")
PREDICTED_COLUMNS = ("predicted_delta_pearson", "predicted_delta_pearson_low", "predicted_delta_pearson_high")


def is_reserved(label: str) -> bool:
    """Whether a column of requests or of generated cells has this name, so that no label can have it."""
    return label in (*REQUEST_COLUMNS, *GENERATED_COLUMNS, *PREDICTED_COLUMNS) or label.startswith(
        ("guidance.", "guidance_scale.")
    )
