r"""
Teaches a Mistral to remember across segments: ARMT, an associative memory in every layer, with LoRA over a 4-bit backbone.

On any machine, with the tiny Mistral that ships with lrmt (no network, no GPU):

    accelerate launch recipes/armt_mistral.py

On one GPU, with the published settings:

    accelerate launch --config_file ds_configs/one_gpu.yaml recipes/armt_mistral.py \
        --config recipes/configs/armt_mistral_7b.yaml --output_dir runs/armt-mistral-7b

Sharded under DeepSpeed ZeRO-3 over 8 GPUs, or over two CPU processes:

    accelerate launch --config_file ds_configs/zero3_8gpu.yaml recipes/armt_mistral.py \
        --config recipes/configs/armt_mistral_7b.yaml --output_dir runs/armt-mistral-7b-zero3
    accelerate launch --config_file ds_configs/zero3_2cpu.yaml recipes/armt_mistral.py --output_dir runs/armt-zero3

--dry_run prints the plan and a memory estimate; every key of the YAML files is a flag too, and flags win.
"""

from pathlib import Path

from lrmt.training.recipe import run_recipe

if __name__ == "__main__":
    run_recipe("armt", default_config=Path(__file__).parent / "configs" / "armt_tiny_mistral.yaml", description=__doc__)
