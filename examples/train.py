"""
Train a drafter with Draft-OPD, or with SFT where `--lmbda 0` is given.

```bash
accelerate launch examples/train.py \
    --model_name_or_path z-lab/Qwen3-4B-DFlash-b16 \
    --teacher_model_name_or_path Qwen/Qwen3-4B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --max_prompt_length 2048 \
    --max_completion_length 1024 \
    --chat_template_kwargs '{"enable_thinking": false}' \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --num_train_epochs 1 \
    --eval_on_start \
    --output_dir qwen3-4b-dflash-opd
```

An adapter instead of all weights, and a target in 4 bits, take more options; all of them can stand in a YAML file:

```bash
accelerate launch examples/train.py --config train.yaml \
    --use_peft --lora_r 16 --lora_target_modules all-linear --learning_rate 1e-3 --load_in_4bit
```

`draft-opd train` takes the same options and SFT before it, and ends with the change of τ in a table and in
`results.json`.
"""

from trl import TrlParser

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer
from draft_opd_trl.commands.options import AdapterArguments, QuantizationArguments
from draft_opd_trl.commands.train import PromptArguments
from draft_opd_trl.texts.rows import hold_out, load_prompts


def main(script_args, quantization_args, adapter_args, training_args):
    # Load the prompts; some are held out to measure the acceptance length on
    prompts = load_prompts(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    train_dataset, eval_dataset = hold_out(prompts, script_args.num_eval_prompts, training_args.seed)

    # Initialize the trainer: the drafter is trained, the target it drafts for is frozen
    trainer = DraftOPDTrainer(
        model=script_args.model_name_or_path,
        teacher_model=script_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=adapter_args.peft_config(),
        quantization_config=quantization_args.quantization_config(),
    )

    # Train the drafter, and measure it by real speculative decoding
    trainer.train()
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())

    # Save it in the format that serving engines load, and push it to the Hub
    trainer.save_model()
    trainer.accelerator.print(f"Drafter saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)

    # Finish the trackers and destroy the process group, once no rank talks to another any more
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    parser = TrlParser((PromptArguments, QuantizationArguments, AdapterArguments, DraftOPDConfig))
    main(*parser.parse_args_and_config())
