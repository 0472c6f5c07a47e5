"""
A script after TRL's example of SFT, for chats in a file of JSON lines.

    python examples/drop_in/sft_script.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name chats.jsonl --use_peft --lora_r 16 --eval_strategy epoch --output_dir sft
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from p2d_peft import P2DTrainer as SFTTrainer


def main(script_args, training_args, model_args):
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    rows = load_dataset("json", data_files=script_args.dataset_name, split=script_args.dataset_train_split)
    split = rows.train_test_split(test_size=0.1, seed=training_args.seed)

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=split["train"],
        eval_dataset=split["test"] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return trainer


if __name__ == "__main__":
    trainer = main(*TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
