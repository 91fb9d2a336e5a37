"""What generation is asked for: tables, shards, and everything that can be wrong with them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pipeline.config.job import GenerateConfig, ResourcesConfig, TrainVaeConfig
from pipeline.core.manifest import Manifest
from pipeline.inference.request import (
    REQUEST,
    check_choice,
    n_shards,
    notes_on,
    read_request,
    record_request,
    recorded_request,
)
from pipeline.planning.generation import generation_lines
from pipeline.planning.sizes import DataFacts
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import InputError
from scldm.generation.recipe import generated_obs, recipe_of
from scldm.generation.request import Request, RequestRow, Settings
from scldm.generation.request_table import check_guidance, genes_to_write

VOCABULARY = Vocabulary(
    ("g1", "g2"), ("A", "B"), (LabelVocabulary("cell_type", ("B", "NK")), LabelVocabulary("donor_id", ("d1", "d2")))
)


def request(**config) -> Request:
    return read_request(GenerateConfig.model_validate(config), VOCABULARY, {})


def test_a_csv_table_may_leave_labels_open(tmp_path):
    path = tmp_path / "conditions.csv"
    path.write_text("cell_type,donor_id,n_cells\nB,d1,3\nNK,,2\n,,1\n")
    rows = request(conditions=str(path)).rows
    assert [(dict(r.condition), r.n_cells) for r in rows] == [
        ({"cell_type": "B", "donor_id": "d1"}, 3),
        ({"cell_type": "NK", "donor_id": None}, 2),
        ({"cell_type": None, "donor_id": None}, 1),
    ]


def test_a_number_per_class_makes_a_row_for_every_class():
    assert [(r.condition["cell_type"], r.n_cells) for r in request(per_label={"cell_type": 7}).rows] == [
        ("B", 7),
        ("NK", 7),
    ]


def test_a_composition_is_scaled_to_the_cells_asked_for():
    composition = pd.DataFrame({"cell_type": ["B", "NK"], "donor_id": ["d1", "d1"], "n_cells": [200, 100]})
    config = GenerateConfig(like="train", n_cells=100)
    scaled = read_request(config, VOCABULARY, {"train": composition})
    assert [r.n_cells for r in scaled.rows] == [67, 33]


@pytest.mark.row("D:unknown-category-at-generation")
def test_all_that_is_wrong_with_a_table_is_said_at_once():
    with pytest.raises(InputError) as error:
        request(cells=[{"cell_type": "NKK", "tissue": "lung", "n_cells": -1}, {"cell_type": "B", "n_cells": 1.5}])
    message = str(error.value)
    assert "no class 'NKK' (did you mean 'NK'?)" in message
    assert "knows no label 'tissue'" in message
    assert "n_cells must be whole numbers >= 0; 2 are not, the first in row 1" in message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "does not say which cells"),
        ({"per_label": {"cell_type": 1}, "like": "train"}, "takes one of"),
        ({"per_label": {"cell_type": 1}, "n_cells": 5}, "goes with `like`"),
        ({"conditions": "no/such/file.csv"}, "no file no/such/file.csv"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_without_knowing_the_data(config, said):
    assert said in check_choice(GenerateConfig.model_validate(config))[0]


def test_shards_cut_the_request_across_its_rows():
    r = Request((RequestRow({"cell_type": "B"}, 5), RequestRow({"cell_type": "NK"}, 4)))
    assert r.slice(3, 7) == [({"cell_type": "B"}, 2), ({"cell_type": "NK"}, 2)]
    assert r.slice(0, 9) == [({"cell_type": "B"}, 5), ({"cell_type": "NK"}, 4)]
    assert n_shards(r, 4) == 3


def test_a_request_for_no_cells_is_one_empty_shard():
    nothing = request(cells=[{"cell_type": "B", "n_cells": 0}])
    assert nothing.n_cells == 0
    assert n_shards(nothing, 100) == 1
    assert nothing.slice(0, 0) == []


def test_rows_may_set_guidance_and_library_size(tmp_path):
    path = tmp_path / "conditions.csv"
    path.write_text("cell_type,n_cells,guidance,guidance.donor_id,library_size\nB,3,2,,5000\nNK,1,,0.5,\n")
    rows = request(conditions=str(path)).rows
    assert [dict(r.guidance) for r in rows] == [{"": 2.0}, {"donor_id": 0.5}]
    assert [r.library_size for r in rows] == [5000.0, None]
    assert Request.from_plain(request(conditions=str(path)).as_plain()).rows == rows


def scales(rows, guidance=1.0, strategy="joint"):
    """Scales of a request, by label, as the sampler takes them; and what obs says of them."""
    asked = request(cells=[{"n_cells": 1, **row} for row in rows])
    settings = Settings(guidance, 1000.0)
    recipe = recipe_of(asked, settings, VOCABULARY, LibrarySizes({}, "not recorded"), strategy)
    obs = generated_obs(np.arange(len(rows)), [str(i) for i in range(len(rows))], recipe, asked, settings, VOCABULARY)
    shown = {k: v.tolist() for k, v in obs.items() if str(k).startswith("guidance")}
    return {k: v.tolist() for k, v in recipe.scale.items()}, shown


BOTH = {"cell_type": "B", "donor_id": "d1"}


def test_rows_may_have_scales_of_single_labels_beside_that_of_all_together():
    found, obs = scales([{**BOTH, "guidance.*": 2, "guidance.donor_id": 0.5}, {**BOTH, "guidance": 3}, BOTH])
    assert found == {"*": [2, 3, 1], "donor_id": [0.5, 0, 0]}
    assert obs == {
        "guidance_scale": [2, 3, 1], "guidance_scale.cell_type": [0, 0, 0], "guidance_scale.donor_id": [0.5, 0, 0]
    }  # fmt: skip


def test_a_row_changes_single_scales_of_the_settings():
    of_all = {"*": 2.0, "donor_id": 0.5}
    rows = [BOTH, {**BOTH, "guidance.cell_type": 4}, {**BOTH, "guidance.*": 0}, {**BOTH, "guidance": 1}]
    found, _ = scales(rows, of_all)
    assert found == {"*": [2, 2, 0, 1], "cell_type": [0, 4, 0, 0], "donor_id": [0.5, 0.5, 0.5, 0]}


def test_scales_of_all_labels_that_are_equal_are_the_one_scale_that_they_were():
    assert scales([{**BOTH, "guidance.cell_type": 2, "guidance.donor_id": 2}])[0] == {"*": [2]}
    assert scales([BOTH], {"cell_type": 2.0, "donor_id": 2.0})[0] == {"*": [2]}
    assert scales([{"cell_type": "B", "guidance.cell_type": 2}])[0] == {"*": [2]}


@pytest.mark.parametrize(
    ("rows", "guidance", "strategy", "words"),
    [
        ([{**BOTH, "guidance.donor_id": 2}], 1.0, "joint", r"row 1 guides .* too: '\*', or the column guidance\.\*"),
        ([BOTH], {"cell_type": 1.0, "donor_id": 2.0}, "joint", "for scales of single labels beside it"),
        ([{**BOTH, "guidance": 1, "guidance.*": 2}], 1.0, "joint", r"row 1 has guidance \(1\) and guidance\.\* \(2\)"),
        ([{**BOTH, "guidance.*": 2}], 1.0, "mutually_exclusive", "sets one label at a time; give each label a scale"),
    ],
)
def test_scales_that_could_be_read_in_two_ways_are_refused(rows, guidance, strategy, words):
    with pytest.raises(InputError, match=words):
        scales(rows, guidance, strategy)


def test_a_label_that_is_left_out_beside_a_scale_of_all_together_has_none_of_its_own():
    assert check_guidance({"*": 1.0, "donor_id": 2.0}, ["cell_type", "donor_id"]) == []
    [problem] = check_guidance({"*": 1.0, "donor": 2.0}, ["cell_type", "donor_id"])
    assert "knows no label 'donor'" in problem


def test_a_parquet_table_with_numbers_for_classes_is_read(tmp_path):
    vocabulary = Vocabulary(("g",), ("G",), (LabelVocabulary("day", ("1", "2")),))
    path = tmp_path / "conditions.parquet"
    pd.DataFrame({"day": [1.0, None, 2.0], "n_cells": [1, 2, 3]}).to_parquet(path)
    rows = read_request(GenerateConfig(conditions=str(path)), vocabulary, {}).rows
    assert [r.condition["day"] for r in rows] == ["1", None, "2"]


def test_settings_that_do_not_fit_the_model_are_said_with_the_table(tmp_path):
    with pytest.raises(InputError) as error:
        request(
            cells=[{"cell_type": "B", "n_cells": 1, "guidance.tissue": 2, "library_size": 0}],
            genes=["g1", "A", "nope"],
            sampler={"guidance": {"cell_typ": 2.0}},
        )
    message = str(error.value)
    assert "guides 'tissue', and the model knows no such label" in message
    assert "library_size must be numbers above 0; 1 are not, the first in row 1" in message
    assert "no gene 'nope'" in message
    assert "knows no label 'cell_typ'" in message
    assert "names no scale for cell_type, donor_id" in message


def test_genes_are_found_by_id_and_by_name_and_one_name_for_two_is_refused(tmp_path):
    vocabulary = Vocabulary(("e1", "e2", "e3"), ("X", "Y", "Y"))
    assert genes_to_write(None, vocabulary) is None
    assert genes_to_write(["e3", "X"], vocabulary).tolist() == [0, 2]
    (tmp_path / "genes.txt").write_text("X\n\ne2\n")
    assert genes_to_write(str(tmp_path / "genes.txt"), vocabulary).tolist() == [0, 1]
    (tmp_path / "excel.csv").write_text("\ufeffgene_id;symbol\r\ne3;Y\r\ne1;X\r\n")
    assert genes_to_write(str(tmp_path / "excel.csv"), vocabulary).tolist() == [0, 2]
    (tmp_path / "wide.txt").write_bytes("X\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"generate\.genes: .*wide\.txt cannot be read: its encoding is UTF-16"):
        genes_to_write(str(tmp_path / "wide.txt"), vocabulary)
    with pytest.raises(InputError, match="Y is the name of 2 genes; give the id: e2, e3"):
        genes_to_write(["Y"], vocabulary)
    with pytest.raises(InputError, match="no file"):
        genes_to_write(str(tmp_path / "none.txt"), vocabulary)


@pytest.mark.row("G7")
def test_more_than_a_billion_cells_are_refused():
    with pytest.raises(InputError, match="asks for 1,000,000,001 cells; at most 1,000,000,000"):
        request(n_cells=10**9 + 1)


# ---- what `scldm plan` says --------------------------------------------------------------------------------------
DATA = DataFacts(n_genes=20_000, expressed=2_000)
VAE = TrainVaeConfig.model_validate({"model": {"n_latent_tokens": 16, "latent_width": 16}})


def planned(config: GenerateConfig, before=None, **resources) -> tuple[str, int]:
    lines, size = generation_lines(config, DATA, VAE, ResourcesConfig(**resources), before)
    return "\n".join(lines), size


@pytest.mark.row("G7")
def test_plan_counts_cells_shards_and_bytes():
    text, size = planned(GenerateConfig(n_cells=10**9), actors={"min": 2, "max": 8})
    assert "1,000,000,000 cells in 40,000 shards" in text
    assert "17.0 TB" in text
    assert "2 to 8 actors" in text
    assert size == 10**9 * (2_000 * 8 + 16 * 16 * 4)
    assert "time unknown: no generation of this pipeline has finished" in text


def test_plan_reckons_time_with_the_rate_of_the_last_generation():
    config = GenerateConfig(n_cells=36_000)
    facts = {"cells_per_s": 10.0, "n_cells": 500}
    before = Manifest("generate", "abc", "", config.model_dump(mode="json"), {}, facts, 1.0, 1.0)
    text, _ = planned(config, before)
    assert "about 1h00m at 10 cells/s, which is what generate abc made (500 cells, with the same sampler" in text
    other = GenerateConfig(n_cells=36_000, sampler={"steps": 99})
    assert "with another sampler" in planned(other, before)[0]


def test_plan_reads_the_table(tmp_path):
    path = tmp_path / "conditions.csv"
    path.write_text("cell_type,n_cells\nB,70000\nNK,5\n")
    assert "70,005 cells in 3 shards" in planned(GenerateConfig(conditions=str(path)))[0]


def test_a_range_of_actors_must_be_one():
    with pytest.raises(ValueError, match=r"min \(3\) must not be more than max \(2\)"):
        ResourcesConfig(actors={"min": 3, "max": 2})
    assert (ResourcesConfig(actors=5).actors_min, ResourcesConfig(actors=5).actors_max) == (1, 5)


def test_a_request_is_recorded_and_read_back(tmp_path):
    resolved = request(**{"cells": [{"cell_type": "B", "n_cells": 3, "guidance": 2.0}]})
    assert recorded_request(tmp_path) is None
    record_request(tmp_path, resolved)
    assert recorded_request(tmp_path) == resolved


@pytest.mark.parametrize("damage", ["", "{", '{"digest": "x", "rows": []}', '{"rows": 3}'])
def test_a_damaged_record_of_a_request_is_an_error(tmp_path, damage):
    (tmp_path / REQUEST).write_text(damage)
    with pytest.raises(InputError, match="is damaged"):
        recorded_request(tmp_path)


def test_a_table_is_parsed_again_if_it_changes(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("cell_type,n_cells\nB,3\n")
    assert request(**{"conditions": str(path)}).n_cells == 3
    path.write_text("cell_type,n_cells\nB,12\n")
    assert request(**{"conditions": str(path)}).n_cells == 12


# ---- what users write ----------------------------------------------------------------------------------------------
DOSES = Vocabulary(("g",), ("G",), (LabelVocabulary("dose", ("0.1", "1", "10")), LabelVocabulary("kind", ("1.0", "a"))))


def refusal(**config) -> str:
    with pytest.raises(InputError) as error:
        read_request(GenerateConfig.model_validate(config), DOSES, {})
    return str(error.value)


def test_a_class_is_found_whatever_the_notation_of_its_number_and_the_space_around_it(tmp_path):
    path = tmp_path / "conditions.csv"
    path.write_text("dose, kind, n_cells\n1.0, a,1\n0.10,1,1\n10,,1\n")
    rows = read_request(GenerateConfig(conditions=str(path)), DOSES, {}).rows
    assert [dict(r.condition) for r in rows] == [
        {"dose": "1", "kind": "a"},
        {"dose": "0.1", "kind": "1.0"},
        {"dose": "10", "kind": None},
    ]
    [row] = read_request(GenerateConfig(cells=[{"kind": 1.0, "n_cells": 1}]), DOSES, {}).rows
    assert row.condition["kind"] == "1.0"


def test_a_suggestion_has_the_value_of_the_number():
    assert "dose has no class '1e1' (did you mean '10'?); row 1" in refusal(cells=[{"dose": "1e1", "n_cells": 1}])
    assert "has no class '100' (known: 0.1, 1, 10)" in refusal(cells=[{"dose": "100", "n_cells": 1}])


@pytest.mark.parametrize(
    ("n", "words"),
    [("1,000", "1000, 0.5"), ("5.5", "in row 2 ('5.5')"), ("1 000", "1000, 0.5"), ("many", "in row 2 ('many')")],
)
def test_a_number_that_is_none_is_named_with_its_row_and_how_to_write_it(n, words):
    said = refusal(cells=[{"dose": 1, "n_cells": 1}, {"dose": 1, "n_cells": n}])
    assert words in said
    assert ("digits only" in said) == (n[0] == "1")


def test_names_of_columns_that_differ_by_case_are_suggested():
    said = refusal(cells=[{"DOSE": 1, "N_Cells": 3}])
    assert "knows no label 'DOSE' (did you mean 'dose'?)" in said
    assert "knows no label 'N_Cells' (did you mean 'n_cells'?)" in said


def test_classes_that_a_table_file_cannot_tell_apart_are_noted(tmp_path):
    vocabulary = Vocabulary(("g",), ("G",), (LabelVocabulary("kind", ("T", "T ")),))
    training = pd.DataFrame({"kind": ["T", "T "], "n_cells": [5, 5]})
    path = tmp_path / "conditions.csv"
    path.write_text("kind,n_cells\nT ,1\n")
    inline = GenerateConfig(cells=[{"kind": "T ", "n_cells": 1}])
    for config, name, noted in [(GenerateConfig(conditions=str(path)), "T", True), (inline, "T ", False)]:
        found = read_request(config, vocabulary, {})
        assert found.rows[0].condition["kind"] == name
        notes = notes_on(found, training, LibrarySizes({}, "none"), config, counts=False)
        assert any("the data also have 'T '" in n for n in notes) == noted


def test_guidance_is_checked_with_the_labels_that_a_model_will_have():
    config = GenerateConfig(n_cells=1, sampler={"guidance": {"cell_typ": 2.0}})
    assert check_choice(config) == []
    said = "\n".join(check_choice(config, ["cell_type"]))
    assert "knows no label 'cell_typ' (did you mean 'cell_type'?)" in said
