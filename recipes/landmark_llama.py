r"""
Teaches a LLaMA random access to its past: landmark attention with LoRA over a 4-bit backbone.

On any machine, with the tiny LLaMA that ships with lrmt (no network, no GPU):

    accelerate launch recipes/landmark_llama.py

On one GPU, with the published settings, on text of your own:

    accelerate launch --config_file ds_configs/one_gpu.yaml recipes/landmark_llama.py \
        --config recipes/configs/landmark_llama3.2_1b.yaml --text_path books --output_dir runs/landmark-1b

Sharded under DeepSpeed ZeRO-3 over 8 GPUs, or over two CPU processes:

    accelerate launch --config_file ds_configs/zero3_8gpu.yaml recipes/landmark_llama.py \
        --config recipes/configs/landmark_llama3.1_8b.yaml --text_path books --output_dir runs/landmark-8b
    accelerate launch --config_file ds_configs/zero3_2cpu.yaml recipes/landmark_llama.py --output_dir runs/zero3

--dry_run prints the plan and a memory estimate; every key of the YAML files is a flag too, and flags win.
"""

from pathlib import Path

from lrmt.training.recipe import run_recipe

if __name__ == "__main__":
    run_recipe(
        "landmark", default_config=Path(__file__).parent / "configs" / "landmark_tiny_llama.yaml", description=__doc__
    )
