"""The stages of the two papers as functions over a run, what a run would do, and what the papers claim.

stage              the registry: how a stage is declared, made and found
generation_stages  notebooks 01 to 06
mask_quality       notebook 07: what the mask removes, against labels of people
student_questions  notebook 07b: what the claims ask of the students
embedding_stages   notebooks 07b to 11
score_tables       notebook 09: scores side by side and their differences
comparisons        notebooks 10 to 12: what is compared, the line over sizes, the evidence
planning           every stage, why it would run, what it takes
forecast           time, memory and disk from the recorded run
gpu_plan           memory, hours and disk on GPUs, by formula
runs               open a run
claims             each claim, the evidence, a verdict by rule
paper_values       the numbers that the papers print
"""
