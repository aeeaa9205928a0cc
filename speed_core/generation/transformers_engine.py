"""Transformers' `generate` in this process: where vLLM is not installed, and for little work."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
import xgrammar
from transformers import TemperatureLogitsWarper
from xgrammar.contrib.hf import LogitsProcessor as GrammarProcessor

from speed_core import machine
from speed_core.generation.engines import Completion, Decoding, Engine, Request, by_length, grammar_schema
from speed_core.generation.top_p import SeededNoise, TopPFilter
from speed_core.models import loading, packed


class TransformersEngine(Engine):
    """Padded batches, with requests sorted by length so that padding stays small."""

    name = "transformers"

    def __init__(self, model: str, adapter: Path | None = None, dtype: str = "auto", batch_size: int = 32):
        self.tokenizer = loading.load_tokenizer(model)
        self.model = packed.pack(loading.load_causal_lm(model, adapter, dtype).to(machine.device()))
        self.batch_size = batch_size
        self._compiler: xgrammar.GrammarCompiler | None = None

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Generator[Completion, None, None]:
        order = by_length(requests, self.tokenizer)
        pad, eos, device = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.model.device
        for start in range(0, len(order), self.batch_size):
            batch = list(order[start : start + self.batch_size])
            rows = [loading.encode_prompt(self.tokenizer, r.text) for r in batch]
            width = max(map(len, rows))
            with torch.no_grad():
                out = self.model.generate(
                    torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device),
                    attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device),
                    max_new_tokens=decoding.max_new_tokens,
                    pad_token_id=pad,
                    logits_processor=self._processors(batch, decoding),
                    do_sample=False,  # `_processors` sample; the model's own sampling defaults are not used
                )
            for request, row, full in zip(batch, rows, out[:, width:].tolist(), strict=True):
                ended = eos in full
                new = full[: full.index(eos)] if ended else full
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                yield Completion(request.id, text, "stop" if ended else "length", len(row), len(new))

    def _processors(self, batch: Sequence[Request], decoding: Decoding) -> list[Any]:
        """Grammar, temperature, nucleus, noise, in this order: the nucleus is taken of the tokens that the grammar allows."""
        out: list[Any] = []
        if decoding.constrained and any(r.kind for r in batch):
            out.append(GrammarProcessor([self._grammar(r.kind) for r in batch]))
        if decoding.temperature > 0:
            out += [TemperatureLogitsWarper(decoding.temperature), TopPFilter(decoding.top_p)]
            out.append(SeededNoise([r.seed for r in batch]))
        return out

    def _grammar(self, kind: str) -> xgrammar.CompiledGrammar:
        """The grammar of a kind. The compiler is made once: it reads 262,144 words, which takes longer than a step. It keeps what it
        has compiled."""
        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=self.model.config.vocab_size)
            self._compiler = xgrammar.GrammarCompiler(info)
        schema = json.dumps(grammar_schema(kind))
        return self._compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))

    def close(self) -> None:
        del self.model
