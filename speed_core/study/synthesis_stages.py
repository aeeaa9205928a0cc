"""Notebook 06: the synthesis, from the senior's answers to a data set, and what the teacher was asked for all of it (Table 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speed_core.data import curate, prompts
from speed_core.data.prompts import Prompt
from speed_core.files import Lazy, UserError, spooled, write_jsonl
from speed_core.generation import generate
from speed_core.models import loading
from speed_core.profile import dotted
from speed_core.store.artifacts import Artifact, Draft
from speed_core.store.run_context import Run
from speed_core.study import generation_stages
from speed_core.study.generator_answers import Ask, generated
from speed_core.study.stage import Kind, stage


def synthesis_prompts(run: Run) -> Lazy[Prompt]:
    """Prompts of the large-scale synthesis."""
    return generation_stages.plan(run, "synthesis", run.profile.synthesis.count)


@generated("raw", "06", "senior", work=lambda p: p.synthesis.count)
def raw(run: Run) -> Ask:
    """One sample of the senior for each synthesis prompt."""
    return Ask(synthesis_prompts(run))


@generated("revised", "06", "revisor", inputs=["raw"], work=lambda p: p.synthesis.count)
def revised(run: Run, raw: Artifact) -> Ask:
    """One revision of each valid sample."""
    return generation_stages.revision_of(raw, synthesis_prompts(run))


def to_records(run: Run, entries: Sequence[dict[str, Any]], planned: Sequence[Prompt], source: str) -> Lazy[dict[str, Any]]:
    """Records of the valid outcomes."""
    return spooled(
        curate.make_record(q, found, source=source, parent=e["id"] if source == "revised" else None, seed=e["seed"])
        for e, q in generation_stages.with_prompts(entries, planned)
        if (found := generate.outcome_of(e).record)
    )


def revised_records(run: Run, raw: Artifact, revised: Artifact, planned: Sequence[Prompt], source: str) -> Lazy[dict[str, Any]]:
    """Revised records; where the revision is no valid record the raw one stays, so nothing is lost to revision."""
    better = to_records(run, revised.stored(), planned, "revised")
    place = {r["id"]: i for i, r in enumerate(better)}
    return spooled(better[place[r["id"]]] if r["id"] in place else r for r in to_records(run, raw.stored(), planned, source))


def curated(run: Run, *read: Artifact, **keys: Any) -> dict[str, Any]:
    """Parameters of a data set."""
    return {"curate": dotted(run.profile.curate), "size": run.profile.evaluation.size}


def write_dataset(run: Run, draft: Draft, name: str, rows: Sequence[dict[str, Any]], how: str) -> None:
    """Fill a draft with curated records as a folder that `datasets.load_dataset` opens, plus what was dropped."""
    from speed_core.evaluation.offline_tasks import offline_texts

    texts = offline_texts(run.profile.evaluation.size) if "offline" in run.profile.evaluation.tasks else {}
    kept, dropped = curate.curate(rows, run.profile.curate, texts)
    curate.write_dataset(draft.path, kept, title=f"Synthetic embedding data, {name} ({run.profile.name})", how=how)
    write_jsonl(draft.file("dropped.jsonl"), dropped)
    draft.info |= {"kept": len(kept), "dropped": len(dropped)}


@stage("synthetic", Kind.DATA, "06", inputs=["raw", "revised"], parameters=curated)
def synthetic(run: Run, draft: Draft, raw: Artifact, revised: Artifact) -> None:
    """The data set of the paper's recipe: samples of the senior, revised, curated."""
    how = "Written by the senior generator and revised once, as in SPEED; see notebook 06."
    write_dataset(run, draft, "synthetic", revised_records(run, raw, revised, synthesis_prompts(run), "senior"), how)


# --- Table 5 -----------------------------------------------------------------------------------------


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
    for purpose, planned in (
        ("brainstorm", generation_stages.brainstorm_prompts(run)),
        ("seed", generation_stages.seed_plan(run)),
    ):
        text = {q.id: q.text for q in planned}
        rows = [e for e in run.store.need(asked[purpose]).rows() if e["status"] != "error" and e["record"] in text]
        texts[purpose] = [(text[e["record"]], e["raw"]) for e in rows]
    texts["revision"] = [(prompts.revise(r["prompt"], r["weak"]), r["answer"]) for r in generation_stages.revision_rows(run)]
    tokenizer = loading.load_tokenizer(run.profile.models.generator)

    def tokens(column: Sequence[str]) -> int:
        return sum(map(len, tokenizer(list(column), add_special_tokens=False)["input_ids"])) if column else 0

    return {
        p: {"calls": len(texts[p])} | {k: tokens([pair[i] for pair in texts[p]]) for i, k in enumerate(("input", "output"))}
        for p in asked
    }
