"""The model card of a drafter folder. Knows nothing of training beyond what it is handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


CITATION = """@article{draftopd2026,
  title  = {Draft-OPD},
  year   = {2026},
  note   = {arXiv:2605.29343}
}"""


def write_model_card(file: Path, target_name: str, tags: list[str], **fields: Any) -> None:
    """
    Render `templates/model_card.md` to `file`.

    Args:
        file (`Path`): Where; its folder is made.
        target_name (`str`): Id or path of the target; linked as base model when it is an id.
        tags (`list[str]`): Hub tags.
        fields: What the template names (`model_name`, `kind`, `num_draft_tokens`, `recipe`, `metrics`, …).
    """
    is_id = target_name.count("/") == 1 and not Path(target_name).exists()
    data = ModelCardData(
        library_name="transformers", tags=sorted(set(tags)), base_model=target_name if is_id else None
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "model_card.md"),
        target_name=target_name if is_id else Path(target_name).name,
        citation=CITATION,
        **fields,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    card.save(file)
