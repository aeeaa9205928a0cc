"""What the papers print: the numbers that figures and verdicts compare with, and where each stands.

SPEED is arXiv 2410.18634, E5-mistral arXiv 2401.00368: 7B models. GISTEmbed is arXiv 2402.16829: encoders of 33M to 335M parameters.
Scores are points (0-100) on MTEB's 56 English tasks, differences are in points.
"""

# SPEED, Table 1: trained on synthetic data alone. Categories as mteb's tables abbreviate them.
SPEED_SCORES = {
    "Class.": 78.3, "Clust.": 48.6, "Pair": 86.3, "Rerank": 59.8, "Retr.": 48.1, "STS": 82.6, "Summ.": 31.7, "Avg": 63.4,
}  # fmt: skip

# SPEED, Table 2: average score of 230K records by the generators that wrote them, minus that of the junior alone (62.6); the base model
# (61.0, an instruction-tuned one) and the teacher (62.2) are Table 1's at 230K.
MINUS_JUNIOR = {"jr_re": 0.2, "sr": 0.3, "sr_re": 0.6, "base": -1.6, "teacher": -0.4}

# SPEED, Tables 1 and 2: (records, score) of SPEED's own data.
SCORE_BY_RECORDS = ((230_000, 63.2), (920_000, 63.4))

# SPEED, Table 3: score at a value of task brainstorming minus that of one task per topic with truncated topics (62.6).
TASKS_PER_TOPIC = ((3, -1.0), (5, -1.7))
TOPICS_NOT_TRUNCATED = -0.8

# SPEED, Table 4: score of three other base models (Qwen-2.5-7B, LLaMA-2-7B, Gemma-7B) minus that of LLaMA-3-8B.
OTHER_BASE_MODELS = (-0.1, -0.2, -0.3)

# SPEED, Table 5: (calls of GPT, its tokens) for the seed data, the preference pairs and the revisions, without brainstorming; and the sums
# for each of its 920K records, and of E5-mistral's 500K.
SPEED_CALLS = {"seed": (25_000, 10_000_000), "preference": (10_000, 12_000_000), "revision": (10_000, 10_000_000)}
SPEED_A_RECORD = (45_000 / 920_000, 32_000_000 / 920_000)
E5_A_RECORD = (500_000 / 500_000, 180_000_000 / 500_000)

# SPEED, section 4.1 and Table 6: share of the raw records that MinHash leaves, of all and by kind, from the printed counts and 1.15M raw
# records at 7:7:7:2.
KEPT = 0.80
SHARE_KEPT = {"classification": 0.70, "sts": 0.84, "retrieval": 0.87, "short_short": 0.77, "long_long": 0.77}

# GISTEmbed, model cards: the mean over its small, base and large model of its score minus that of the model it was trained from.
GUIDED_GAIN = {
    "all tasks": 0.27, "Retrieval": -1.01, "Reranking": 0.24, "Classification": 0.84, "Clustering": 0.64, "STS": 1.34,
}  # fmt: skip

# E5-mistral, Table 5 (synthetic data and MSMARCO): with instructions minus without; mean pooling minus last-token pooling.
INSTRUCTIONS_GAIN = {
    "all tasks": 4.2, "Retrieval": 4.0, "Reranking": 3.2, "Classification": 6.0, "Clustering": 2.8, "STS": 4.5,
}  # fmt: skip
MEAN_POOLING = -0.4

# The effect that a claim of notebook 12 rests on, in points: what the papers print, or the middle of what they print (of S6 the smallest
# of its steps, of G2 small minus large, of G3 STS minus all tasks).
EFFECTS = {
    "S1": 0.3, "S2": -0.1, "S4": 1.9, "S5": 1.0, "S6": 0.1, "S7": 0.25, "S8": 0.35, "S9": 1.35, "S10": 0.8, "S17": 0.1,
    "E2": 2.0, "E3": 4.2, "G1a": 0.27, "G1b": 0.27, "G2": 0.46, "G3": 1.1, "G4": -7.0,
}  # fmt: skip

# What the papers print beside each claim of notebook 12, in words, with the table or section of it.
PRINTED = {
    "S1": "63.4 against 63.1",  # SPEED, Table 1
    "S2": "66.5 against 66.6",  # SPEED, Table 1
    "S3": "45K/500K calls, 32M/180M tokens",  # SPEED, Table 5
    "S4": "61.0 against 62.6 (Jr) and 63.2",  # SPEED, Tables 1 and 2
    "S5": "62.2 against 63.2",  # SPEED, Tables 1 and 2
    "S6": "62.6 < 62.8 < 62.9 < 63.2",  # SPEED, Table 2
    "S7": "+0.2 on Jr, +0.3 on Sr",  # SPEED, Table 2
    "S8": "+0.3 without Re, +0.4 with it",  # SPEED, Table 2
    "S9": "62.6 / 61.6 / 60.9",  # SPEED, Table 3
    "S10": "62.6 against 61.8",  # SPEED, Table 3
    "S11": "62.6 / 62.5 / 62.4 / 62.3",  # SPEED, Table 4
    "S12": "Fig. 3a, at 1.0",  # SPEED, Fig. 3a
    "S13": "Fig. 3b, 25K",  # SPEED, Fig. 3b
    "S14": "Fig. 3c, at 0.1",  # SPEED, Fig. 3c
    "S15": "Fig. 3d, 10K",  # SPEED, Fig. 3d
    "S16": "Fig. 3e, 10K",  # SPEED, Fig. 3e
    "S17": "63.2 @230K, 63.4 @920K",  # SPEED, Tables 1 and 2
    "S18": "no number",
    "S19": "no experiment",  # SPEED, section 3.3
    "S20": "no experiment",  # SPEED, Limitations
    "S21": "no run without topics",  # SPEED, section 3.2.1
    "S22": "1.15M to 920,415 (classification 245,947, STS 294,388, retrieval 303,424, short matching 39,954, long 36,702)",  # SPEED, section 4.1 and Table 6
    "E1": "63.1",  # E5-mistral, Table 1
    "E2": "64.6 to 66.6",  # E5-mistral, Tables 1 and 5
    "E3": "64.5 to 60.3 without",  # E5-mistral, Table 5
    "E4": "pooling -0.4 and -0.5, rank +0.3 and +0.1",  # E5-mistral, Table 5
    "E5": "+0.1",  # E5-mistral, Table 7
    "G1a": "+0.56 / +0.16 / +0.10",  # GISTEmbed, model cards
    "G1b": "the same numbers",  # GISTEmbed, model cards
    "G2": "the same numbers",  # GISTEmbed, model cards
    "G3": "+1.4 / +1.1 / +1.5",  # GISTEmbed, model cards
    "G4": "TRECCOVID -6.8 / -8.5 / -5.7",  # GISTEmbed, model cards
    "G5": "no number",
    "G6": "no number",
    "G7": "guide 64.64, students 62.7-64.3",  # GISTEmbed, model cards
    "G8": "11 of 12 train sets used",  # GISTEmbed, model cards
    "G9": "no number",
}  # fmt: skip

# What the papers say of each parameter that a sweep varies, in words.
SWEPT = {
    "temperature": "1.0 chosen of 0.2-1.5",  # SPEED, Fig. 3a
    "seed examples": "25K chosen of 5K-100K",  # SPEED, Fig. 3b
    "beta of DPO": "0.1 best of 0.05-0.3",  # SPEED, Fig. 3c
    "preference pairs": "10K chosen of 5K-15K",  # SPEED, Fig. 3d
    "revisions": "10K chosen of 5K-50K",  # SPEED, Fig. 3e
    "tasks per topic": "62.6, 61.6, 60.9 at 1, 3, 5",  # SPEED, Table 3
    "topics truncated": "62.6 with, 61.8 without",  # SPEED, Table 3
    "base model": "-0.1, -0.2, -0.3 for three others",  # SPEED, Table 4
    "LoRA rank": "+0.3, 0, +0.1 at 8, 16, 32",  # E5-mistral, Table 5
    "pooling": "mean -0.4",  # E5-mistral, Table 5
}
