"""The card of a trainer: which settings it shows. What trainers push is in folders/test_hub.py, beside the Hub."""

from dataclasses import fields

from conftest import ANY_KIND, tiny_drafter
from datasets import Dataset
from runs import make_trainer

from draft_opd_trl import DraftOPDConfig, MuonWithAdamW
from draft_opd_trl._trl_compat import _BaseConfig
from draft_opd_trl.core.target import Target
from draft_opd_trl.training import hub_trainer


TEXTS = Dataset.from_dict({"prompt_ids": [[5, 6]] * 8, "completion_ids": [[7, 8, 0]] * 8})


def test_every_setting_is_in_the_card_or_left_out_on_purpose():
    """The card takes settings by name, so that one that holds a path or a token is not published by accident."""
    own = {field.name for field in fields(DraftOPDConfig)} - {field.name for field in fields(_BaseConfig)}
    private = {"model_init_kwargs", "teacher_model_init_kwargs", "text_cache_dir", "state_store_dir"}
    private |= {"server_url", "server_model", "server_token", "server_reload_command"}
    changes_no_weight = {"rollout_batch_size", "num_chains", "loss_chunk_size"}
    changes_no_weight |= {"log_completions", "num_completions_to_print", "num_texts_to_check", "state_store_gib"}
    changes_no_weight |= {"server_timeout", "server_concurrency", "server_max_retries", "server_reload_steps"}
    changes_no_weight |= {"serve_batch_sizes"}
    assert own - set(hub_trainer.RECIPE) == private | changes_no_weight, "put a new setting into RECIPE, or here"


def test_the_card_tells_the_optimizer_that_was_given(model, tmp_path):
    drafter = tiny_drafter(ANY_KIND, Target(model))
    given = {"optimizers": (MuonWithAdamW(drafter.parameters(), lr=4e-3, adamw_lr=1e-3), None)}
    for output_dir, options in ((tmp_path / "given", given), (tmp_path / "own", {"optim": "sgd"})):
        make_trainer(drafter, model, TEXTS, output_dir, **options).create_model_card()
    told = (tmp_path / "given" / "README.md").read_text()
    assert (
        "| `optim` | MuonWithAdamW |\n| `learning_rate` | 0.001, 0.004 |\n| `lr_scheduler_type` | constant |" in told
    )
    assert "| `optim` | sgd |\n| `learning_rate` | 0.01 |" in (tmp_path / "own" / "README.md").read_text()


def test_weights_are_those_of_the_best_step_where_it_was_loaded(model, tmp_path):
    trainer = make_trainer(tiny_drafter(ANY_KIND, Target(model)), model, TEXTS, tmp_path)
    trainer.state.global_step, trainer.state.best_global_step = 9, 4
    assert trainer.weights_step == 9
    trainer.args.load_best_model_at_end = True
    assert trainer.weights_step == 4
    trainer.is_in_train = True
    assert trainer.weights_step == 9


def test_a_card_is_renewed_while_the_folder_holds_these_weights(model, tmp_path):
    trainer = make_trainer(tiny_drafter(ANY_KIND, Target(model)), model, TEXTS, tmp_path / "out")
    written = []
    trainer.create_model_card = lambda folder: written.append(folder.name)
    trainer.renew_card()
    assert written == []  # nothing was saved yet
    trainer.save_model()
    trainer.save_model(str(tmp_path / "other"))
    trainer.renew_card()
    trainer.state.global_step += 1
    trainer.renew_card()
    assert written == ["out", "other", "other"]
