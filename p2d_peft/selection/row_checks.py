"""What can be wrong with the rows of a dataset, found before they are tokenized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, List, Value
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
        `ValueError`: if there are no rows or a transform, none of the columns that are needed, a value is missing or of
            another type, or there are conversations and no chat template.
    """
    if not len(dataset):
        raise ValueError(f"`{name}` has no rows.")
    if dataset.format["type"] == "custom":  # which would be left out, without a word
        raise ValueError(
            f"`{name}` has a transform (`with_transform`), and rows are read from its columns. Apply it with `{name}.map(...)`."
        )
    dataset = dataset.with_format(None)  # another format's rows are tables or arrays
    if "input_ids" in dataset.column_names:
        _check_tokens(dataset, name)
        return
    if formatting_func is not None:
        return
    texts = [args.dataset_text_field, "messages", "conversations", "prompt", "completion"]
    known = {*texts, "input_ids"} - {"completion"}
    if not known & set(dataset.column_names):
        raise ValueError(
            f"`{name}` has the columns {dataset.column_names}; SFTTrainer needs one of {sorted(known)}, or a "
            "`formatting_func`."
        )
    for column in set(texts) & set(dataset.column_names):
        _check_texts(dataset, column, column in ("messages", "conversations"), name, rows)
    is_chat = is_conversational(dataset[0]) or is_conversational_from_value(dataset[0])
    has_template = args.chat_template_path is not None or getattr(processing_class, "chat_template", None) is not None
    if is_chat and not has_template:
        raise ValueError(
            f"`{name}` holds conversations, but the tokenizer has no chat template. Set `chat_template` of the tokenizer, take "
            "the one of the model's instruct version, or bring rows of plain text."
        )


def _check_texts(dataset: Dataset, column: str, is_chat: bool, name: str, rows: int | Sequence[int]) -> None:
    feature = dataset.features[column]
    kind = feature.dtype if isinstance(feature, Value) else None
    if kind is not None and (is_chat or kind not in ("string", "large_string", "null")):
        wanted = "a list of messages with 'role' and 'content'" if is_chat else "text"
        raise ValueError(f"`{name}` must hold {wanted} in the column '{column}', got values of type {kind}.")
    # cheap, as Arrow keeps count; of rows that were left out of the dataset, too, so a look at the values decides
    if dataset.data.column(column).null_count:
        values = dataset[column]
        numbers = range(rows, rows + len(dataset)) if isinstance(rows, int) else rows
        if missing := [row for row, value in zip(numbers, values, strict=True) if value is None]:
            raise ValueError(
                f"`{name}` has no value in the column '{column}' in {len(missing)} of {len(dataset)} rows: rows "
                f"{shortened(missing)}. Leave these rows out, with `{name}.filter(...)`."
            )


def _check_tokens(dataset: Dataset, name: str) -> None:
    for column in {"input_ids", "labels"} & set(dataset.column_names):
        feature = dataset.features[column]
        of = getattr(feature, "feature", None)
        if not isinstance(feature, List) and of is None:
            raise ValueError(f"`{name}` must hold lists of token ids in the column '{column}', got {feature}.")
        if isinstance(of, Value) and "int" not in of.dtype and of.dtype != "null":
            raise ValueError(f"`{name}` must hold integers in the lists of the column '{column}', got {of.dtype}.")
