"""Transformers' continuous batching with a grammar for each request: where vLLM is not installed.

A padded batch runs until its slowest text ends; here a finished request makes room for the next one at once. On two
cores this wrote 32.5 tokens a second where padded batches wrote 14.2 (benchmarks/results/generation.cpu.json). Transformers
5.19 has no public way to give a request a grammar of its own: its list of processors is made from the generation
config. The list is plain, though, and its base class is told of every request's tokens before each step, so a processor
put into it can follow one matcher a request. That is the one private place used here, and a test runs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from speed_core import machine
from speed_core.data.replies import Completion
from speed_core.files import UserError
from speed_core.generation import top_p
from speed_core.generation.engines import Decoding, Request, grammar_schema
from speed_core.models import loading

# Sizes that the library reads from a GPU's memory; on a CPU they are given.
CPU_SIZES: dict[str, Any] = {"page_size": 256, "num_blocks": 256, "max_batch_tokens": 1024, "max_requests_per_batch": 64}


def grammar_processor(vocabulary: int) -> Any:
    """A processor that holds each request to `grammars[kind]`, where `kind` is a keyword of `add_request`."""
    import xgrammar
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

    class GrammarProcessor(ContinuousBatchingLogitsProcessor):
        supported_kwargs = {"kind": str}
        ignored_kwargs = ()

        def __init__(self) -> None:
            self.grammars: dict[str, Any] = {}
            self.matchers: dict[str, tuple[Any, int]] = {}  # request -> (matcher, tokens that it has accepted)

        def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
            # A row that stays as allocated allows every token: free text.
            self.mask = xgrammar.allocate_token_bitmask(len(requests_with_new_token), vocabulary)
            for row, request in enumerate(requests_with_new_token):
                state = request.state
                grammar = self.grammars.get(state.logit_processor_kwargs.get("kind", ""))
                if grammar is None:
                    continue
                matcher, taken = self.matchers.get(state.request_id) or (xgrammar.GrammarMatcher(grammar), 0)
                for token in state.generated_tokens[taken:]:
                    matcher.accept_token(token)
                self.matchers[state.request_id] = (matcher, len(state.generated_tokens))
                matcher.fill_next_token_bitmask(self.mask, row)
            return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

        def __call__(self, scores: Any, tensor_arg: torch.Tensor) -> Any:
            # Rows beyond the mask belong to no request: prompts of which only a part was read give no token yet.
            xgrammar.apply_token_bitmask_inplace(scores[: self.mask.shape[0]], self.mask.to(scores.device))
            return scores

    return GrammarProcessor()


class ContinuousEngine:
    """Requests in flight share each forward pass. Texts are seeded by job, not by request: they depend on the company."""

    name = "continuous"

    def __init__(self, model: str, adapter: Path | None = None, dtype: str = "auto"):
        self.tokenizer = loading.load_tokenizer(model)
        self.model = loading.prepack(loading.load_causal_lm(model, adapter, dtype).to(machine.device()))
        self._compiler: Any = None

    def _start(self, requests: Sequence[Request], decoding: Decoding) -> Any:
        import xgrammar
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        sampled: dict[str, Any] = {"do_sample": False}
        if decoding.temperature > 0:
            sampled = {"do_sample": True, "temperature": decoding.temperature, "top_p": 1.0, "top_k": 0}
        ends = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        settings = GenerationConfig(max_new_tokens=decoding.max_new_tokens, **sampled, **ends)
        sizes: dict[str, Any] = CPU_SIZES if self.model.device.type == "cpu" else {}
        manager = self.model.init_continuous_batching(settings, ContinuousBatchingConfig(seed=requests[0].seed, **sizes))
        grammar = grammar_processor(self.model.config.vocab_size)
        if decoding.constrained:
            if self._compiler is None:
                info = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=self.model.config.vocab_size)
                self._compiler = xgrammar.GrammarCompiler(info)
            for kind in {r.kind for r in requests if r.kind}:
                schema = json.dumps(grammar_schema(kind))
                grammar.grammars[kind] = self._compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        processors = manager.logit_processor
        processors.logits_processor.insert(0, grammar)
        if decoding.temperature > 0:
            processors.logits_processor.append(top_p.hf_processor(decoding.top_p))
        processors.do_processing, processors.tensors_required = True, 1
        processors._retrieve_processors_kwargs()
        manager.start()
        return manager

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]:
        manager, eos = self._start(requests, decoding), self.tokenizer.eos_token_id
        lengths = {}
        try:
            for r in requests:
                ids = loading.encode_prompt(self.tokenizer, r.text)
                lengths[r.id] = len(ids)
                manager.add_request(ids, request_id=r.id, kind=r.kind)
            left = len(requests)
            while left:
                out = manager.get_result(timeout=1)
                if out is None and not manager.is_running():
                    raise UserError("continuous batching: its thread ended; finished requests are logged, run again to go on")
                if out is None or not (out.error or out.is_finished()):
                    continue
                left -= 1
                if out.error:
                    yield Completion(out.request_id, str(out.error)[:200], "error", lengths[out.request_id], 0)
                    continue
                ended = eos in out.generated_tokens
                new = out.generated_tokens[: out.generated_tokens.index(eos)] if ended else out.generated_tokens
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                yield Completion(out.request_id, text, "stop" if ended else "length", lengths[out.request_id], len(new))
        finally:
            manager.stop(block=True, timeout=5)

    def close(self) -> None:
        del self.model
