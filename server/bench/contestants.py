"""Ways to generate the same text, timed alike: this engine, transformers, llama.cpp."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from server.engine.completion import generate
from server.engine.engine import Engine
from server.engine.request import EngineError, FinishReason, Request, SamplingParams
from server.placement.machine import compute_threads
from server.targets.llama_cpp.library import ContextOptions, LlamaCppError, try_out
from server.targets.packed_model import BITS, is_packed
from server.targets.torch_target import WEIGHTS

GREEDY = SamplingParams(temperature=0)
GREEDY_CHOICE = {"top_k": 1, "temp": 0.0}
LLAMA_CPP, LLAMA_CPP_LOOKUP = "llama.cpp", "llama.cpp-lookup"


class PeerUnavailable(RuntimeError):
    """A peer cannot take part on this machine; the message says why and how to change that."""


@dataclass(frozen=True)
class Case:
    """One text to generate: at most ``max_tokens`` after ``prompt_ids``, ended early by one of ``stop_ids``."""

    name: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Timed:
    """The tokens generated, and the seconds from the first of them to the last: decoding without the prompt.

    rounds and committed count verify passes and the tokens they gave, where the contestant counts them.
    """

    token_ids: tuple[int, ...]
    seconds: float
    rounds: int = 0
    committed: int = 0


class Contestant(Protocol):
    """Generates one text at a time."""

    name: str

    def run(self, case: Case) -> Timed:
        """Generate and time one text."""
        ...


class EngineContestant:
    """This engine, with or without a drafter, greedy unless ``sampling`` says otherwise."""

    def __init__(self, name: str, engine: Engine, sampling: SamplingParams = GREEDY) -> None:
        self.name = name
        self.engine = engine
        self.sampling = sampling
        self.numbers = itertools.count()

    def run(self, case: Case) -> Timed:
        """One request, alone in the engine. Errors: EngineError where the engine failed on it."""
        request_id = f"bench-{next(self.numbers)}"
        request = Request(request_id, case.prompt_ids, case.max_tokens, self.sampling, case.stop_ids)
        result = generate(self.engine, [request])[request_id]
        if result.finished.reason is FinishReason.FAILED:
            raise EngineError(f"{self.name} failed on {case.name}: {result.finished.error}")
        stats = result.finished.stats
        return Timed(tuple(result.token_ids), result.finished.timings.decode_s, stats.rounds, stats.committed)


class FirstTokenClock:
    """A streamer for transformers' ``generate`` that notes when the first new token came."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.first_s = 0.0

    def put(self, _: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.num_calls += 1
        if self.num_calls == 2:
            self.first_s = time.perf_counter()

    def end(self) -> None:
        """Called when the text is done."""


class TransformersPeer:
    """transformers' own ``generate`` with its KV cache on the same weights and dtype."""

    name = "transformers"

    def __init__(self, folder: Path, weights: str, sampling: SamplingParams = GREEDY) -> None:
        """Errors: PeerUnavailable for weights that transformers does not hold."""
        self.sampling = sampling
        if folder.is_file():
            raise PeerUnavailable("transformers does not compute with a GGUF file's codes")
        if weights not in WEIGHTS:
            raise PeerUnavailable(
                f"transformers has no {weights} form of these weights; --weights bf16 compares with it"
            )
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=WEIGHTS[weights], use_safetensors=True, trust_remote_code=False
        ).eval()
        # Where a text ends is the case's business; generate() would fall back on the model's own ids.
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(self, case: Case) -> Timed:
        """One ``generate``."""
        temperature = self.sampling.temperature
        chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        prompt = torch.tensor([case.prompt_ids])
        clock = FirstTokenClock()
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=case.max_tokens,
            use_cache=True,
            **chosen,
            eos_token_id=sorted(case.stop_ids) or None,
            pad_token_id=0,
            streamer=clock,
        )
        seconds = time.perf_counter() - clock.first_s
        return Timed(tuple(output[0, len(case.prompt_ids) :].tolist()), seconds)


@contextlib.contextmanager
def default_parameters(**settings: Any) -> Iterator[None]:
    """llama.cpp's default parameters of models, changed for what llama-cpp-python's own class has no argument for."""
    from llama_cpp import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def changed() -> Any:
        parameters = defaults()
        for name, value in settings.items():
            setattr(parameters, name, value)
        return parameters

    llama_cpp.llama_model_default_params = changed
    try:
        yield
    finally:
        llama_cpp.llama_model_default_params = defaults


class LlamaCppPeer:
    """llama.cpp through llama-cpp-python, on the same weights as GGUF; prompts go in as token ids.

    With ``lookup`` it drafts by its own prompt lookup, two tokens at a time, which its documentation advises for CPUs.
    """

    def __init__(
        self,
        path: Path,
        weights: str,
        threads: int,
        context_length: int,
        sampling: SamplingParams = GREEDY,
        *,
        lookup: bool = False,
    ) -> None:
        """``path``: a GGUF file, taken as it is, or a folder, written as one.

        Errors: PeerUnavailable without the package; GGUFError for an architecture the writer does not know.
        """
        self.name = LLAMA_CPP_LOOKUP if lookup else LLAMA_CPP
        self.sampling = sampling
        if not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf")):
            raise PeerUnavailable("llama-cpp-python is not installed; `make gguf` builds it (10 to 15 minutes)")
        self.wanted = ContextOptions(context_length, 1, threads)
        if path.is_file():
            self.model: Any = self.load(path, lookup)
            return
        from server.targets.gguf.writing import write_gguf

        with tempfile.TemporaryDirectory(prefix="dovetail-bench-") as scratch:
            file = write_gguf(path, Path(scratch) / "target.gguf", weights)
            self.model = self.load(file, lookup, use_mmap=False)  # the file is gone once the model is loaded

    def load(self, file: Path, lookup: bool, **options: Any) -> Any:
        """llama-cpp-python's model of a file. Errors: PeerUnavailable where llama.cpp cannot run it."""
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        try:
            possible = try_out(file, self.wanted)
        except LlamaCppError as error:
            raise PeerUnavailable(f"llama.cpp cannot run {file.name}: {error}") from error
        with default_parameters(use_extra_bufts=possible.rearranged):
            return Llama(
                str(file),
                n_ctx=possible.num_cells,
                n_threads=possible.threads,
                n_threads_batch=possible.threads,
                seed=self.sampling.seed or 0,
                draft_model=LlamaPromptLookupDecoding(num_pred_tokens=2) if lookup else None,
                verbose=False,
                **options,
            )

    def run(self, case: Case) -> Timed:
        """Tokens as they come; sampled ones are another text than this engine's, drawn from the same distribution."""
        self.model.reset()
        token_ids: list[int] = []
        first_s = time.perf_counter()
        temperature = self.sampling.temperature
        chosen = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temp": temperature} if temperature else GREEDY_CHOICE
        for token_id in self.model.generate(case.prompt_ids, repeat_penalty=1.0, **chosen):
            if not token_ids:
                first_s = time.perf_counter()
            token_ids.append(token_id)
            if token_id in case.stop_ids or len(token_ids) == case.max_tokens:
                break
        return Timed(tuple(token_ids), time.perf_counter() - first_s)


def create_peers(
    names: Sequence[str], path: Path, weights: str, context_length: int, sampling: SamplingParams
) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can run here, and for each other one the reason why it cannot.

    ``path`` is the target's folder or GGUF file; of a file ``weights`` are its own codes, or it was repacked.
    """
    peers: list[Contestant] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            if is_packed(path):
                raise PeerUnavailable("a packed folder is this project's own format; name the original folder")
            if path.is_file() and weights in BITS:
                raise PeerUnavailable("the GGUF file's weights were repacked here; compare without --weights")
            if name == TransformersPeer.name:
                peers.append(TransformersPeer(path, weights, sampling))
            else:
                lookup = name == LLAMA_CPP_LOOKUP
                peers.append(LlamaCppPeer(path, weights, compute_threads(), context_length, sampling, lookup=lookup))
        except (PeerUnavailable, ValueError) as error:
            skipped[name] = str(error)
    return peers, skipped
