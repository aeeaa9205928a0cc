"""The stages of the two papers as functions over a run, what a run would do, and what the papers claim.

stage              the registry: how a stage is declared, made and found
generation_stages  notebooks 01 to 05: the teacher's data, the three generators
generator_answers  what a generator is asked, and what answers
synthesis_stages   notebook 06
mask_quality       notebook 07: what the mask removes, against labels of people
student_stages     notebook 07b: small encoders
student_questions  notebook 07b: what the claims ask of the students
embedding_stages   notebooks 08, 10 and 11: the embedding models
score_stages       notebooks 07b to 11: scores of all of them
ablation_stages    notebook 10: the data sets that are compared
comparisons        notebooks 10 to 12: what is compared, the line over sizes, the evidence
planning           every stage, why it would run, what it takes
forecast           time, memory and disk from the recorded run
gpu_plan           memory, hours and disk on GPUs, by formula
runs               open a run
claims             each claim and its evidence
verdicts           a verdict by rule
gates              did the treatments act
paper_values       the numbers that the papers print
"""
