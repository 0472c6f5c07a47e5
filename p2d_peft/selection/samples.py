"""From rows of a dataset to token ids and labels, exactly as `SFTTrainer` makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .pool import in_memory
from .progress import quiet_datasets
from .row_checks import check_rows, row_numbers


_ROW = "p2d_row"


@dataclass(frozen=True)
class Samples:
    """
    Tokenized samples.

    Args:
        rows (`list[int]`): For each sample, its row in the dataset it came from, ascending.
        input_ids (`list[list[int]]`): For each sample, its token ids.
        labels (`list[list[int]]`): For each sample, the ids again, -100 on tokens that do not count.
        n_rows (`int`): Number of rows of the dataset. Rows that are no sample have no token that counts, because they
            are empty, masked throughout, or cut off before their completion.
        n_truncated (`int`): Number of rows that were longer than `max_length`, and were cut off.
        pad_token_id (`int`): What to pad batches with.
    """

    rows: list[int]
    input_ids: list[list[int]]
    labels: list[list[int]]
    n_rows: int
    n_truncated: int
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(map(len, self.input_ids))

    def subset(self, indices: list[int]) -> Samples:
        """Some of the samples, by their positions here."""
        return replace(
            self,
            rows=[self.rows[i] for i in indices],
            input_ids=[self.input_ids[i] for i in indices],
            labels=[self.labels[i] for i in indices],
        )

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """
        Batches of samples of similar length, the longest first, so that a lack of memory shows at once.

        Args:
            batch_size (`int`): Samples a batch; the last batch may hold fewer.
            device (`torch.device`): Where the tensors go.

        Yields:
            `tuple[list[int], dict[str, torch.Tensor]]`: the positions of the batch's samples in `rows`, and their
            `input_ids`, `attention_mask` and `labels` of shape (B, T), int64, padded on the right; on an accelerator T
            is a multiple of 8, as kernels are made anew for each length.
        """
        collate = DataCollatorForLanguageModeling(
            pad_token_id=self.pad_token_id, pad_to_multiple_of=length_multiple(device)
        )
        order = sorted(range(len(self)), key=lambda index: -len(self.input_ids[index]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([{"input_ids": self.input_ids[i], "labels": self.labels[i]} for i in chosen])
            yield chosen, {key: value.to(device) for key, value in batch.items()}


def length_multiple(device: torch.device) -> int | None:
    """What the length of a batch is a multiple of, for a device; None where it is what its longest sample has."""
    return None if device.type == "cpu" else 8


def prepare_samples(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    args: SFTConfig,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    name: str = "pool",
    rows: int | Sequence[int] = 0,
) -> Samples:
    """
    Tokenize a dataset of any type that `SFTTrainer` takes, truncate it and mask what does not count in the loss.

    Args:
        dataset (`Dataset`): Language modeling or prompt-completion, plain or conversational, or pre-tokenized.
        processing_class (`PreTrainedTokenizerBase`): The tokenizer; it is not changed.
        args (`SFTConfig`): Of it the fields that say how data is prepared: `dataset_text_field`, `max_length`,
            `truncation_mode`, `completion_only_loss`, `assistant_only_loss`, `eos_token`, `dataset_num_proc`.
        formatting_func (`Callable`, *optional*): As in `SFTTrainer`: from a row to its text.
        name (`str`, *optional*, defaults to `"pool"`): What to call the dataset in progress bars and errors.
        rows (`int` or `Sequence[int]`, *optional*, defaults to 0): For a part of a larger dataset, the numbers that its
            rows have there, ascending; or the first of them, if they follow one another.

    Raises:
        `TypeError`: if `dataset` or `processing_class` is of another type.
        `ValueError`: as [`check_rows`] does, or if a row cannot be made into tokens, or has not as many labels as
            tokens.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset`, got {type(dataset).__name__}.")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` must be a tokenizer (`PreTrainedTokenizerBase`), got {type(processing_class).__name__}."
        )
    check_rows(dataset, processing_class, args, formatting_func, name, rows)
    dataset = dataset.with_format(None)  # TRL and a `formatting_func` want rows of text, not tables or arrays
    if dataset.cache_files:
        dataset = in_memory(dataset)
    preparer = _Preparer(processing_class, args, dataset[0])
    with quiet_datasets():
        numbered = dataset.remove_columns([c for c in dataset.column_names if c == _ROW]).add_column(
            _ROW, list(range(len(dataset)))
        )
    numbers = row_numbers(rows, len(dataset))
    try:
        prepared = preparer.prepare(numbered, formatting_func, name)
    except Exception as error:
        place, reason = _first_bad(lambda part: preparer.prepare(part, formatting_func, name), numbered, error)
        if place is None:
            raise
        raise ValueError(
            f"`{name}` cannot be made into tokens at row {numbers[place]}: {type(reason).__name__}: {reason}"
        ) from reason
    prepared = prepared.select_columns([_ROW, "input_ids", "labels"]).with_format(None)[:]
    samples = Samples([], [], [], n_rows=len(dataset), n_truncated=0, pad_token_id=preparer.pad_token_id)
    n_truncated = 0
    for row, input_ids, labels in zip(prepared[_ROW], prepared["input_ids"], prepared["labels"], strict=True):
        if len(input_ids) != len(labels):
            raise ValueError(
                f"`{name}` has {len(labels)} labels for the {len(input_ids)} tokens of row {numbers[row]}; each token "
                "has one, -100 where it does not count."
            )
        n_truncated += len(input_ids) > len(input_ids[preparer.kept])
        input_ids, labels = input_ids[preparer.kept], labels[preparer.kept]
        # a label counts if it is predicted, which the first token's is not
        if any(label != -100 for label in labels[1:]):
            samples.rows.append(numbers[row])
            samples.input_ids.append(input_ids)
            samples.labels.append(labels)
    return replace(samples, n_truncated=n_truncated)


def _first_bad(
    prepare: Callable[[Dataset], object], dataset: Dataset, error: Exception
) -> tuple[int | None, Exception]:
    """
    The place of the first row on which `prepare` fails, as it did on all rows together, and what it says there. None
    where it fails on no row alone.
    """
    start, stop = 0, len(dataset)
    while stop - start > 1:
        middle = (start + stop) // 2
        for part in ((start, middle), (middle, stop)):
            try:
                prepare(dataset.select(range(*part)))
            except Exception as raised:
                (start, stop), error = part, raised
                break
        else:
            return None, error
    return start, error


class _Preparer(SFTTrainer):
    """
    `SFTTrainer`'s dataset preparation without a model or a trainer.

    TRL offers it only as a method of a whole trainer. It is inherited rather than written again, because the rows that
    are scored must be the rows that will be trained on, to the token. A test holds it against a real `SFTTrainer`.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase, args: SFTConfig, sample: dict[str, Any]) -> None:
        # SFTTrainer.__init__ is left out on purpose; these are the attributes that _prepare_dataset reads.
        if args.chat_template_path is not None:
            raise ValueError(
                "`args.chat_template_path` may add tokens to the model, which only a trainer can do. Set "
                "`processing_class.chat_template` instead."
            )
        self._args = copy.copy(args)
        self._args.shuffle_dataset = False  # rows keep their order
        # SFTTrainer would cut in the same places, but not tell how many rows it cut
        self._args.max_length = None
        if args.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"`truncation_mode` must be 'keep_start' or 'keep_end', got {args.truncation_mode!r}.")
        from_start = args.max_length is None or args.truncation_mode == "keep_start"
        self.kept = slice(None, args.max_length) if from_start else slice(-args.max_length, None)
        self._tokenizer = processing_class
        if args.eos_token is not None:
            self._tokenizer = copy.deepcopy(processing_class)
            self._tokenizer.eos_token = args.eos_token
        self.chat_template = None
        if args.assistant_only_loss and not has_generation_markers(processing_class.chat_template):
            self.chat_template = get_training_chat_template(processing_class)
        is_prompt_completion = "prompt" in sample and "completion" in sample
        self.completion_only_loss = (
            is_prompt_completion if args.completion_only_loss is None else args.completion_only_loss
        )

    @property
    def pad_token_id(self) -> int:
        # what is padded is masked, so any id will do
        ids = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    def prepare(self, dataset: Dataset, formatting_func: Callable[[dict[str, Any]], str] | None, name: str) -> Dataset:
        with _in_parts():
            return self._prepare_dataset(dataset, self._tokenizer, self._args, False, formatting_func, name)


@contextmanager
def _in_parts() -> Iterator[None]:
    """
    Context in which a dataset can be prepared in many parts by one process of several.

    `SFTTrainer` lets one process go first and fill a cache file for the others, which wait. Here nothing is written, and
    with unlike numbers of parts they would wait for one another forever.
    """
    names = ("main_process_first", "local_main_process_first")
    waiting = {name: getattr(PartialState, name) for name in names}
    for name in names:
        setattr(PartialState, name, lambda state: nullcontext())
    try:
        with quiet_datasets():
            yield
    finally:
        for name, method in waiting.items():
            setattr(PartialState, name, method)
