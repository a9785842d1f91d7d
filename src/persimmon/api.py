"""The Python interface: `load` a model, then ask it for logits, text and chat."""

from __future__ import annotations

import operator
import os
import reprlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persimmon import chat as chat_format
from persimmon.accounting import count_parameters
from persimmon.checkpoints.checksums import verify_checksums
from persimmon.checkpoints.directory import open_directory
from persimmon.checkpoints.download import model_config, resolve
from persimmon.checkpoints.tensors import num_bytes
from persimmon.config import ModelConfig
from persimmon.engines import ENGINES, check_options, choose_device, choose_dtype, choose_engine
from persimmon.errors import InputError, UnavailableError
from persimmon.fast.cpu.packed import is_packed, open_packed
from persimmon.infer.completion import Generation
from persimmon.infer.decoder import Chunk, Decoder, check_token_ids
from persimmon.infer.generate import Stream
from persimmon.infer.params import SamplingParams
from persimmon.infer.session import ReportProgress, Session
from persimmon.machine import check_threads
from persimmon.tokenizer import Tokenizer

_CHECKED_BYTES = 256 << 20
"""Weights up to so many bytes are compared with their checksums at every load: at 1 GB/s a quarter of a second."""

Prompt = str | Sequence[int]
"""Text, or token ids, which are taken as they are."""


class Persimmon:
    """A model that is ready to run: a decoder and its tokenizer.

    Not for several threads at once. Streams may be interleaved; every one has its own sequence.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, *, context: int | None = None, choices: Iterable[str] = ()
    ) -> None:
        """`context` limits the length of sequences; `choices` are lines saying how the model was set up."""
        decoder.config.check_context(context)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.context = decoder.config.max_positions if context is None else context
        """Longest sequence in tokens."""
        self.choices = tuple(choices)
        """How the model was set up, and why, in lines."""
        self._chat_session: Session | None = None
        self._chat_stream: weakref.ref[Stream] | None = None

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.decoder.config

    @property
    def engine_name(self) -> str:
        """The engine that runs it."""
        return self.decoder.name

    def logits(self, token_ids: Tensor | Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
        """Logits of every position: ids [B, T], or [T] for one row, -> float32 [B, T, V] on the CPU."""
        try:
            rows = torch.as_tensor(token_ids)
        except (TypeError, ValueError):  # text, or rows of different lengths
            raise InputError(f"token ids must be integers [B, T], got {reprlib.repr(token_ids)}") from None
        if rows.dim() not in (1, 2) or rows.numel() == 0 or rows.is_floating_point():
            raise InputError(f"token ids must be integers [B, T], got {rows.dtype} {list(rows.shape)}")
        rows = rows[None] if rows.dim() == 1 else rows
        sequences = [self.decoder.new_sequence(rows.shape[1]) for _ in rows]
        try:
            chunks = [Chunk(sequence, row, "all") for sequence, row in zip(sequences, rows.tolist(), strict=True)]
            return torch.stack([torch.from_numpy(logits) for logits in self.decoder.forward(chunks)])
        finally:
            for sequence in sequences:
                sequence.close()

    def new_session(self) -> Session:
        """A sequence to pass to several `stream` or `generate` calls: each reads only what differs from the last."""
        return Session(self.decoder, self.context)

    def stream(
        self,
        prompt: Prompt,
        *,
        bos: bool = True,
        session: Session | None = None,
        progress: ReportProgress | None = None,
        lookup: int = 0,
        prompt_cache: str | os.PathLike[str] | None = None,
        **sampling: Any,
    ) -> Stream:
        """Continue a prompt; iterate for the pieces, then `.result()` has the whole.

        bos: put the begin-of-text token before a text, as the release's tokenizer does.
        session: from `new_session`. progress: called with (done, total) tokens while the prompt is read.
        lookup: guess up to so many tokens at a time from the text itself: faster where answers repeat it, and the same.
        prompt_cache: file that keeps what the model has read of the prompt, for the next time (see `save_prompt`).
        sampling: fields of SamplingParams. Raises InputError, or ContextLengthError for a prompt that does not fit.
        """
        params = SamplingParams.of(**sampling)
        return self._stream(
            self._encode(prompt, bos), params, session=session, progress=progress, lookup=lookup,
            prompt_cache=_path(prompt_cache),
        )  # fmt: skip

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Continue a prompt to the end; the arguments of `stream`."""
        return _run(self.stream(prompt, **options))

    def save_prompt(
        self,
        prompt: Prompt,
        path: str | os.PathLike[str],
        *,
        bos: bool = True,
        progress: ReportProgress | None = None,
    ) -> int:
        """Read a prompt and keep its keys and values in a file, for `prompt_cache=`; returns its tokens.

        The file fits this model, engine and precision alone, and is refused by others. Prompts that begin with the
        same tokens go on from it. Raises StorageError when it cannot be written; an older file then stays.
        """
        session = self.new_session()
        try:
            token_ids = self._encode(prompt, bos)
            check_token_ids("the prompt", token_ids, self.config.vocab_size)
            session.prefill(token_ids, exact_top=1, progress=progress)
            session.save(Path(path))
        finally:
            session.close()
        return len(token_ids)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        progress: ReportProgress | None = None,
        lookup: int = 0,
        prompt_cache: str | os.PathLike[str] | None = None,
        **sampling: Any,
    ) -> Stream:
        """Answer the last of the messages (`role`: system, user or assistant; `content`), as `stream` does.

        The sequence of the last chat is kept, so that the next turn reads only what is new. The text comes without
        the space that the chat format puts before an answer.
        """
        params = SamplingParams.of(**sampling)
        params = params.replace(stop=(*params.stop, *chat_format.STOP_STRINGS))
        prompt_ids = chat_format.encode(self.tokenizer, messages)
        stream = self._stream(
            prompt_ids, params, session=self._free_session(), progress=progress, skip_space=True, lookup=lookup,
            prompt_cache=_path(prompt_cache),
        )  # fmt: skip
        self._chat_stream = weakref.ref(stream)
        return stream

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Generation:
        """Answer the last of the messages; the arguments of `stream_chat`."""
        return _run(self.stream_chat(messages, **options))

    def _stream(self, prompt_ids: Sequence[int], params: SamplingParams, **options: Any) -> Stream:
        return Stream(self.decoder, self.tokenizer, prompt_ids, params, context=self.context, **options)

    def _encode(self, prompt: Prompt, bos: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=bos)
        try:
            if isinstance(prompt, bytes | bytearray) or any(isinstance(token_id, bool) for token_id in prompt):
                raise TypeError
            return [operator.index(token_id) for token_id in prompt]
        except TypeError:
            raise InputError(f"a prompt is text or integer token ids, got {reprlib.repr(prompt)}") from None

    def _free_session(self) -> Session | None:
        """The session kept for chats; None while a stream still uses it."""
        last = self._chat_stream() if self._chat_stream else None
        if last is not None and not last.finished:
            return None
        self._chat_session = self._chat_session or self.new_session()
        return self._chat_session


def _path(name: str | os.PathLike[str] | None) -> Path | None:
    return None if name is None else Path(name)


def _run(stream: Stream) -> Generation:
    for _ in stream:
        pass
    return stream.result()


def load(
    model: str | os.PathLike[str] = "mini",
    *,
    device: str = "auto",
    engine: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    rotary_precision: str = "checkpoint",
    adapter: str | os.PathLike[str] | None = None,
    **engine_options: Any,
) -> Persimmon:
    """Load a model.

    Args:
        model: a directory, a Hugging Face Hub id, or a name: `mini` (shipped), `mini-base`, `persimmon-8b-base`,
            `persimmon-8b-chat`.
        device: auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps.
        engine: auto, or the name of one (`persimmon doctor` lists them).
        dtype: auto, float32 or bfloat16. auto is the checkpoint's own on cuda, and elsewhere float32 as long as
            the weights fit in memory so.
        threads: CPU threads of the engine and of this process's PyTorch; None is the engine's choice.
        context: longest sequence in tokens; None is the model's.
        rotary_precision: checkpoint (what its config.json says), float32 or bfloat16.
        adapter: directory of a LoRA adapter (PEFT's form) to run the model with; not for quantized weights.
        engine_options: options that only some engines have.

    Raises NotFoundError, CheckpointError, InputError for a value that cannot be, UnavailableError for something that
    this machine does not have.
    """
    decoder, path, choices = load_decoder(
        model, device=device, engine=engine, dtype=dtype, threads=threads, context=context,
        rotary_precision=rotary_precision, adapter=adapter, **engine_options,
    )  # fmt: skip
    if context is None:
        context = getattr(decoder, "context", None)  # what the engine planned for, where it plans
    return Persimmon(decoder, Tokenizer.load(path), context=context, choices=choices)


def load_decoder(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    engine: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    rotary_precision: str = "checkpoint",
    adapter: str | os.PathLike[str] | None = None,
    **engine_options: Any,
) -> tuple[Decoder, Path, list[str]]:
    """The decoder alone, for models without a tokenizer as `synthesize` writes them; the arguments of `load`.

    Returns it with the model's directory and the lines that say how it was set up.
    """
    if threads is not None:
        check_threads(threads)
        torch.set_num_threads(threads)
    on = choose_device(device)
    if context is not None:
        model_config(model).check_context(context)  # before any weights are fetched or read
    path = resolve(model)
    packed = is_packed(path)
    config, stored = _describe(path, packed)
    if adapter is not None:
        if packed:
            raise UnavailableError(f"{path} is quantized and takes no adapter: `persimmon merge` first, then quantize")
        engine_options["adapter"] = Path(adapter)
    by = choose_engine(engine, on.value, packed, config)
    check_options(by.value, engine_options)
    if threads is not None and "threads" in ENGINES[by.value].options:
        engine_options["threads"] = threads
    if context is not None and "context" in ENGINES[by.value].options:
        engine_options["context"] = context
    precision = choose_dtype(dtype, on.value, stored, count_parameters(config).total)
    if rotary_precision != "checkpoint":
        config = config.replace(rotary_precision=rotary_precision)
    decoder = ENGINES[by.value].load(path, config, on.value, precision.value, **engine_options)
    choices = [
        f"{name} {choice.value} ({choice.reason})"
        for name, choice in (("device", on), ("engine", by), ("dtype", precision))
    ]
    if adapter is not None:
        choices.append(f"adapter {adapter}")
    return decoder, path, choices


def _describe(path: Path, packed: bool) -> tuple[ModelConfig, str]:
    """Configuration and stored precision of a model directory."""
    if packed:
        quantized = open_packed(path)
        return quantized.config, quantized.form.name
    opened = open_directory(path)
    if sum(num_bytes(tensor) for tensor in opened.tensors.values()) <= _CHECKED_BYTES:
        verify_checksums(path, weights_only=True)
    return opened.config, opened.dtype
