"""
P2D in the place of TRL's `sft.py`: the same flags and recipes, and P2D's own. What it does is in p2d_peft/commands/sft.py.

    python scripts/p2d_sft.py --config examples/recipes/p2d.yaml --learning_rate 1e-3
    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml scripts/p2d_sft.py \
        --config examples/recipes/p2d.yaml
"""

from p2d_peft.commands.sft import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
