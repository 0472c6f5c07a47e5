"""What can be wrong with the rows of a dataset, found before they are tokenized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, LargeList, List, Value
from trl import SFTConfig
from trl.data_utils import is_conversational, is_conversational_from_value

from .pool import shortened


def check_rows(
    dataset: Dataset,
    processing_class: Any,
    args: SFTConfig,
    formatting_func: Callable[[dict[str, Any]], str] | None,
    name: str,
    rows: int | Sequence[int] = 0,
) -> None:
    """
    Check that `SFTTrainer` can make tokens of a dataset's rows. What it says otherwise is a `StopIteration` or a `KeyError`
    from deep within.

    Args:
        dataset (`Dataset`): The rows.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): What makes tokens of them.
        args (`SFTConfig`), formatting_func (`Callable`, *optional*): As in `SFTTrainer`.
        name (`str`): The argument that the dataset was given as.
        rows (`int` or `Sequence[int]`, *optional*, defaults to 0): As in [`prepare_samples`], for a part of a dataset.

    Raises:
        `ValueError`: if there are no rows or a transform, none of the columns that are needed, a value is missing, empty
            or of another type, or there are conversations and no chat template. Columns that `SFTTrainer` does not read
            may hold anything.
    """
    if not len(dataset):
        raise ValueError(f"`{name}` has no rows.")
    if dataset.format["type"] == "custom":  # which would be left out, without a word
        raise ValueError(
            f"`{name}` has a transform (`with_transform`), and rows are read from its columns. Apply it with `{name}.map(...)`."
        )
    dataset = dataset.with_format(None)  # another format's rows are tables or arrays
    if "input_ids" in dataset.column_names:
        _check_tokens(dataset, args, name, rows)
        return
    if formatting_func is not None:
        return
    known = {args.dataset_text_field, "messages", "conversations", "prompt", "input_ids"}
    if not known & set(dataset.column_names):
        raise ValueError(
            f"`{name}` has the columns {dataset.column_names}; SFTTrainer needs one of {sorted(known)}, or a "
            "`formatting_func`."
        )
    read = _read_columns(dataset, args.dataset_text_field)
    for column in read:
        _check_texts(dataset, column, name, rows)
    first = dataset.select_columns(read)[0]
    is_chat = is_conversational(first) or is_conversational_from_value(first)
    has_template = args.chat_template_path is not None or getattr(processing_class, "chat_template", None) is not None
    if is_chat and not has_template:
        raise ValueError(
            f"`{name}` holds conversations, but the tokenizer has no chat template. Set `chat_template` of the tokenizer, take "
            "the one of the model's instruct version, or bring rows of plain text."
        )


def row_numbers(rows: int | Sequence[int], n_rows: int) -> Sequence[int]:
    """The numbers in a larger dataset of a part's rows, from what [`check_rows`] takes."""
    return range(rows, rows + n_rows) if isinstance(rows, int) else rows


def _read_columns(dataset: Dataset, text_field: str) -> list[str]:
    """Of the columns that may hold what a row says, those that `SFTTrainer` reads; others may come with a mixture."""
    columns = dataset.column_names
    if "prompt" in columns:
        # beside a prompt of plain text it puts the end token behind a text as well, and does not use it
        texts = [] if _is_list_of_messages(dataset.features["prompt"]) else [text_field]
        return [column for column in ("prompt", "completion", *texts) if column in columns]
    chats = [column for column in ("messages", "conversations") if column in columns]
    of_messages = [column for column in chats if _is_list_of_messages(dataset.features[column])]
    if of_messages:
        return of_messages
    return [text_field] if text_field in columns else chats


def _is_list_of_messages(feature: Any) -> bool:
    return not isinstance(getattr(feature, "feature", feature), Value | ClassLabel)


def _check_texts(dataset: Dataset, column: str, name: str, rows: int | Sequence[int]) -> None:
    feature = dataset.features[column]
    kind = feature.dtype if isinstance(feature, Value) else None
    is_chat = column in ("messages", "conversations")
    if kind is not None and (is_chat or kind not in ("string", "large_string", "string_view", "null")):
        wanted = "a list of messages with 'role' and 'content'" if is_chat else "text"
        raise ValueError(f"`{name}` must hold {wanted} in the column '{column}', got values of type {kind}.")
    _check_each(dataset, column, pc.is_null, "has no value", name, rows)
    if isinstance(feature, List | LargeList):
        _check_each(dataset, column, _is_empty, "has an empty list", name, rows)


def _check_tokens(dataset: Dataset, args: SFTConfig, name: str, rows: int | Sequence[int]) -> None:
    columns = dataset.column_names
    for column in sorted({"input_ids", "labels"} & set(columns)):
        feature = dataset.features[column]
        of = getattr(feature, "feature", None)
        if not isinstance(feature, List) and of is None:
            raise ValueError(f"`{name}` must hold lists of token ids in the column '{column}', got {feature}.")
        if isinstance(of, Value) and "int" not in of.dtype and of.dtype != "null":
            raise ValueError(f"`{name}` must hold integers in the lists of the column '{column}', got {of.dtype}.")
        _check_each(dataset, column, pc.is_null, "has no value", name, rows)
        _check_each(dataset, column, _holds_null, "lacks a number within the list", name, rows)
    # of which the labels are made, where there are none
    masks = ["assistant_masks", *(["completion_mask"] if args.completion_only_loss else [])]
    for column in masks if "labels" not in columns else []:
        if column in columns:
            _check_each(dataset, column, pc.is_null, "has no value", name, rows)


def _check_each(
    dataset: Dataset,
    column: str,
    is_bad: Callable[[pa.ChunkedArray], pa.ChunkedArray],
    what: str,
    name: str,
    rows: int | Sequence[int],
) -> None:
    """Check all values of a column at once: Arrow keeps count of what is missing, and where lists begin and end."""
    # of all rows that the dataset was chosen from, so that the values need not be gathered where none of those is bad
    if not pc.any(is_bad(dataset.data.column(column))).as_py():
        return
    bad = is_bad(dataset.with_format("arrow")[column][:])
    numbers = row_numbers(rows, len(dataset))
    if found := [numbers[place] for place in pc.indices_nonzero(bad).to_pylist()]:
        raise ValueError(
            f"`{name}` {what} in the column '{column}' in {len(found)} of {len(dataset)} rows: rows "
            f"{shortened(found)}. Leave these rows out, with `{name}.filter(...)`."
        )


def _is_empty(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.list_value_length(lists), 0)


def _holds_null(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pc.list_flatten(lists).null_count:
        return pa.chunked_array([pa.repeat(False, len(lists))])
    return pa.chunked_array([[numbers is not None and None in numbers for numbers in lists.to_pylist()]])
