"""Scores and what they are worth: mteb tasks, intervals, overlap with the training texts.

encoder        a model as mteb sees it, named by its digest
evaluate       scores of a model on tasks by name
items          the values behind a score, one a text
local_data     MTEB's data sets from a local folder
offline_tasks  mteb tasks from texts inside Python packages
text_sources   these texts
resampling     one task's score under resampling
uncertainty    intervals over texts and seeds
contamination  overlap with the evaluation texts
"""
