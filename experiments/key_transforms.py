"""
Key transforms for routers that were trained without them: fit them and save them beside the routers.

    python -m experiments.key_transforms routers/mine --model my/model
    python -m experiments.key_transforms kvpress_moe/data/routers/smollm2-135m-instruct

Reads the first prompts of the default training config, half a minute for 24 prompts of SmolLM2 on two cores.
`kvpress-moe train` does this before its tuning, with its own prompts. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from kvpress_moe import load_model
from kvpress_moe.codes.transform_files import FILE, writer
from kvpress_moe.files import write_atomically
from kvpress_moe.routers.checkpoint import load_routers
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.key_transforms import fit_key_transforms
from kvpress_moe.training.trainer import prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("router", type=Path, help="directory of the routers")
    parser.add_argument("--model", help="hub id or directory; default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=TrainingConfig().transform_prompts)
    arguments = parser.parse_args()
    routers = load_routers(arguments.router)
    model, tokenizer = load_model(arguments.model)
    started = time.perf_counter()
    config = replace(TrainingConfig(), samples=arguments.prompts)
    made = prompts(config, tokenizer, model.config.get_text_config(decoder=True).max_position_embeddings)
    transforms = fit_key_transforms(model, [prompt.context for _, prompt in made])
    path = arguments.router / FILE
    write_atomically(path, writer(transforms))
    print(
        json.dumps(
            {
                "file": str(path),
                "bytes": path.stat().st_size,
                "layers": len(transforms),
                "of": routers.config.num_layers,
                "tokens": sum(prompt.context.shape[1] for _, prompt in made),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
