"""Library sizes by condition: numpy's statistics of each group, and the documented fallback for tiny groups."""

import numpy as np
import pytest

from scldm.data.library_size import ALL, MIN_CELLS, LibrarySizes, condition_key


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    n = 600
    labels = {
        "cell_type": rng.choice(["B", "T", "NK", "rare"], n, p=[0.5, 0.4, 0.1, 0]),
        "donor": rng.choice(["1", "2"], n),
        "assay": rng.choice(["v2", "v3"], n),
    }
    labels["cell_type"][:3] = "rare"
    size = np.rint(rng.lognormal(7 + (labels["cell_type"] == "B"), 0.4)) + 1
    return size, labels


def test_statistics_are_those_of_the_logs_of_each_group(cells):
    size, labels = cells
    sizes = LibrarySizes.fit(size, labels)
    assert sizes.table[ALL].mean == pytest.approx(np.log(size).mean())
    for key, found in sizes.table.items():
        if key == ALL:
            continue
        condition = dict(pair.split("=") for pair in key.split("|"))
        own = np.log(size[np.all([labels[k] == v for k, v in condition.items()], axis=0)])
        assert (found.n_cells, found.level) == (len(own), key)
        assert found.mean == pytest.approx(own.mean(), rel=1e-12)
        assert found.sd == pytest.approx(own.std(), rel=1e-9, abs=1e-12)
    seen = {tuple(x) for x in zip(*labels.values(), strict=True)}
    assert sum(key.count("|") == 2 for key in sizes.table) == len(seen)


def test_class_ids_give_what_names_give(cells):
    size, labels = cells
    coded = {}
    for name, values in labels.items():
        classes = [*np.unique(values)[::-1].tolist(), "a class without cells"]
        coded[name] = (classes, np.array([classes.index(v) for v in values]))
    by_name, by_id = LibrarySizes.fit(size, labels).table, LibrarySizes.fit_codes(size, coded).table
    assert by_name == by_id


def test_a_tiny_group_falls_back_to_the_label_with_most_cells_then_to_all(cells):
    size, labels = cells
    sizes = LibrarySizes.fit(size, labels)
    assert sizes.of({"cell_type": "B", "donor": "1", "assay": "v2"}).level == "assay=v2|cell_type=B|donor=1"
    assert sizes.table["cell_type=rare"].n_cells == 3 < MIN_CELLS
    assert sizes.of({"cell_type": "rare"}).level == ALL
    larger = max("12", key=lambda d: sizes.table[f"donor={d}"].n_cells)
    assert sizes.of({"cell_type": "rare", "donor": larger}).level == f"donor={larger}"
    assert sizes.of({"cell_type": "never seen", "donor": "never seen"}).level == ALL
    assert sizes.of({"cell_type": None}).level == ALL


def test_one_cell_has_no_spread_and_is_not_drawn_from():
    size = np.array([100.0] + [1000.0] * 20)
    sizes = LibrarySizes.fit(size, {"cell_type": np.array(["one"] + ["many"] * 20)})
    assert sizes.table["cell_type=one"].sd == 0
    assert sizes.of({"cell_type": "one"}).n_cells == 21


def test_names_that_are_numbers_keep_their_keys():
    sizes = LibrarySizes.fit(np.full(8, 10.0), {"donor": np.array([3] * 8), "cell_type": np.array(["B"] * 8)})
    assert set(sizes.table) == {ALL, "donor=3", "cell_type=B", condition_key({"donor": "3", "cell_type": "B"})}
    assert LibrarySizes.from_json(sizes.to_json()) == sizes
