"""Records and prompts, the teacher that writes them, and the way from raw texts to a training set.

records           the five kinds of example; the parser through which all model text passes
prompts           every prompt of the pipeline, and the topics
tasks             from topics to tasks to requests
teacher           what a teacher is; recorded answers in the place of GPT-4o
endpoint_teacher  a teacher behind an OpenAI-compatible endpoint
budget            calls, tokens and money of a stage: caps, and what is spent
asking            many prompts to a teacher, one logged outcome each
endpoint          an OpenAI-compatible server: calls, tries, waits
replies           what a server says: completions, refusals, waits
limits            concurrency, requests and tokens a minute
minhash           near-duplicates
curate            deduplicated, decontaminated, written as a data set
"""
