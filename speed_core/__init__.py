"""SPEED, step by step: a thin package behind the notebooks. The folders stand in the order of the data.

    profile      sizes and settings, validated (profiles/*.json)
    data         records, prompts, topics, the teacher, near-duplicates
    models       find, load, identify; the compute type; log-probabilities
    generation   the junior and senior generators write (SPEED Eq. 1 and 3)
    preference   the judge, pairs, DPO (SPEED Eq. 2)
    contrastive  the guided contrastive loss (GISTEmbed) and the embedding model
    evaluation   mteb scores, intervals, contamination
    study        the stages, the plan, the claims, the papers' numbers
    plots        figures and where they come from
    runner       notebooks run headlessly, sweeps, preflight, archives
    store        artifacts and runs on disk
    reference    the papers' equations, each as short as it can be read
    files, machine, console, settings   the ground floor

Imports run one way, from `__main__` through runner, plots, study, evaluation to the three folders of the papers, data and models, store,
profile (`pyproject.toml`, import-linter). Each folder's `__init__.py` says what its files hold.
"""

__version__ = "0.1.0"
