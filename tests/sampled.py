"""Answers of a generator that no notebook asks for."""

from speed_core.study.generator_answers import Ask


def sample(run, name, planned, generator):
    """Artifact `name`: outcomes of `generator` on prompts."""
    ask, used = Ask(planned), [a for a in [run.store.get(generator)] if a]
    with run.store.stage(name, ask.parameters(run, generator), used) as draft:
        if draft:
            ask.write(run, draft, name, generator)
    return run.store.need(name)
