"""Texts that name a setting or a command and that no test of this folder follows, each with the reason.

`FOLLOWED_ELSEWHERE` names the test that follows a text. `NOT_FOLLOWED` says what a machine of the tests lacks for it.
`NO_ADVICE` holds texts that name a setting or a command to say what it does or where a fault is.
"""

from __future__ import annotations

FOLLOWED_ELSEWHERE = {
    "pipeline/cli/notebook.py: ray=False trains on this machine alone": "tests/unit/cli/test_train_in_a_notebook.py",
    "pipeline/cli/notebook.py: settings must be {'train_vae.train.max_steps': 500}": (
        "tests/unit/cli/test_train_in_a_notebook.py"
    ),
    "scldm/api/conditions.py: for cells without labels write generate(n={})": (
        "tests/unit/model/api/test_conditions_as_people_have_them.py"
    ),
    "pipeline/inference/actors/numerics.py: , or set resources.gpus_per_worker=1": (
        "tests/unit/inference/test_precision_of_jobs.py"
    ),
    "pipeline/training/worker.py: start it with --nproc_per_node {}": "tests/unit/training/test_start_worker.py",
    "pipeline/config/job.py: add one (distil: {}), or leave generate.flow out": (
        "tests/unit/workflow/test_distil_job.py"
    ),
    "scldm/flow/distilled.py: or distil again with distil.guidance": "tests/unit/workflow/test_distil_job.py",
    "scldm/flow/distilled.py: train_flow.flow.prediction=velocity": "tests/unit/workflow/test_distil_job.py",
    "scldm/flow/distilled.py: train one with train_flow.start.share below 1": (
        "tests/unit/workflow/test_distil_job.py"
    ),
    "scldm/flow/distilled.py: train one with train_flow.model.label_dropout above 0": (
        "tests/unit/workflow/test_distil_job.py"
    ),
    "scldm/api/folders.py: name both: scldm.load(vae_folder": "tests/unit/training/test_distil.py",
    "pipeline/data/ingest/held_out.py: leaves no training cells to": "tests/unit/workflow/test_preflight.py",
    "scldm/checkpoints/start_from.py: make both the same (ingest.label_values)": (
        "tests/unit/model/checkpoints/test_start_from_values.py"
    ),
    "pipeline/config/stages.py: leave start out, or set method=flow": "tests/unit/inference/test_predict_error.py",
    "pipeline/inference/models.py: method: pooled adds and removes molecules": (
        "tests/unit/inference/test_predict_error.py"
    ),
    "pipeline/stages/unseen/asked.py: ask for another class, or set method=flow": (
        "tests/unit/inference/test_predict_error.py"
    ),
    "pipeline/stages/unseen/pooled.py: leave model out to use the models of the pipeline": (
        "tests/unit/inference/test_pooled_cells.py"
    ),
    "pipeline/stages/unseen/pooled.py: leave them out with cells, or set method=flow": (
        "tests/unit/inference/test_pooled_cells.py"
    ),
    "pipeline/cli/verbs/options.py: --guidance takes a number or LABEL=NUMBER": "tests/unit/cli/test_verbs.py",
    "pipeline/cli/verbs/options.py: or LABEL=NUMBER for each; not both": "tests/unit/cli/test_verbs.py",
    "pipeline/cli/verbs/output.py: --out {} must end in .h5ad": "tests/unit/cli/test_verbs.py",
    "pipeline/cli/verbs/output.py: --out {} is the file that is read": "tests/unit/cli/test_verbs.py",
    "pipeline/cli/verbs/output.py: or give --force to replace it": "tests/unit/cli/test_verbs.py",
    "pipeline/cli/verbs/perturb.py: --to names {} classes": "tests/unit/cli/test_verbs.py",
    "pipeline/workflow/runner.py: next              scldm open {}": "tests/unit/cli/test_verbs.py",
    "pipeline/cli/cells.py: --control takes LABEL=CLASS": "tests/unit/inference/test_cell_eval.py",
    "pipeline/cli/cells.py: --control works only with --to cell-eval": "tests/unit/inference/test_cell_eval.py",
    "pipeline/inference/export/cell_eval.py: --control LABEL=CLASS": "tests/unit/inference/test_cell_eval.py",
    "pipeline/inference/export/cell_eval.py: generate with generate.like=test": (
        "tests/unit/inference/test_cell_eval.py"
    ),
    "pipeline/report/combinations.py: set evaluate.control={LABEL: CLASS}": "tests/unit/report/test_combinations.py",
    "pipeline/__main__.py: {}; run `make venv` in {}": "tests/unit/cli/test_cli.py",
    "pipeline/tracking/mlflow_runs/client.py: mlflow experiments restore": "tests/unit/tracking/test_moved_folder.py",
    "pipeline/config/paths/remote_models.py: {}: export MLFLOW_TRACKING_URI": (
        "tests/unit/inference/test_remote_models.py"
    ),
    "pipeline/workflow/schedule.py: was made from the cells of another pipeline": "tests/unit/workflow/test_runner.py",
    "pipeline/stages/train_vae.py: ingest them with the genes of the model": (
        "tests/unit/inference/test_named_models.py"
    ),
    "pipeline/tracking/mlflow_runs/client.py: `mlflow runs restore --run-id …`": (
        "tests/chaos/tracking/test_mlflow_outage.py"
    ),
    "pipeline/tracking/mlflow_runs/client.py: no MLflow store: give --uri": "tests/unit/tracking/test_tracking.py",
    "pipeline/tracking/mlflow_runs/client.py: `scldm mlflow sync` completes the run later": (
        "tests/chaos/tracking/test_mlflow_outage.py"
    ),
    "pipeline/stages/evaluate.py: scldm run jobs/evaluate.yaml {}": "tests/unit/report/test_report.py",
    "pipeline/inference/request.py: a table file cannot name both, generate.cells can": (
        "tests/unit/inference/test_request.py"
    ),
    "pipeline/config/io/reference.py: # Settings": "tests/contracts/test_configuration_reference.py",
    "pipeline/tracking/mlflow_runs/register.py: to name the registered model after; give --name": (
        "tests/unit/inference/test_model_cards.py"
    ),
    "scldm/api/analysis/mapping.py: map(query, reference=adata)": "tests/unit/model/api/test_map_query.py",
    "scldm/api/training_run.py: weights='ema').finetune": "tests/unit/cli/test_finetune_in_a_notebook.py",
    "scldm/api/scoring.py: name the layer of counts with layer=": "tests/unit/model/api/test_notebook_api.py",
    "scldm/api/hub/model_card.py: cells = model.generate(n=100, seed=0)": "tests/unit/model/api/test_notebook_api.py",
    "pipeline/config/apply.py: set counts=drawn or start=latents": "tests/unit/inference/test_perturb_controls.py",
    "pipeline/config/stages.py: vae.train changes the latents in every step": (
        "tests/unit/training/objectives/test_control_starts.py"
    ),
    "pipeline/config/stages.py: set flow.prediction=velocity and flow.path=linear": (
        "tests/unit/training/objectives/test_control_starts.py"
    ),
    "pipeline/config/stages.py: lower start.share, or leave train.sample_every out": (
        "tests/unit/training/objectives/test_control_starts.py"
    ),
    "pipeline/data/ingest/controls.py: name another class, lower the shares": "tests/unit/workflow/test_preflight.py",
    "pipeline/data/ingest/controls.py: leave out the label that differs (ingest.labels)": (
        "tests/unit/workflow/test_preflight.py"
    ),
    "pipeline/inference/models.py: leave flow out, or train with a share below 1": (
        "tests/unit/inference/test_perturb_controls.py"
    ),
    "pipeline/stages/perturb.py: Select the control cells with cells.where={{}: {}}": (
        "tests/unit/inference/test_perturb_controls.py"
    ),
    "scldm/api/analysis/generated_de.py: method='posterior' takes any column of obs": (
        "tests/unit/model/api/test_notebook_analysis.py"
    ),
    "scldm/api/analysis/interpolation.py: cells under another condition are model.perturb(cells, to)": (
        "tests/unit/model/api/test_notebook_analysis.py"
    ),
    "scldm/api/perturb.py: take counts='drawn' or start='latents'": "tests/unit/model/api/test_perturb.py",
    "scldm/api/perturb.py: unknown_labels='none'": "tests/unit/model/api/test_perturb.py",
    "scldm/api/perturb.py: Select the control cells, or take start='latents'": "tests/unit/model/api/test_perturb.py",
    "scldm/flow/transport.py: set start={}, or train a flow with train_flow.start": (
        "tests/unit/inference/test_perturb_controls.py"
    ),
    "scldm/flow/transport.py: carry control cells in a perturb job with start=control": (
        "tests/unit/inference/test_perturb_controls.py"
    ),
    "scldm/generation/perturbed.py: set counts=drawn": "tests/unit/inference/test_perturb_controls.py",
    "scldm/generation/perturbed.py: give it {} alone, or set start=latents": (
        "tests/unit/inference/test_perturb_controls.py"
    ),
}

NOT_FOLLOWED = {
    "pipeline/training/engine/compiled_blocks.py: install one, or set train.compile=false": (
        "needs a machine without a compiler: tests/unit/training/test_compiled_blocks.py checks the text"
    ),
    "scldm/__init__.py: Run pip uninstall scldm {}": "needs an environment with upstream's package",
    "pipeline/__main__.py: (pip uninstall scldm-census scldm)": "needs an environment with upstream's package",
    "pipeline/cli/doctor/packages.py: pip uninstall {} scldm": "needs an environment with upstream's package",
    "scldm/errors.py: {}: {} is not installed": "installs packages from a registry",
    "scldm/__init__.py: pip install '.[pipeline]'": "needs an environment without the pipeline",
    "scldm/api/training_run.py: scldm run jobs/evaluate.yaml": (
        "needs a trained pipeline whose cells were not evaluated"
    ),
    "pipeline/__main__.py: in a checkout of this project pip install '.[pipeline]', or make venv": (
        "installs packages from a registry"
    ),
    "pipeline/cli/doctor/machine.py: make venv, or pip install -c {}": "installs packages from a registry",
    "pipeline/cli/doctor/network.py: start the server with --allowed-hosts": "needs a server behind a name",
    "pipeline/config/paths/remote_models.py: {}: {} is not installed; pip install {}": (
        "installs packages from a registry"
    ),
    "pipeline/cli/doctor/report.py: a fault of scldm doctor; report it": "asks a person to write to us",
    "pipeline/data/inspection/sandbox.py: report this with the log: {}": "asks a person to write to us",
    "pipeline/cli/upstream/parity.py: run it in a clone of the repository": "needs an installation without a checkout",
    "pipeline/tracking/mlflow_runs/client.py: was started without --allowed-hosts": "needs a server behind a name",
    "pipeline/data/sources/census.py: names no mirror on S3; read a copy with type: soma": "needs a copy of the Census",
    "pipeline/training/callbacks/watchdog.py: raise train.step_timeout_s if a step does take this long": (
        "needs workers of Ray Train: tests/chaos/training"
    ),
    "pipeline/training/trainer.py: workers failed {} times and train.max_failures is {}": (
        "needs workers of Ray Train: tests/chaos/training"
    ),
    "pipeline/training/trainer.py: a worker failed {} times and train.max_failures is {}": (
        "needs a worker that is killed: tests/multiprocess/test_alone.py"
    ),
    "pipeline/training/engine/partitions.py: use another train.zero_stage": (
        "needs a DeepSpeed engine whose tensors lie elsewhere"
    ),
    "pipeline/training/tasks/flow.py: add {} to encode.splits": "needs workers of Ray Train",
    "pipeline/data/loading/order.py: widen ingest.obs_filter or give this split a share": (
        "pipeline/workflow/preflight.py refuses it first"
    ),
    "pipeline/data/loading/order.py: set feed.batch_size to {}": "pipeline/config/checks.py refuses it first",
    "pipeline/data/loading/order.py: set feed.lanes to {}": "pipeline/config/checks.py refuses it first",
    "pipeline/report/streamed.py: or generate the conditions of this one (generate.like)": "needs trained models",
    "pipeline/stages/evaluate.py: evaluate needs all of them, in order; generate without generate.genes": (
        "needs trained models"
    ),
    "pipeline/data/sources/tenx_files.py: set ingest.source.genome to one of": (
        "a file of Cell Ranger 2; the same setting is followed for version 3"
    ),
    "scldm/cells/shards.py: upgrade it": "needs a later version",
}

NO_ADVICE = (
    "pipeline/cli/verbs/output.py: --out {} is a folder",
    "pipeline/cli/verbs/output.py: --out {}: {} is a file",
    "pipeline/workflow/preflight.py: {}start_from.model ({})",
    "scldm/api/methods/real_cells.py: a likelihood of latents (flow=True)",
    "pipeline/workflow/preflight.py: ingest.labels has no label",
    "pipeline/data/ingest/label_values.py: {}: old cells (ingest.replay) have {}: {}",
    "scldm/checkpoints/upstream/inputs.py: none: library_size.json says so",
    "pipeline/cluster/needs.py: with resources.{}={}) and there are {}",
    "pipeline/inference/rows.py: name one in ingest.labels, or map it",
    "pipeline/cli/init/defaults.py: {} GPUs (--gpus)",
    "pipeline/cli/init/summary.py: not read (--no-counts)",
    "pipeline/cli/upstream/parity.py: known faults of upstream: --all",
    "pipeline/cluster/head.py: no head runs that `scldm cluster start` started",
    "pipeline/cluster/head.py: scldm cluster drain",
    "pipeline/data/ingest/measured.py: ingest.genes.presence masks nothing",
    "pipeline/data/sources/tenx_files.py: has no genome {} (ingest.source.genome)",
    "pipeline/data/soma/store.py: check ingest.source: uri, measurement and layer name an experiment",
    "pipeline/config/paths/remote_models.py: was not registered by `scldm mlflow register`",
    "pipeline/stages/training/model_card.py: `model.safetensors` holds the averaged weights",
    "pipeline/stages/training/model_card.py: by name: `vocabulary.json`",
    "pipeline/tracking/mlflow_runs/client.py: it was deleted permanently, or this is the address of another server",
    "pipeline/tracking/tracker.py: scldm mlflow sync cannot create the run",
    "scldm/nn/decoder.py: this decoder (adaln={})",
    "scldm/api/scoring.py: scores compare counts with counts",
)
