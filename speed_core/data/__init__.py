"""Records and prompts, the teacher that writes them, and the way from raw texts to a training set.

records   the five kinds of example; the parser through which all model text passes
prompts   every prompt of the pipeline, and the topics
tasks     from topics to tasks to requests
teacher   recorded answers or an endpoint in the place of GPT-4o; budget and log
endpoint  an OpenAI-compatible server: retries, waits, refusals
limits    concurrency, requests and tokens a minute
minhash   near-duplicates
curate    deduplicated, decontaminated, written as a data set
"""
