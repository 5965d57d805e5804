"""medfl-ray pretrain: first weights from synthetic images, at no epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML file of the pretraining.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as section.key=value; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Pretrain a network on images synthesised from public label maps; no patient's image is read."""
    from medfl_ray.config.files import apply_override, parse_model, read_yaml
    from medfl_ray.config.pretrain import PretrainConfig

    raw = read_yaml(config)
    for override in set_ or []:
        apply_override(raw, override)
    loaded = parse_model(PretrainConfig, raw, config.name)

    from medfl_ray.data.phantoms.structure_crops import load_structures
    from medfl_ray.export.public_weights import save_public_weights
    from medfl_ray.training.devices import choose_device
    from medfl_ray.training.pretraining import pretrain as train

    structures = load_structures(loaded.crops.labelmaps, loaded.crops.structures)
    typer.echo(f"{len(structures)} structures from {loaded.crops.labelmaps.name}; {loaded.training.steps} steps")
    recent: list[float] = []
    every = max(1, loaded.training.steps // 20)

    def progress(step: int, loss: float) -> None:
        recent.append(loss)
        if step % every == 0 or step == loaded.training.steps:
            typer.echo(f"step {step:>6}  loss {sum(recent) / len(recent):.4f}")
            recent.clear()

    unfinished = loaded.output.with_suffix(".unfinished")
    layout, weights = train(loaded, structures, choose_device(device), progress, unfinished)
    made_with = loaded.model_dump(mode="json", exclude={"output": True, "crops": {"labelmaps"}})
    source = f"synthetic crops of the public label maps {loaded.crops.labelmaps.name!r}"
    manifest = save_public_weights(loaded.output, weights, layout, loaded.name, source, made_with)
    typer.echo(f"weights   {loaded.output}")
    typer.echo(f"sha256    {manifest.sha256}")
    typer.echo("next: set training.initial_weights in the configuration of a run with the same model section")
