"""The stages of the paper as functions over a `Run`: each makes one artifact, or finds it current.

A stage names everything that decides its result (`parameters`) and the artifacts it reads
(`parents`); the store makes it again only when one of them changed, and says which.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from speed_core import console
from speed_core.data import curate, prompts, records, tasks, teacher
from speed_core.data.prompts import Prompt
from speed_core.files import UserError, write_json, write_jsonl
from speed_core.generation import generate, sft
from speed_core.models import compute_type, loading, training
from speed_core.preference import judge
from speed_core.profile import Training, dotted
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run

RUBRIC_GUIDE = "package:all-MiniLM-L6-v2"  # of the recorded runs; with another one the pairs are others


def topics(run: Run) -> tuple[list[str], list[str]]:
    """(topics for data, held-out topics), as paths; the last `held_out` of the list never give data."""
    everything = prompts.load_topics()
    t = run.profile.topics
    if t.count > len(everything):
        raise UserError(f"topics.count {t.count}: the list has {len(everything)}; lower it or add topics")
    return everything[: t.count - t.held_out], everything[-t.held_out :]


def names(run: Run, paths: Sequence[str]) -> list[str]:
    """Topic names as the prompts use them: truncated unless the profile says otherwise."""
    t = run.profile.topics
    return [prompts.truncate_topic(p, t.max_depth) if t.truncate else p for p in paths]


# --- 01, 02: the teacher -------------------------------------------------------------------------


def brainstorm_prompts(run: Run) -> list[Prompt]:
    """Brainstorm prompts of the data topics and the held-out ones."""
    everything = prompts.load_topics()
    used = {*topics(run)[0], *topics(run)[1]}
    p, t = run.profile.prompts, run.profile.topics
    how = t.model_dump(include={"max_depth", "truncate", "tasks_per_topic"})
    planned = tasks.plan_brainstorm(everything, **how, style=p.style, clone=p.clone)
    wanted = set(names(run, sorted(used)))
    return [q for q in planned if q.topic in wanted]


def brainstorm(run: Run) -> Artifact:
    """Artifact `tasks`: the teacher's answers to the brainstorm prompts."""
    planned = brainstorm_prompts(run)
    who = run.profile.teacher
    parameters = {"prompts": prompts.text_digest("".join(q.digest for q in planned)), "teacher": who.deciding()}
    with run.store.stage("tasks", parameters) as draft:
        if draft:
            t = teacher.open_teacher(who, run.replay)
            entries = teacher.ask(
                t, planned, purpose="brainstorm", log=run.log("tasks"), parse=teacher.parse_tasks, attempts=who.attempts
            )
            write_jsonl(draft.file("data.jsonl"), entries)
            write_json(draft.file("ledger.json"), teacher.spent(run.log("tasks"), planned, "brainstorm", who))
            draft.info |= {"teacher": t.label, "outcomes": generate.counts(entries), "partial": teacher.unanswered(entries)}
    return run.store.need("tasks")


def task_table(artifact: Artifact) -> dict[tuple[str, str], list[str]]:
    """(kind, topic) -> tasks, of every readable brainstorm answer."""
    table = {}
    for e in artifact.rows():
        found, why = records.parse_string_list(e["raw"], e["finish_reason"])
        if not why:
            table[e["kind"], e["topic"]] = found
    return table


def plan(run: Run, stage: str, count: int, *, held_out: bool = False) -> list[Prompt]:
    """Synthesis prompts of a stage, from the data topics (or the held-out ones)."""
    p, t = run.profile.prompts, run.profile.topics
    return tasks.plan_synthesis(
        stage,
        count,
        names(run, topics(run)[1 if held_out else 0]),
        task_table(run.store.need("tasks")),
        tasks_per_topic=t.tasks_per_topic,
        attributes=p.attributes,
        data_seed=run.profile.data_seed,
        style=p.style,
        clone=p.clone,
    )


def seed_plan(run: Run) -> list[Prompt]:
    """Prompts of the seed data.

    Recorded answers exist for the plan over all 60 data topics, their paths truncated; a smaller profile takes the first of
    those prompts (they are in order of record id, so any prefix mixes the kinds).
    """
    if run.profile.teacher.kind != "recorded":
        return plan(run, "seed", run.profile.seeds)
    known = {row["record"] for row in teacher.recorded_rows("seeds")}
    table = {(r["kind"], r["topic"]): json.loads(r["answer"]) for r in teacher.recorded_rows("tasks")}
    everything = [prompts.truncate_topic(path) for path in prompts.load_topics()[:60]]
    full = tasks.plan_synthesis("seed", len(known), everything, table, attributes=run.profile.prompts.attributes)
    if run.profile.seeds > len(full):
        raise UserError(f"seeds {run.profile.seeds}: the recorded teacher has {len(full)}; lower it or use an endpoint")
    return full[: run.profile.seeds]


def seed_data(run: Run) -> Artifact:
    """Artifact `seeds`: the teacher's examples, one outcome a prompt."""
    planned, parent, who = seed_plan(run), run.store.need("tasks"), run.profile.teacher
    parameters = {"prompts": prompts.text_digest("".join(q.digest for q in planned)), "teacher": who.deciding()}
    with run.store.stage("seeds", parameters, [parent]) as draft:
        if draft:
            t = teacher.open_teacher(who, run.replay)
            entries = teacher.ask(t, planned, purpose="seed", log=run.log("seeds"), attempts=who.attempts)
            write_jsonl(draft.file("data.jsonl"), entries)
            write_json(draft.file("ledger.json"), teacher.spent(run.log("seeds"), planned, "seed", who))
            draft.info |= {"teacher": t.label, "outcomes": generate.counts(entries), "partial": teacher.unanswered(entries)}
    return run.store.need("seeds")


# --- 03 to 05: the three generators ---------------------------------------------------------------


def junior(run: Run) -> Artifact:
    """Artifact `junior`: LoRA adapter of the base, trained on the seeds (Eq. 1)."""
    seeds, settings = run.store.need("seeds"), run.profile.junior
    with run.store.stage("junior", _training(run, settings), [seeds]) as draft:
        if draft:
            draft.info |= _computed(run, settings)
            text = {q.id: q.text for q in seed_plan(run)}
            pairs = [
                (text[e["record"]], generate.text_of(e)) for e in seeds.rows() if e["status"] == "ok" and e["record"] in text
            ]
            sft.train(run.profile.models.generator, pairs, settings, seed=run.profile.seed, output=draft.path, label="junior")
    return run.store.need("junior")


def _training(run: Run, settings: Training) -> dict[str, Any]:
    return {
        "training": dotted(settings),
        "seed": run.profile.seed,
        "base": loading.model_id(run.profile.models.generator),
    }


def _computed(run: Run, settings: Training) -> dict[str, str]:
    folder = loading.resolve(run.profile.models.generator)
    return compute_type.facts(compute_type.choose(settings.dtype, training=True, folder=folder).name)


def sample(
    run: Run,
    name: str,
    planned: Sequence[Prompt],
    generator: str,
    *,
    candidates: int = 1,
    constrained: bool | None = None,
    text: dict[str, str] | None = None,
    parents: Sequence[Artifact] = (),
) -> Artifact:
    """Artifact `name`: outcomes of `generator` ("base", "junior", "senior", "revisor") on prompts.

    `candidates` > 1 gives ids "RECORD#k" with a seed each. `text` replaces what is read for a record id
    (the revisor reads prompt and sample).
    """
    g = run.profile.generation
    decoding = generate.Decoding(g.temperature, g.top_p, g.max_new_tokens, g.constrained if constrained is None else constrained)
    dtype = "auto" if g.engine == "server" else g.dtype  # a server computes in its own
    requests = []
    for q in planned:
        for k in range(candidates):
            rid = f"{q.id}#{k}" if candidates > 1 else q.id
            body = training.prompt_text((text or {}).get(q.id, q.text))
            seed = int(prompts.text_digest(f"{rid}|{run.profile.seed}")[:8], 16) & 0x7FFFFFFF
            requests.append(generate.Request(rid, body, q.kind, seed))
    parameters = {
        "prompts": prompts.text_digest("".join(r.id + r.text for r in requests)),
        "decoding": dataclasses.asdict(decoding),
        "generator": generator,
        "seed": run.profile.seed,
        "dtype": dtype,
    } | ({"attempts": g.attempts} if g.attempts > 1 else {})
    made = [a for a in [run.store.get(generator)] if a]
    with run.store.stage(name, parameters, [*made, *parents]) as draft:
        if draft:
            if run.replay:
                entries = generate.replay(requests, run.log(name), decoding, g.attempts, dtype)
            else:
                entries = _generate(run, requests, generator, decoding, name)
                if g.engine != "server" and g.executor == "process":  # others know best what they compute in
                    folder = loading.resolve(run.profile.models.generator)
                    draft.info |= compute_type.facts(compute_type.choose(dtype, folder=folder).name)
            write_jsonl(draft.file("data.jsonl"), entries)
            draft.info |= {"outcomes": generate.counts(entries), "new_tokens": sum(e["new_tokens"] for e in entries)}
    return run.store.need(name)


def _generate(
    run: Run, requests: Sequence[generate.Request], generator: str, decoding: generate.Decoding, name: str
) -> list[dict[str, Any]]:
    """Answer requests with the engine of the profile; the log is the artifact's name."""
    g, base = run.profile.generation, run.profile.models.generator
    common: dict[str, Any] = {"log": run.log(name), "decoding": decoding, "label": name, "attempts": g.attempts}
    if g.engine == "server":
        from speed_core.generation.server_engine import ServerEngine

        # The server holds the weights; an adapter that was made here is named by its digest all the same.
        made = run.store.get(generator) if generator != "base" else None
        model_id = f"server:{base}{loading.settings_id(base)}+{loading.weights_id(made.weights()) if made else generator}"
        served = ServerEngine(g.base_url, base if generator == "base" else generator, base, concurrency=g.concurrency)
        try:
            return generate.run(requests, model=base, model_id=model_id, engine=served, **common)
        finally:
            served.close()
    base, adapter = generator_weights(run, generator)
    common |= {"dtype": g.dtype, "max_length": g.max_length, "batch_size": g.batch_size}
    common |= {"workers": g.workers if g.executor == "ray" else 0, "ray_address": g.ray_address}
    return generate.run(requests, model=base, adapter=adapter, engine=g.engine, **common)


def generator_weights(run: Run, generator: str) -> tuple[str, Any]:
    """(base name or folder, adapter folder or None) of one of the four generators."""
    base = run.profile.models.generator
    if generator == "base":
        return base, None
    adapter = run.store.need(generator).weights()
    if generator == "senior":
        from speed_core.preference import dpo

        return dpo.starting_point(base, run.store.need("junior").weights()), adapter
    return base, adapter


def guide(run: Run) -> Any:
    """The guide model (a SentenceTransformer)."""
    console.quiet()
    return loading.sentence_transformer(run.profile.models.guide, "float32")


def rubric(run: Run, entries: Sequence[dict[str, Any]] = (), planned: Sequence[Prompt] = ()) -> judge.RubricJudge:
    """The rubric judge, with the texts of `entries` embedded in one pass."""
    j = judge.RubricJudge(guide(run))
    found = [generate.outcome_of(e).record for e in entries]
    j.warm([t for r in found if r for t in r.values() if t] + [q.task if q.kind != "sts" else q.topic for q in planned])
    return j


def preferences(run: Run, root: Artifact, planned: Sequence[Prompt]) -> Artifact:
    """Artifact `pairs`: best and worst of each prompt's candidates, with the judge's reason."""
    who = run.profile.teacher
    by: dict[str, Any] = {"weights": judge.RubricJudge.WEIGHTS} if who.judge == "rubric" else {"teacher": who.deciding()}
    if who.judge == "rubric" and run.profile.models.guide != RUBRIC_GUIDE:
        by["guide"] = loading.named(run.profile.models.guide)
    with run.store.stage("pairs", {"judge": who.judge, **by}, [root]) as draft:
        if draft:
            entries = root.rows()
            groups: dict[str, list[dict[str, Any]]] = {}
            for e in entries:
                groups.setdefault(e["record"].partition("#")[0], []).append(e)
            items = [(q, groups[q.id]) for q in planned if q.id in groups]
            if who.judge == "llm":
                decide: Any = judge.LlmJudge(teacher.open_teacher(who, run.replay), run.log("judge"), who.judge_temperature)
                questions = [(q, [records.own_text(e["raw"], q.kind) for e in group]) for q, group in items]
                draft.info["partial"] = decide.ask(questions)
                spent = teacher.spent(run.log("judge"), decide.questions(questions), "judge", who)
                write_json(draft.file("ledger.json"), spent)
            else:
                decide = rubric(run, entries, planned)
            pairs, count = judge.make_pairs(decide, items)
            write_jsonl(draft.file("data.jsonl"), pairs)
            write_json(draft.file("counts.json"), count)
            draft.info |= {"judge": decide.label, "counts": count, "audit": getattr(decide, "audit", {})}
    return run.store.need("pairs")


def senior(run: Run) -> Artifact:
    """Artifact `senior`: DPO from the junior (Eq. 2)."""
    from speed_core.preference import dpo

    junior_, pairs = run.store.need("junior"), run.store.need("pairs")
    with run.store.stage("senior", _training(run, run.profile.senior), [junior_, pairs]) as draft:
        if draft:
            draft.info |= _computed(run, run.profile.senior)
            dpo.train(
                run.profile.models.generator,
                junior_.weights(),
                pairs.rows(),
                run.profile.senior,
                seed=run.profile.seed,
                output=draft.path,
                cache=run.folder / "dpo",
            )
    return run.store.need("senior")


def revision_rows(run: Run) -> list[dict[str, Any]]:
    """Rows {kind, task, prompt, weak, answer}: what the revisor learns from.

    Recorded: weak samples drawn once from an early junior, rewritten by this repository's authors. With an endpoint:
    the first valid candidate of each root prompt, revised by the teacher (SPEED section 3.2.4), logged like any answer.
    """
    count, who = run.profile.revisor.examples, run.profile.teacher
    if who.kind == "recorded":
        return [dict(r) for r in teacher.recorded_rows("revisions")][:count]
    planned = {q.id: q for q in plan(run, "root", run.profile.senior.prompts)}
    root = run.store.need("root")
    weak: dict[str, str] = {}
    for e in root.rows():
        if e["status"] == "ok":
            weak.setdefault(e["record"].split("#")[0], generate.text_of(e))
    with run.store.stage("revisions", {"teacher": who.deciding(), "count": count}, [root]) as draft:
        if draft:
            items = [
                dataclasses.replace(planned[rid], id=f"{rid}/revise", text=prompts.revise(planned[rid].text, text))
                for rid, text in list(weak.items())[:count]
            ]
            t = teacher.open_teacher(who, run.replay)
            entries = teacher.ask(t, items, purpose="revise", log=run.log("revisions"), attempts=who.attempts)
            write_jsonl(draft.file("data.jsonl"), entries)
            write_json(draft.file("ledger.json"), teacher.spent(run.log("revisions"), items, "revise", who))
            draft.info |= {"teacher": t.label, "outcomes": generate.counts(entries), "partial": teacher.unanswered(entries)}
    return [
        {"kind": e["kind"], "task": e["task"], "prompt": planned[rid].text, "weak": weak[rid], "answer": generate.text_of(e)}
        for e in run.store.need("revisions").rows()
        if e["status"] == "ok" and (rid := e["record"].removesuffix("/revise"))
    ]


def teacher_use(run: Run) -> dict[str, dict[str, int]]:
    """Table 5 of this run: {brainstorm, seed, preference, revision: {calls, input, output}}, the last two in tokens.

    An endpoint's own counts. Recorded answers have none: theirs are those of the generator's tokenizer. A rubric asks nobody.
    """
    asked = {"brainstorm": "tasks", "seed": "seeds", "preference": "pairs", "revision": "revisions"}
    if run.profile.teacher.kind != "recorded":
        out = {}
        for purpose, name in asked.items():
            a = run.store.get(name)
            if a and name == "pairs" and run.profile.teacher.judge == "llm" and "ledger.json" not in a.manifest["files"]:
                raise UserError(
                    "pairs: made before its calls were counted; remove its folder and run notebook 04 again (from its log)"
                )
            rows = a.json("ledger.json").values() if a and "ledger.json" in a.manifest["files"] else ()
            counted = (("calls", "calls"), ("input", "input_tokens"), ("output", "output_tokens"))
            out[purpose] = {k: sum(int(r[key]) for r in rows) for k, key in counted}
        return out
    texts: dict[str, list[tuple[str, str]]] = {"preference": []}
    for purpose, planned in (("brainstorm", brainstorm_prompts(run)), ("seed", seed_plan(run))):
        text = {q.id: q.text for q in planned}
        rows = [e for e in run.store.need(asked[purpose]).rows() if e["status"] != "error" and e["record"] in text]
        texts[purpose] = [(text[e["record"]], e["raw"]) for e in rows]
    texts["revision"] = [(prompts.revise(r["prompt"], r["weak"]), r["answer"]) for r in revision_rows(run)]
    tokenizer = loading.load_tokenizer(run.profile.models.generator)

    def tokens(column: Sequence[str]) -> int:
        return sum(map(len, tokenizer(list(column), add_special_tokens=False)["input_ids"])) if column else 0

    return {
        p: {"calls": len(texts[p])} | {k: tokens([pair[i] for pair in texts[p]]) for i, k in enumerate(("input", "output"))}
        for p in asked
    }


def revisor(run: Run) -> Artifact:
    """Artifact `revisor`: SFT from the unaligned base on (prompt, weak sample) -> revision (Eq. 3)."""
    rows = revision_rows(run)
    if not rows:
        raise UserError(
            "revisions: none; restore assets/recorded/revisions.jsonl, or let notebook 04 write root data for the endpoint"
        )
    pairs = [(prompts.revise(r["prompt"], r["weak"]), r["answer"]) for r in rows]
    parameters = _training(run, run.profile.revisor) | {"data": prompts.text_digest("".join(a + b for a, b in pairs))}
    with run.store.stage("revisor", parameters) as draft:
        if draft:
            draft.info |= _computed(run, run.profile.revisor)
            sft.train(
                run.profile.models.generator,
                pairs,
                run.profile.revisor,
                seed=run.profile.seed,
                output=draft.path,
                label="revisor",
            )
    return run.store.need("revisor")


# --- 06: synthesis --------------------------------------------------------------------------------


def revise(run: Run, name: str, raw: Artifact, planned: Sequence[Prompt]) -> Artifact:
    """Artifact `name`: one revision of every valid record of `raw` (one pass, as in the paper)."""
    by_id = {q.id: q for q in planned}
    good = [e for e in raw.rows() if e["status"] == "ok"]
    text = {e["record"]: prompts.revise(by_id[e["record"]].text, generate.text_of(e)) for e in good}
    return sample(run, name, [by_id[e["record"]] for e in good], "revisor", text=text, parents=[raw])


def to_records(run: Run, entries: Sequence[dict[str, Any]], planned: Sequence[Prompt], source: str) -> list[dict[str, Any]]:
    """Records of the valid outcomes."""
    by_id = {q.id: q for q in planned}
    out = []
    for e in entries:
        found = generate.outcome_of(e).record
        if found:
            parent = e["id"] if source == "revised" else None
            out.append(curate.make_record(by_id[e["record"]], found, source=source, parent=parent, seed=e["seed"]))
    return out


def revised_records(run: Run, raw: Artifact, revised: Artifact, planned: Sequence[Prompt], source: str) -> list[dict[str, Any]]:
    """Revised records; where the revision is no valid record the raw one stays, so nothing is lost to revision."""
    better = {r["id"]: r for r in to_records(run, revised.rows(), planned, "revised")}
    return [better.get(r["id"], r) for r in to_records(run, raw.rows(), planned, source)]


def teacher_records(run: Run) -> list[dict[str, Any]]:
    """The teacher's examples as records, in the order of their ids, which mixes the kinds."""
    by_id = {q.id: q for q in seed_plan(run)}
    found = [(e, generate.outcome_of(e).record) for e in run.store.need("seeds").rows()]
    return [curate.make_record(by_id[e["record"]], r, source="teacher", parent=None, seed=0) for e, r in found if r]


def dataset(run: Run, name: str, rows: Sequence[dict[str, Any]], parents: Sequence[Artifact], how: str) -> Artifact:
    """Artifact `name`: curated records as a folder that `datasets.load_dataset` opens, plus what was dropped."""
    from speed_core.evaluation.offline_tasks import offline_texts

    with run.store.stage(name, {"curate": dotted(run.profile.curate), "size": run.profile.evaluation.size}, parents) as draft:
        if draft:
            texts = offline_texts(run.profile.evaluation.size) if "offline" in run.profile.evaluation.tasks else {}
            kept, dropped = curate.curate(rows, run.profile.curate, texts)
            curate.write_dataset(draft.path, kept, title=f"Synthetic embedding data, {name} ({run.profile.name})", how=how)
            write_jsonl(draft.file("dropped.jsonl"), dropped)
            draft.info |= {"kept": len(kept), "dropped": len(dropped)}
    return run.store.need(name)
